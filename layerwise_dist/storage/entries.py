# SPDX-License-Identifier: Apache-2.0
"""The tensors of a shard, as its header has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from layerwise_dist.tensors.slices import Slice


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard: its slice, and the byte range in the file."""

    slice: Slice
    begin: int
    end: int
    wrapped: bool


class Entries(Mapping[str, Entry]):
    """Tensors by name, in the order of the file. They are kept as columns, which nobody may change, and an entry is
    made when it is asked for: a job of hundreds of ranks reads a million of them, and looks at few.

    Attributes:
        names, dtypes: one a tensor, as are all others.
        lengths: the part's shape, as the file has it.
        begins, ends: int64, in the file, in bytes.
        shapes: of the global tensors.
        among: as `Slice.among`.
        wrapped: as `Entry.wrapped`.
        flat: whether the part is a flat range.
        numbers: int64, of all tensors one after another: a box has its offset in each dimension, a flat range where it
            starts, in elements, and what is whole has none.
        firsts: where those of a tensor begin, and at last where they end.
    """

    __slots__ = (
        "_number", "among", "begins", "dtypes", "ends", "firsts", "flat", "lengths", "names", "numbers", "shapes",
        "wrapped",
    )  # fmt: skip

    def __init__(
        self, names: list[str], number: Mapping[str, int], dtypes: list[str], lengths: list[tuple[int, ...]],
        begins: np.ndarray, ends: np.ndarray, shapes: list[tuple[int, ...]], among: list[str], wrapped: list[bool],
        flat: list[bool], numbers: np.ndarray, firsts: list[int],
    ) -> None:  # fmt: skip
        """`number` of a tensor by its name."""
        self.names, self.dtypes, self.lengths, self.begins, self.ends = names, dtypes, lengths, begins, ends
        self.shapes, self.among, self.wrapped = shapes, among, wrapped
        self.flat, self.numbers, self.firsts = flat, numbers, firsts
        self._number = number

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Entries:
        found = list(entries)
        parts = [entry.slice for entry in found]
        names = [part.name for part in parts]
        where = [() if part.is_whole else (part.start,) if part.is_flat else part.offsets or () for part in parts]
        return cls(
            names, {name: number for number, name in enumerate(names)}, [part.dtype for part in parts],
            [part.local_shape for part in parts], np.array([entry.begin for entry in found], dtype=np.int64),
            np.array([entry.end for entry in found], dtype=np.int64), [part.global_shape for part in parts],
            [part.among for part in parts], [entry.wrapped for entry in found], [part.is_flat for part in parts],
            np.array(list(chain.from_iterable(where)), dtype=np.int64), [0, *accumulate(map(len, where))],
        )  # fmt: skip

    def at(self, number: int) -> Entry:
        kind, fqn = self.names[number].split("/", 1)
        dtype, lengths = self.dtypes[number], self.lengths[number]
        shape, among = self.shapes[number], self.among[number]
        where = tuple(self.numbers[self.firsts[number] : self.firsts[number + 1]].tolist())
        if self.flat[number]:
            part = Slice(kind, fqn, dtype, shape, start=where[0], length=lengths[0], among=among)
        elif where:
            part = Slice(kind, fqn, dtype, shape, offsets=where, lengths=lengths, among=among)
        else:
            part = Slice.whole(kind, fqn, dtype, shape, among)
        return Entry(part, int(self.begins[number]), int(self.ends[number]), self.wrapped[number])

    def __getitem__(self, name: str) -> Entry:
        return self.at(self._number[name])

    def __contains__(self, name: object) -> bool:
        return name in self._number

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
