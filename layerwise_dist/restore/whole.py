"""A commit as whole tensors, whichever ranks wrote which parts of them: for a job that is cut otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, MismatchError
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import contents
from layerwise_dist.restore.filling import fill
from layerwise_dist.restore.planner import Found, ShardSet, replan
from layerwise_dist.storage.reader import Entry, Shard
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import ITEM_BYTES, Slice, ranks_text

OF_MODEL = ("param", "master", "buffer")  # every other kind is of an optimizer's state

_COMPARED_BYTES = 64 << 20  # of two replicas, at once


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """One global tensor: all that was written of it. Several ranks hold it together, or one has it for itself."""

    ranks: tuple[int, ...]
    parts: Found

    @property
    def slice(self) -> Slice:
        """That of one of its parts: kind, fqn, dtype and global shape are the same in all."""
        return self.parts[0][1].slice

    @property
    def dtype(self) -> str:
        return self.slice.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slice.global_shape

    def read(self, start: int, length: int) -> torch.Tensor:
        """Elements of it in row-major order, verified. Raises DamageError or OSError."""
        of = self.slice
        wanted = Slice(of.kind, of.fqn, of.dtype, of.global_shape, start=start, length=length)
        found = torch.empty(length, dtype=DTYPES[of.dtype], device="cpu")
        fill([(found, replan(wanted, self.parts))])
        return found

    @cached_property
    def numel(self) -> int:
        return Slice.whole("", "", self.dtype, self.shape).numel


class Whole:
    """All shards of a commit, and what each rank sealed.

    Attributes:
        sealed: one a saved rank, in the order of ranks.
        tensors: by name; under one name there may be several, such as each rank's own copy of a buffer.
    """

    def __init__(self, manifest: Manifest, shards: ShardSet) -> None:
        """Raises DamageError, also where shards disagree about a tensor; OSError."""
        self.manifest = manifest
        self.sealed: list[SealedState] = []
        held: dict[int, dict[str, Entry]] = {}
        together: dict[str, dict[Sequence[int], Found]] = {}
        for rank in range(manifest.world_size):
            part = contents.read(shards.of(rank), manifest.framework)
            self.sealed.append(part.sealed)
            held[rank] = {name: entry for name, (_, entry) in part.entries.items()}
            for name, (shard, entry) in part.entries.items():
                ranks = contents.gathered(manifest, rank, entry)
                together.setdefault(name, {}).setdefault(ranks, []).append((shard, entry))
        self.tensors = {
            name: [SavedTensor(tuple(ranks), parts) for ranks, parts in found.items()]
            for name, found in together.items()
        }
        if problems := contents.lacking(manifest, held, dict(enumerate(self.sealed))):
            more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise DamageError(f"{problems[0]}{more}")

    @cached_property
    def state_kinds(self) -> dict[str, list[str]]:
        """Kinds of optimizer state that are tensors, by the parameter's fqn."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            kind, fqn = name.split("/", 1)
            if kind not in OF_MODEL:
                found.setdefault(fqn, []).append(kind)
        return found

    def one(self, name: str, rank: int, world_size: int) -> SavedTensor:
        """The tensor of that name, if there is one or all are equal to the bit. Of many copies each of the ranks that
        restore compares some: what one finds, all hear.

        Raises MismatchError where they differ; DamageError; OSError.
        """
        first, *others = self.tensors[name]
        for number, other in enumerate(others):
            if number % world_size == rank and not equal(first, other):
                raise MismatchError(
                    f"{name}: rank(s) {ranks_text(first.ranks) or first.ranks[0]} and "
                    f"{ranks_text(other.ranks) or other.ranks[0]} of the checkpoint hold different ones, and this "
                    "job is cut otherwise, so that nothing says which of them is whose"
                )
        return first


def equal(one: SavedTensor, other: SavedTensor) -> bool:
    """To the bit. By the hashes of blocks where both are cut and laid out alike; only otherwise by reading both.

    Raises DamageError or OSError.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if len(one.parts) == len(other.parts) and all(
        _same_blocks(mine, yours) for mine, yours in zip(one.parts, other.parts, strict=True)
    ):
        return True
    step = _COMPARED_BYTES // ITEM_BYTES[one.dtype]
    return all(
        torch.equal(
            one.read(start, min(step, one.numel - start)).view(torch.uint8),
            other.read(start, min(step, one.numel - start)).view(torch.uint8),
        )
        for start in range(0, one.numel, step)
    )


def _same_blocks(mine: tuple[Shard, Entry], yours: tuple[Shard, Entry]) -> bool:
    one, other = mine[1].slice, yours[1].slice
    place = (one.offsets, one.lengths, one.start, one.length)
    if place != (other.offsets, other.lengths, other.start, other.length):
        return False
    seen = _blocks(*mine)
    return seen is not None and seen == _blocks(*yours)


def _blocks(shard: Shard, entry: Entry) -> tuple[int, list[tuple[int, int]]] | None:
    """Where an entry begins in its first block, and length and hash of each block that has some of it."""
    index = shard.index
    if not index.hashed or entry.begin == entry.end:
        return None
    first, last = index.blocks.at(entry.begin), index.blocks.at(entry.end - 1)
    found = []
    for number in range(first, last + 1):
        value = index.hashes[number]
        if value is None:
            return None
        found.append((index.blocks[number][1], value))
    return entry.begin - index.blocks[first][0], found
