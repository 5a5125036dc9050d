# SPDX-License-Identifier: Apache-2.0
"""Warnings of a training loop, each given once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Log(Protocol):
    """`logging.Logger`, or anything that can warn like it."""

    def warning(self, message: str) -> None: ...


class Once:
    """Warns by `log`, of each thing once.

    Args:
        given: keys of warnings that are never given.
    """

    def __init__(self, log: Log, given: Iterable[str] = ()) -> None:
        self._log, self._given = log, set(given)

    def __call__(self, key: str, message: str) -> None:
        if key not in self._given:
            self._given.add(key)
            self._log.warning(message)

    def was_given(self, key: str) -> bool:
        return key in self._given
