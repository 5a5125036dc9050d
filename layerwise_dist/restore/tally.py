# SPDX-License-Identifier: Apache-2.0
"""Which tensors there are in the headers that a rank reads, and which other rank may need which of their elements.

Most ranks of a job have the same tensors in the same order: what can be said of all of these is worked out once
(`Layout`), and then each header is a few operations on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from layerwise_dist.errors import DamageError
from layerwise_dist.restore.holdings import Holdings
from layerwise_dist.restore.reslice import run_strides
from layerwise_dist.storage.entries import Entries
from layerwise_dist.tensors.slices import ITEM_BYTES

_LAYOUTS = 8  # that are remembered: those of the ranks of some stages of a pipeline
_ELEMENTS_END = 1 << 63
SEVERAL = -1  # of a part's start: it is several runs


@dataclass
class Summary:
    """What all ranks hear of one tensor: name, the ranks that hold it together (as `Slice.among`), dtype and shape.

    `elements` of all parts that were read. `first` is the lowest rank that wrote some. `copies`: the ranks that have
    all of it for themselves, by a hash of what they have; a hash of its own where that is not known.
    """

    name: str
    among: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    first: int
    copies: dict[str, list[int]] = field(default_factory=dict)


def _strides(shape: tuple[int, ...], lengths: tuple[int, ...], flat: bool, count: int) -> tuple[int, ...] | None:
    """Of the numbers that say where a part is (`Entries.numbers`), `count` of them: how many elements further one more
    is. None where the part is several runs; one of no elements is at the beginning.
    """
    if flat or not count:
        return (1,) * count
    return (0,) * count if 0 in lengths else run_strides(shape, lengths)


class Layout:
    """The tensors of a file, in its order: all arrays have one element a tensor.

    Attributes:
        numbers: int64, in `Tally.tensors`.
        items: int64, bytes of an element.
        own: bool, whether a rank has it for itself.
        owned: the numbers of those in the file.
        whole: int64, elements of the global tensor.
        low, high: int64 [ranks, tensors], elements that a rank may need a part of: from `low` to just before `high`.
        unsure: bool, where this is not said by two numbers for all ranks, or a part is several runs.
        told: whether a file with these tensors was looked at already.
        marks: of the last of these the bytes of what its rank has for itself, where they are few; and a mark of each.
    """

    def __init__(self, entries: Entries, numbers: list[int], holdings: Sequence[Holdings]) -> None:
        self._of = self._known(entries)
        self.numbers = np.array(numbers, dtype=np.int64)
        self.items = np.array([ITEM_BYTES[dtype] for dtype in entries.dtypes], dtype=np.int64)
        self.own = np.array([not among for among in entries.among], dtype=bool)
        self.owned = np.flatnonzero(self.own)
        self.whole = np.array([math.prod(shape) for shape in entries.shapes], dtype=np.int64)
        self.told = False
        self.marks: tuple[bytes, list[str]] | None = None
        firsts = np.array(entries.firsts, dtype=np.int64)
        counts = np.diff(firsts)
        strides = list(map(_strides, entries.shapes, entries.lengths, entries.flat, counts.tolist()))
        self._several = np.array([each is None for each in strides], dtype=bool)
        self._cut = np.flatnonzero(counts)
        self._bounds = firsts[self._cut]
        each = (found or (0,) * count for found, count in zip(strides, counts.tolist(), strict=True))
        self._strides = np.array(list(chain.from_iterable(each)), dtype=np.int64)
        fqns = [name.split("/", 1)[1] for name in entries.names]
        self.unsure = self._several.copy()
        self.low, self.high = np.empty((2, len(holdings), len(fqns)), dtype=np.int64)
        for rank, held in enumerate(holdings):
            for at, reach in enumerate(map(held.reach, fqns, entries.shapes)):
                if reach is None:
                    self.unsure[at] = True
                self.low[rank, at], self.high[rank, at] = reach or (0, 0)
        self._elements = np.zeros(len(fqns), dtype=np.int64)
        self._most = 0

    @staticmethod
    def _known(entries: Entries) -> tuple[list[Any], ...]:
        return (
            entries.names, entries.among, entries.dtypes, entries.shapes, entries.lengths, entries.flat, entries.firsts
        )  # fmt: skip

    def fits(self, entries: Entries) -> bool:
        return self._of == self._known(entries)

    def starts(self, entries: Entries) -> np.ndarray:
        """int64: the first element of each part in its tensor, in row-major order; `SEVERAL` where it is several runs.
        REQUIRES: `fits(entries)`.
        """
        found = np.zeros(len(self.own), dtype=np.int64)
        if len(self._cut):
            found[self._cut] = np.add.reduceat(entries.numbers * self._strides, self._bounds)
        found[self._several] = SEVERAL
        return found

    def count(self, elements: np.ndarray, tensors: Sequence[Summary]) -> None:
        """Of the parts of one file."""
        most = int(elements.max(initial=0))
        if self._most + most >= _ELEMENTS_END:
            self.flush(tensors)
        self._most += most
        self._elements += elements

    def flush(self, tensors: Sequence[Summary]) -> None:
        """What was counted goes into the summaries, which count without an end."""
        for number, own, elements in zip(
            self.numbers.tolist(), self.own.tolist(), self._elements.tolist(), strict=True
        ):
            if not own:
                tensors[number].elements += elements
        self._elements[:] = 0
        self._most = 0


class Tally:
    """All tensors that were read, numbered as they came."""

    def __init__(self, step: int, holdings: Sequence[Holdings]) -> None:
        """`holdings` of all ranks of this job, by rank."""
        self._step, self._holdings = step, holdings
        self._numbers: dict[tuple[str, str, str, tuple[int, ...]], int] = {}
        self._layouts: list[Layout] = []
        self._tensors: list[Summary] = []

    @property
    def tensors(self) -> list[Summary]:
        for layout in self._layouts:
            layout.flush(self._tensors)
        return self._tensors

    def __getitem__(self, number: int) -> Summary:
        """Elements may not be counted yet."""
        return self._tensors[number]

    def add(self, rank: int, entries: Entries) -> tuple[Layout, np.ndarray]:
        """The file's layout, and how many elements each of its parts has. Raises DamageError."""
        layout = self._layout(rank, entries)
        elements = (entries.ends - entries.begins) // layout.items
        layout.count(elements, self._tensors)
        wrong = np.flatnonzero(layout.own & (elements != layout.whole))
        if len(wrong):
            part = entries.at(int(wrong[0])).slice
            raise DamageError(
                f"step {self._step}: {part.name} of shape {list(part.global_shape)}: rank {rank} has it for "
                f"itself, and its shard has {part.place()} only"
            )
        return layout, elements

    def _layout(self, rank: int, entries: Entries) -> Layout:
        for at, layout in enumerate(self._layouts):
            if layout.fits(entries):
                self._layouts.insert(0, self._layouts.pop(at))
                return layout
        numbers = []
        for key in zip(entries.names, entries.among, entries.dtypes, entries.shapes, strict=True):
            number = self._numbers.setdefault(key, len(self._tensors))
            if number == len(self._tensors):
                name, _, _, shape = key
                if math.prod(shape) >= _ELEMENTS_END:
                    raise DamageError(f"step {self._step}: {name} of shape {list(shape)} has more elements than 2**63")
                self._tensors.append(Summary(*key, 0, rank))
            numbers.append(number)
        layout = Layout(entries, numbers, self._holdings)
        self._layouts.insert(0, layout)
        for old in self._layouts[_LAYOUTS:]:
            old.flush(self._tensors)
        del self._layouts[_LAYOUTS:]
        return layout
