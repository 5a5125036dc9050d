"""Which bytes of which shards fill which slices. Whole tensors and equal slices now; re-slicing has its place here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from layerwise_dist.errors import MismatchError
from layerwise_dist.slices import ITEM_BYTES, Slice
from layerwise_dist.storage.reader import Entry, Shard


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `begin` to `end` of rank `rank`'s shard go to `offset` bytes into the wanted slice."""

    rank: int
    begin: int
    end: int
    offset: int


class ShardSet:
    """The shards of one commit, opened when first needed; this rank's own first."""

    def __init__(self, own: int, world_size: int, open_shard: Callable[[int], Shard]) -> None:
        self._own, self._world_size, self._open_shard = own, world_size, open_shard
        self._open: dict[int, Shard] = {}

    def shard(self, rank: int) -> Shard:
        if rank not in self._open:
            self._open[rank] = self._open_shard(rank)
        return self._open[rank]

    @property
    def own(self) -> Shard:
        return self.shard(self._own)

    def others(self) -> Iterable[tuple[int, Shard]]:
        return ((rank, self.shard(rank)) for rank in range(self._world_size) if rank != self._own)

    def find(self, name: str, *, alone: bool) -> list[tuple[int, Entry]]:
        """All entries of that name, this rank's first; with `alone`, only this rank's."""
        found = [(self._own, self.own.index.entries.get(name))]
        if not alone:
            found += [(rank, shard.index.entries.get(name)) for rank, shard in self.others()]
        return [(rank, entry) for rank, entry in found if entry is not None]


def plan(wanted: Slice, found: list[tuple[int, Entry]]) -> list[Span]:
    """Raises MismatchError when the entries do not give exactly the wanted slice."""
    if not found:
        raise MismatchError(f"{wanted.name} is missing from the checkpoint")
    for _, entry in found:
        if entry.slice.dtype != wanted.dtype or entry.slice.global_shape != wanted.global_shape:
            raise MismatchError(
                f"{wanted.name}: the checkpoint has {entry.slice.dtype}{list(entry.slice.global_shape)}, "
                f"the model {wanted.dtype}{list(wanted.global_shape)}"
            )
    if not wanted.numel and wanted.is_flat:
        return []
    for rank, entry in found:
        if entry.slice == wanted:
            return [Span(rank, entry.begin, entry.end, 0)]
    item = ITEM_BYTES[wanted.dtype]
    ranges = sorted((entry.slice.start, rank, entry) for rank, entry in found if entry.slice.start is not None)
    if wanted.is_whole and ranges:
        spans, filled = [], 0
        for start, rank, entry in ranges:
            if start == filled:
                spans.append(Span(rank, entry.begin, entry.end, start * item))
                filled += entry.slice.numel
        if filled == wanted.numel:
            return spans
    places = "; ".join(f"rank {rank}: {entry.slice.place()}" for rank, entry in found[:4])
    raise MismatchError(
        f"{wanted.name}: this rank needs {wanted.place()}, the checkpoint is cut otherwise ({places}); "
        "restoring into another sharding is not supported by this version"
    )
