# SPDX-License-Identifier: Apache-2.0
"""A commit as whole tensors, whichever ranks wrote their parts: for a job with another cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import contents
from layerwise_dist.restore.filling import fill
from layerwise_dist.restore.planned import Readable
from layerwise_dist.restore.planner import Found, ShardSet, replan
from layerwise_dist.storage.reader import Entry
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import ITEM_BYTES, Slice

_COMPARED_BYTES = 64 << 20  # of two replicas, at once
SMALL_BYTES = 64 << 10  # of a tensor that is compared by its bytes, read together with others
_NOTHING_READ: Mapping[int, torch.Tensor] = {}


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
        found = torch.empty(length, dtype=DTYPES[self.dtype], device="cpu")
        fill([(found, replan(self.range(start, length), self.parts))])
        return found

    def range(self, start: int, length: int) -> Slice:
        """Elements of it in row-major order."""
        of = self.slice
        return Slice(of.kind, of.fqn, of.dtype, of.global_shape, start=start, length=length)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all of it, however many parts it is in."""
        return self.numel * ITEM_BYTES[self.dtype]


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
        together: dict[str, dict[Sequence[int], list[tuple[Readable, Entry]]]] = {}
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
        return contents.state_kinds(self.tensors)


def read_all(tensors: Sequence[SavedTensor]) -> dict[int, torch.Tensor]:
    """All elements of each, in one dimension, by identity: many small ones of a shard lie in one block, which is read
    once. Raises DamageError or OSError.
    """
    each = {id(tensor): tensor for tensor in tensors}  # the first of many copies comes often
    found = {key: torch.empty(of.numel, dtype=DTYPES[of.dtype], device="cpu") for key, of in each.items()}
    fill((found[key], replan(of.range(0, of.numel), of.parts)) for key, of in each.items())
    return found


def surely_equal(one: SavedTensor, other: SavedTensor) -> bool:
    """By the hashes of blocks, where both are cut and laid out alike."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and (
        len(one.parts) == len(other.parts)
        and all(_same_blocks(mine, yours) for mine, yours in zip(one.parts, other.parts, strict=True))
    )


def equal(one: SavedTensor, other: SavedTensor, read: Mapping[int, torch.Tensor] = _NOTHING_READ) -> bool:
    """To the bit. By the hashes of blocks where both are cut and laid out alike; only otherwise by reading both.

    `read` are elements of such tensors, by identity. Raises DamageError or OSError.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if surely_equal(one, other):
        return True
    if id(one) in read and id(other) in read:
        return torch.equal(read[id(one)].view(torch.uint8), read[id(other)].view(torch.uint8))
    step = _COMPARED_BYTES // ITEM_BYTES[one.dtype]
    return all(
        torch.equal(
            one.read(start, min(step, one.numel - start)).view(torch.uint8),
            other.read(start, min(step, one.numel - start)).view(torch.uint8),
        )
        for start in range(0, one.numel, step)
    )


def first_unlike(copies: Mapping[str, Sequence[SavedTensor]]) -> dict[str, tuple[SavedTensor, SavedTensor]]:
    """Of each name whose copies are not all equal, the first and one that differs. Raises DamageError or OSError."""
    pairs = [(name, found[0], other) for name, found in copies.items() for other in found[1:]]
    unsure = [each for each in pairs if not surely_equal(each[1], each[2])]
    small = read_all([tensor for _, *pair in unsure for tensor in pair if tensor.nbytes <= SMALL_BYTES])
    found: dict[str, tuple[SavedTensor, SavedTensor]] = {}
    for name, one, other in unsure:
        if name not in found and not equal(one, other, small):
            found[name] = one, other
    return found


def _same_blocks(mine: tuple[Readable, Entry], yours: tuple[Readable, Entry]) -> bool:
    if mine[1].slice.cut != yours[1].slice.cut:
        return False
    seen = blocks_of(*mine)
    return seen is not None and seen == blocks_of(*yours)


def blocks_of(shard: Readable, entry: Entry) -> tuple[int, list[tuple[int, int]]] | None:
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
