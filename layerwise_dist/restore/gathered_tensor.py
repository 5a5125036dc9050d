# SPDX-License-Identifier: Apache-2.0
"""One tensor of a commit as a rank hears of it: the parts that it may need, and what of them fills a slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import numpy as np

from layerwise_dist.errors import DamageError
from layerwise_dist.restore.headers import ROW
from layerwise_dist.restore.planned import PlannedShard, Readable
from layerwise_dist.restore.planner import ByteRange, Found, Runs, replan
from layerwise_dist.restore.reslice import run_of
from layerwise_dist.storage.entries import Entry
from layerwise_dist.tensors.slices import ITEM_BYTES, Slice

Rows = np.ndarray  # [n, headers.ROW] of uint64
_FEW = 16  # parts of a tensor


@dataclass(eq=False)
class GatheredTensor:
    """One global tensor, with the parts of it that are of interest to this rank. Several ranks hold it together, or one
    has it for itself.
    """

    name: str
    among: str
    ranks: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    rows: list[Rows] = field(default_factory=list)
    boxes: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    copy: int | None = None  # the rank whose own it is

    @cached_property
    def _runs(self) -> Rows:
        """Those parts that are one run of elements, in the order of these."""
        found = np.concatenate(self.rows) if self.rows else np.empty((0, ROW), dtype=np.uint64)
        self.rows = []
        return found[np.argsort(found[:, 3], kind="stable")].astype(np.int64)

    @property
    def has_parts(self) -> bool:
        return bool(len(self._runs) or self.boxes)

    def spans(self, wanted: Slice, shards: Mapping[int, PlannedShard]) -> Sequence[ByteRange]:
        """What fills `wanted`, of this shape. Offsets are those of a slice of the file's dtype, whatever `wanted` has.

        Raises DamageError where some of it is not there.
        """
        run = run_of(wanted)
        if run is not None and not self.boxes:
            return self._of_run(*run, shards)
        if not wanted.numel:
            return []
        return replan(wanted, self._parts(shards))

    def _of_run(self, start: int, length: int, shards: Mapping[int, PlannedShard]) -> Runs:
        """Of each element the first of the parts that have it, in the order of where these begin."""
        if len(self._runs) <= _FEW:
            return Runs(self._of_few(start, start + length), shards)
        item, runs, end = ITEM_BYTES[self.dtype], self._runs, start + length
        firsts = runs[:, 3]
        near = runs[: np.searchsorted(firsts, end)]
        near = near[near[:, 3] + near[:, 4] > start]
        firsts = near[:, 3]
        ends = np.minimum(firsts + near[:, 4], end)
        begins = np.maximum.accumulate(np.concatenate(([start], ends[:-1])))[: len(near)]  # that was filled before
        if len(gap := np.flatnonzero(firsts > begins)):
            self._lacks(int(begins[gap[0]]))
        if length and (not len(ends) or int(ends.max()) < end):
            self._lacks(int(ends.max()) if len(ends) else start)
        some = ends > begins
        near, firsts, begins, ends = near[some], firsts[some], begins[some], ends[some]
        table = np.empty((len(near), 4), dtype=np.int64)
        table[:, 0] = near[:, 1]
        table[:, 1] = near[:, 2] + (begins - firsts) * item
        table[:, 2] = table[:, 1] + (ends - begins) * item
        table[:, 3] = (begins - start) * item
        return Runs(table, shards)

    def _of_few(self, start: int, end: int) -> np.ndarray:
        """The same without arrays, which would take longer to make than what is in them."""
        item, at = ITEM_BYTES[self.dtype], start
        rows: list[tuple[int, int, int, int]] = []
        for _, file, begin, first, count in self._runs.tolist():
            if first >= end or first + count <= at:
                continue
            if first > at:
                self._lacks(at)
            last = min(first + count, end)
            rows.append((file, begin + (at - first) * item, begin + (last - first) * item, (at - start) * item))
            at = last
        if at < end:
            self._lacks(at)
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

    def _lacks(self, element: int) -> NoReturn:
        gap = [int(index) for index in np.unravel_index(element, self.shape)] if self.shape else []
        raise DamageError(f"{self.name}: no shard has its element {gap}")

    def _parts(self, shards: Mapping[int, PlannedShard]) -> Found:
        kind, fqn = self.name.split("/", 1)
        item = ITEM_BYTES[self.dtype]
        found: list[tuple[Readable, Entry]] = []
        for _, file, begin, start, length in self._runs.tolist():
            part = Slice(kind, fqn, self.dtype, self.shape, start=start, length=length)
            found.append((shards[file], Entry(part, begin, begin + length * item, False)))
        for file, begin, offsets, lengths in self.boxes:
            part = Slice(kind, fqn, self.dtype, self.shape, offsets=offsets, lengths=lengths)
            found.append((shards[file], Entry(part, begin, begin + part.nbytes, False)))
        return found
