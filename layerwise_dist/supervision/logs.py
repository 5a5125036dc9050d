# SPDX-License-Identifier: Apache-2.0
"""What this package logs has words as its arguments, not errors. (A traceback that is logged stays one.)

An error keeps the frames that it came through, and with them files, tensors and their memory. Handlers may keep records
for as long as they like (pytest's `caplog`, `logging.handlers.MemoryHandler`, services that collect errors).
"""

from __future__ import annotations

import logging
from collections.abc import Callable


def _text(of: Callable[[BaseException], str], error: BaseException) -> str:
    try:
        return of(error)
    except Exception:  # an error of somebody else's; a log call raises nothing
        return type(error).__qualname__


class _Words:
    """An error's two texts."""

    def __init__(self, error: BaseException) -> None:
        self._str, self._repr = _text(str, error), _text(repr, error)

    def __str__(self) -> str:
        return self._str

    def __repr__(self) -> str:
        return self._repr


def _in_words(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple) and any(isinstance(each, BaseException) for each in record.args):
        record.args = tuple(_Words(each) if isinstance(each, BaseException) else each for each in record.args)
    return True


def keep_words() -> None:
    """Of the logger `layerwise_dist`. Once or again."""
    logging.getLogger("layerwise_dist").addFilter(_in_words)
