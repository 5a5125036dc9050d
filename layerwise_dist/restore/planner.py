"""Which bytes of which shards fill which slices. Whole tensors and equal slices now; re-slicing has its place here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from layerwise_dist.errors import MismatchError
from layerwise_dist.slices import ITEM_BYTES, Slice, cover
from layerwise_dist.storage.reader import Entry, Shard


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `begin` to `end` of a shard go to `offset` bytes into the wanted slice."""

    shard: Shard
    begin: int
    end: int
    offset: int


class ShardSet:
    """The shards of one commit, opened when first needed; this rank's own first.

    Each comes with the frozen parameters that it refers to, which are as good as in it.
    """

    def __init__(self, own: int, open_shards: Callable[[int], Sequence[Shard]]) -> None:
        """`open_shards(rank)` gives that rank's shard, then its base if it has one."""
        self._own, self._open_shards = own, open_shards
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


def plan(wanted: Slice, found: list[tuple[Shard, Entry]]) -> list[Span]:
    """Raises MismatchError when the entries do not give exactly the wanted slice."""
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
                f"{wanted.name}: in the checkpoint {_held(entry.slice.among)}, here {_held(wanted.among)}: restoring "
                "into other groups of ranks is not supported by this version"
            )
    if not wanted.numel and wanted.is_flat:
        return []
    for shard, entry in found:
        if entry.slice == wanted:
            return [Span(shard, entry.begin, entry.end, 0)]
    item = ITEM_BYTES[wanted.dtype]
    if wanted.is_whole:
        flat = [(shard, entry) for shard, entry in found if entry.slice.is_flat]
        ranges = [(entry.slice.start, entry.slice.start + entry.slice.numel) for _, entry in flat]
        taken, filled = cover(ranges, wanted.numel)
        if filled == wanted.numel:
            spans = []
            for number, begin, end in taken:
                shard, entry = flat[number]
                first = entry.begin + (begin - ranges[number][0]) * item
                spans.append(Span(shard, first, first + (end - begin) * item, begin * item))
            return spans
    places = "; ".join(f"rank {shard.index.rank}: {entry.slice.place()}" for shard, entry in found[:4])
    raise MismatchError(
        f"{wanted.name}: this rank needs {wanted.place()}, the checkpoint is cut otherwise ({places}); "
        "restoring into another sharding is not supported by this version"
    )


def _held(among: str) -> str:
    return f"ranks {among} hold it together" if among else "each rank has its own"
