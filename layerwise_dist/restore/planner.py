# SPDX-License-Identifier: Apache-2.0
"""Plans which bytes of the shards fill which slices: in the same cut (`plan`), or in any (`replan`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerwise_dist.errors import DamageError, MismatchError
from layerwise_dist.restore.planned import Readable
from layerwise_dist.restore.reslice import copies
from layerwise_dist.storage.reader import Entry, Shard
from layerwise_dist.tensors.slices import ITEM_BYTES, Slice


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `begin` to `end` of a shard go to `offset` bytes into the wanted slice.

    With a `shape` only some of them do: elements of that shape, `strides` apart in the file from `begin` on, and
    `target_strides` apart in the slice from `offset` on, both in elements.
    """

    shard: Readable
    begin: int
    end: int
    offset: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    target_strides: tuple[int, ...] = ()


class Runs(Sequence[ByteRange]):
    """Byte ranges without a shape, kept as numbers: a job of hundreds of ranks has hundreds of them for each tensor.

    Attributes:
        table: int64 [n, 4]: the number of the file, and begin, end and offset as a `ByteRange` has them.
    """

    def __init__(self, table: np.ndarray, shards: Mapping[int, Readable]) -> None:
        """`shards` by number."""
        self.table, self._shards = table, shards

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Runs(self.table[at], self._shards)
        return self._span(*self.table[at].tolist())

    def __iter__(self) -> Iterator[ByteRange]:
        return (self._span(*row) for row in self.table.tolist())

    def _span(self, file: int, begin: int, end: int, offset: int) -> ByteRange:
        return ByteRange(self._shards[file], begin, end, offset)


class ShardSet:
    """The shards of one commit, opened when first needed; this rank's own first.

    Each comes with the frozen parameters that it refers to, which are as good as in it.
    """

    def __init__(self, own: int, open_shards: Callable[[int], Sequence[Shard]], *, shared: bool = True) -> None:
        """`open_shards(rank)` gives that rank's shard, then its base if it has one. `shared`: each rank sees those of
        all ranks.
        """
        self._own, self._open_shards, self.shared = own, open_shards, shared
        self._open: dict[int, Sequence[Shard]] = {}

    def of(self, rank: int) -> Sequence[Shard]:
        if rank not in self._open:
            self._open[rank] = self._open_shards(rank)
        return self._open[rank]

    @property
    def own(self) -> Sequence[Shard]:
        return self.of(self._own)

    def others(self, ranks: Iterable[int]) -> Iterable[Sequence[Shard]]:
        """Those of these ranks, without its own, in the order of ranks."""
        return (self.of(rank) for rank in sorted(ranks) if rank != self._own)

    def close(self) -> None:
        """Those that were opened. Safe to call twice."""
        for shards in self._open.values():
            for shard in shards:
                shard.close()


Found = Sequence[tuple[Readable, Entry]]


def plan(wanted: Slice, found: Found, more: Callable[[], Found] | None = None) -> list[ByteRange]:
    """`more` gives the entries of shards that are opened only if `found` is not enough.

    Raises MismatchError when the entries do not give exactly the wanted slice, or are of tensors that are cut or shared
    otherwise.
    """
    if not found:
        raise MismatchError(f"{wanted.name} is missing from the checkpoint")
    for _, entry in found:
        if entry.slice.dtype != wanted.dtype or entry.slice.global_shape != wanted.global_shape:
            raise MismatchError(
                f"{wanted.name}: the checkpoint has {entry.slice.dtype}{list(entry.slice.global_shape)}, "
                f"the model {wanted.dtype}{list(wanted.global_shape)}"
            )
    for _, entry in found:
        if entry.slice.among != wanted.among:
            raise MismatchError(
                f"{wanted.name}: in the checkpoint {_held(entry.slice.among)}, here {_held(wanted.among)}"
            )
    # An equal slice first: it is one read. Then this rank's own, and the others as they come.
    found = sorted(found, key=lambda each: each[1].slice != wanted)
    shard, entry = found[0]
    if entry.slice == wanted:  # as all are in a job that is cut as it was: without a look at boxes
        return [ByteRange(shard, entry.begin, entry.end, 0)] if wanted.numel else []
    if wanted.is_flat and wanted.numel:
        # Tensors of one flat tensor share what is not cut, such as the step of their state.
        raise MismatchError(
            f"{wanted.name}: this rank needs {wanted.place()}, the checkpoint has another cut ({_places(found)})"
        )
    spans, gap = _spans(wanted, found)
    if gap is not None and more is not None and (further := more()):
        return plan(wanted, [*found, *further])
    if gap is not None:
        raise MismatchError(
            f"{wanted.name}: this rank needs {wanted.place()}, and no shard that it may read has element {list(gap)} "
            f"({_places(found)})"
        )
    return spans


def replan(wanted: Slice, found: Found) -> list[ByteRange]:
    """Out of all that was written of a tensor, by whichever ranks. Offsets are those of a slice of the file's dtype,
    whatever `wanted` has. An equal slice comes first: it is one read.

    REQUIRES: all are of one tensor, of this shape. Raises DamageError if they do not have all of what is wanted.
    """
    ordered = sorted(found, key=lambda each: each[1].slice.cut != wanted.cut)
    spans, gap = _spans(wanted, ordered)
    if gap is not None:
        raise DamageError(f"{found[0][1].slice.name}: no shard has its element {list(gap)} ({_places(found)})")
    return spans


def _spans(wanted: Slice, found: Found) -> tuple[list[ByteRange], tuple[int, ...] | None]:
    parts, gap = copies(wanted, [entry.slice for _, entry in found])
    item = ITEM_BYTES[found[0][1].slice.dtype]
    spans = []
    for part in parts:
        shard, entry = found[part.number]
        begin, end = part.span
        place = (shard, entry.begin + begin * item, entry.begin + end * item, part.target * item)
        strided = () if part.straight else (part.shape, part.source_strides, part.target_strides)
        spans.append(ByteRange(*place, *strided))
    return spans, gap


def _places(found: Found) -> str:
    return "; ".join(f"rank {shard.index.rank}: {entry.slice.place()}" for shard, entry in found[:4])


def _held(among: str) -> str:
    return f"ranks {among} hold it together" if among else "each rank has its own"
