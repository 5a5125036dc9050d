# SPDX-License-Identifier: Apache-2.0
"""What mappings hold (a module's dicts, an optimizer's state), compared by identity in every checkpoint.

The native core compares: in Python the lists that are made for it cost more than half of a checkpoint's stall.
"""

from __future__ import annotations

from typing import Any

from layerwise_dist import _native


class Contents:
    """Names and objects of mappings, in order, when this was made. Keeps the objects alive, so that nothing else takes
    the identity of one.
    """

    __slots__ = ("_sizes", "names", "values")

    def __init__(self, mappings: list[Any]) -> None:
        """Asks each of them for its items once: some are made for the question."""
        rows = [[*mapping.items()] for mapping in mappings]
        self.names: list[Any] = [name for row in rows for name, _ in row]
        self.values: list[Any] = [value for row in rows for _, value in row]
        self._sizes = [*map(len, rows)]

    def others(self, mappings: list[Any]) -> list[tuple[int, Any]] | None:
        """Of these mappings, (place in `values`, object) of each object that is not the one that was there; None if
        there are other names, or more or fewer.
        """
        return _native.other_objects(mappings, self._sizes, self.names, self.values)

    def same(self, mappings: list[Any]) -> bool:
        """Whether these mappings have the very same objects under the same names."""
        return self.others(mappings) == []
