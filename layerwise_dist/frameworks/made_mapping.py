# SPDX-License-Identifier: Apache-2.0
"""A mapping that is rebuilt at each access."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any


class MadeMapping(Mapping[str, Any]):
    """A subclass says what is in it now. Ask once for several things."""

    @abstractmethod
    def _now(self) -> dict[str, Any]: ...

    def __getitem__(self, name: str) -> Any:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def values(self) -> Any:
        return self._now().values()

    def items(self) -> Any:
        return self._now().items()
