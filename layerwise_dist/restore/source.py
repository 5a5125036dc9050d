# SPDX-License-Identifier: Apache-2.0
"""The source of a plan for another cut: a commit as whole tensors, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from layerwise_dist.errors import MismatchError
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore.filling import fill
from layerwise_dist.restore.planner import ByteRange, replan
from layerwise_dist.restore.whole import Whole, first_unlike
from layerwise_dist.tensors.slices import Slice, ranks_text


class SourceTensor(Protocol):
    """A whole tensor of a commit."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """A commit as whole tensors: `Gathered`, whose headers the ranks of a job read together, or
    `ReadAlone`."""

    @property
    def sealed(self) -> Sequence[SealedState]:
        """What each rank of the checkpoint sealed, by rank."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """By name; of several copies under one name the first."""

    @property
    def state_kinds(self) -> Mapping[str, Sequence[str]]:
        """Kinds of optimizer state that are tensors, by the parameter's fqn."""

    def spans(self, name: str, wanted: Slice) -> Sequence[ByteRange]:
        """What fills `wanted`, of the tensor's shape and the file's dtype. Raises DamageError where it is not there."""

    def fill(self, reads: Iterable[tuple[torch.Tensor, Sequence[ByteRange]]]) -> None:
        """Host memory from `spans` of tensors without dimensions. Raises DamageError or OSError."""

    def differs(self, name: str) -> bool:
        """Whether ranks hold different tensors under this name. Raises DamageError or OSError."""

    def refuse_unlike(self, needed: Callable[[str], bool]) -> None:
        """Raises MismatchError where copies of a tensor of a kind that is `needed` are not equal to the bit."""


class ReadAlone:
    """A commit that one process reads by itself, as a `Source`. Where several load one model together, each of them
    compares a part of the copies: what one finds, all hear.
    """

    def __init__(self, whole: Whole, rank: int, world_size: int) -> None:
        self._whole, self._rank, self._world_size = whole, rank, world_size
        self.sealed: Sequence[SealedState] = whole.sealed
        self.tensors = {name: found[0] for name, found in whole.tensors.items()}
        self.state_kinds = whole.state_kinds

    def spans(self, name: str, wanted: Slice) -> list[ByteRange]:
        return replan(wanted, self.tensors[name].parts)

    def fill(self, reads: Iterable[tuple[torch.Tensor, Sequence[ByteRange]]]) -> None:
        fill(reads)

    def differs(self, name: str) -> bool:
        return bool(first_unlike({name: self._whole.tensors[name]}))

    def refuse_unlike(self, needed: Callable[[str], bool]) -> None:
        several = {
            name: found
            for name, found in self._whole.tensors.items()
            if len(found) > 1 and needed(name.split("/", 1)[0])
        }
        mine = sorted(several)[self._rank :: self._world_size]
        for name, (one, other) in first_unlike({name: several[name] for name in mine}).items():
            raise MismatchError(unlike_words(name, one.ranks, other.ranks))


def unlike_words(name: str, one: Sequence[int], other: Sequence[int]) -> str:
    return (
        f"{name}: rank(s) {ranks_text(one) or one[0]} and {ranks_text(other) or other[0]} of the checkpoint hold "
        "different ones, and this job has another cut, so nothing says which of them is whose"
    )
