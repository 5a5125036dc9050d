# SPDX-License-Identifier: Apache-2.0
"""The generators that decide what a DataLoader yields: the global ones, and its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from layerwise_dist.data import ElasticDistributedSampler
from layerwise_dist.errors import MismatchError
from layerwise_dist.loop import rng
from layerwise_dist.loop.sealed import GeneratorStates

# These draw from the global generators at the first index only, so later draws need no watching.
_DRAW_ONCE = (
    SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler,
    ElasticDistributedSampler,
)  # fmt: skip


class Generators:
    """Of one loader; `name` is how messages call it. A state is {"rng": RngState, "own": state of each own one}."""

    def __init__(self, loader: DataLoader[Any], name: str) -> None:
        self._loader, self._name = loader, name

    def take(self) -> GeneratorStates:
        return {"rng": rng.take(), "own": self.take_own()}

    def take_own(self) -> dict[str, torch.Tensor]:
        return {name: each.get_state() for name, each in self._own().items()}

    def put(self, state: GeneratorStates) -> None:
        """Raises MismatchError as `check_own`."""
        rng.put(state["rng"])
        self.put_own(state["own"])

    def put_own(self, states: dict[str, torch.Tensor]) -> None:
        """Raises MismatchError as `check_own`."""
        self.check_own(states)
        own = self._own()
        for name, state in states.items():
            own[name].set_state(state)

    def check_own(self, states: dict[str, torch.Tensor]) -> None:
        """Raises MismatchError if the loader has other generators than these states are of."""
        own = self._own()
        if own.keys() != states.keys():
            raise MismatchError(
                f"loader {self._name!r} has generators {sorted(own)}, the checkpoint's had {sorted(states)}"
            )

    @property
    def own_order(self) -> bool:
        """Does the order come from the sampler's own generator or from none at all?"""
        sampler = self._loader.sampler
        return (
            isinstance(sampler, (SequentialSampler, DistributedSampler))
            or getattr(sampler, "generator", None) is not None
        )

    def _own(self) -> dict[str, torch.Generator]:
        found: dict[str, torch.Generator] = {}
        for name, owner in samplers(self._loader).items():
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and all(generator is not each for each in found.values()):
                found[name] = generator
        return found


def same(one: GeneratorStates, other: GeneratorStates) -> bool:
    """Would a loader draw the same from both states?"""
    return rng.same(one["rng"], other["rng"]) and alike_own(one["own"], other["own"])


def alike_own(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Are these the same own generators in the same states?"""
    return one.keys() == other.keys() and all(torch.equal(state, other[name]) for name, state in one.items())


def derived(state: torch.Tensor, *salt: int | str) -> torch.Tensor:
    """The state of a new CPU generator, which this one's state and the salt decide: 5,056 bytes."""
    return torch.Generator().manual_seed(rng.seed_of(state.numpy().tobytes(), *salt)).get_state()


def samplers(loader: DataLoader[Any]) -> dict[str, Any]:
    """Everything that decides the order, by where it sits in the loader."""
    batches = loader.batch_sampler
    inner = getattr(batches, "sampler", None)
    if inner is None:  # Accelerate's shard of a BatchSampler, which one process does without
        inner = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
    return {"loader": loader, "sampler": loader.sampler, "batch_sampler": batches, "batch_sampler.sampler": inner}


def epochs(loader: DataLoader[Any]) -> dict[str, int]:
    owners = samplers(loader).items()
    return {
        name: owner.epoch
        for name, owner in owners
        if hasattr(owner, "set_epoch") and isinstance(getattr(owner, "epoch", None), int)
    }


def draws_once(sampler: Any) -> bool:
    if type(sampler) is BatchSampler:
        return type(sampler.sampler) in _DRAW_ONCE
    return type(sampler) in _DRAW_ONCE
