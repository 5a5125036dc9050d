# SPDX-License-Identifier: Apache-2.0
"""Where the data of somebody else's loop stands, and the way back: a torch DataLoader, or Accelerate's around one.

Accelerate's `DataLoaderShard` draws one batch ahead of the one that it gives, to know which is the last. So at a
boundary its DataLoader has drawn the first batch of the next iteration already. What counts is how all stood just
before that draw: the position, and the random numbers that a dataset or a collator draws for it. A resume goes back to
there, lets that batch be drawn again, and only then puts back the random numbers of the boundary.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch.utils.data import DataLoader

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.loop import loose, rng
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.loop.sealed import LoaderState, RngState


class Stand(TypedDict):
    """Within an epoch. `rng`: before the batch that is drawn ahead; None where none is."""

    loader: LoaderState
    rng: RngState | None


class Place:
    """Of one loader, from the constructor until `detach`. Belongs to the training thread."""

    def __init__(self, loader: Any, name: str) -> None:
        """Raises UnsupportedError for a loader whose position nobody can tell."""
        self._loader = base_of(loader, name)
        self._ahead = self._loader is not loader
        self._tap = LoaderTap(self._loader, name, on_draw=self._drawing)
        self._before: Stand | None = None
        self._put: list[RngState] = []  # at the next draws, one each
        loose.leave_alone(self._loader)

    def stand(self) -> Stand:
        """At a boundary within an epoch, before anything more is drawn."""
        if not self._ahead:
            return {"loader": self._tap.snapshot(), "rng": None}
        assert self._before is not None, "within an epoch something was drawn"
        return self._before

    def go_on(self, stand: Stand, at_boundary: RngState) -> None:
        """The next `iter()` of the loader continues from there, and what is drawn after it finds the random numbers of
        the boundary. Raises MismatchError if this is another kind of loader.
        """
        self._tap.restore(stand["loader"])
        self._put = [at_boundary] if stand["rng"] is None else [stand["rng"], at_boundary]

    @property
    def doubt(self) -> str | None:
        """Why a resume may not draw the same, if so."""
        return self._tap.doubt

    def detach(self) -> None:
        self._tap.detach()

    def _drawing(self, tap: LoaderTap, by_for: bool) -> None:
        if self._put:
            rng.put(self._put.pop(0))
        if self._ahead:
            self._before = {"loader": tap.snapshot(), "rng": rng.take()}


def base_of(loader: Any, name: str) -> DataLoader[Any]:
    """The DataLoader that draws the batches. Raises UnsupportedError."""
    kind = type(loader)  # isinstance() asks `__class__`, by which Accelerate's loaders say that they are torch's
    if f"{kind.__module__}.".startswith("accelerate."):
        if kind.__name__ != "DataLoaderShard":
            raise UnsupportedError(
                f"loader {name!r} is Accelerate's {kind.__name__}, which only rank 0 draws from, for all: set "
                'dispatch_batches to False (accelerator_config={"dispatch_batches": False} of TrainingArguments)'
            )
        base: DataLoader[Any] = loader.base_dataloader
        _bring_generator(base)
        return base
    return loader


def seed_of_order(loader: Any) -> int | None:
    """What decides the order of Accelerate's `SeedableRandomSampler`, beside the epoch; None if it has none."""
    return getattr(_seedable(base_of(loader, "train")), "initial_seed", None)


def _seedable(loader: DataLoader[Any]) -> Any:
    found: Any = loader.batch_sampler or loader.sampler
    for _ in range(4):  # BatchSamplerShard around BatchSampler around the sampler
        if found is None or hasattr(found, "initial_seed"):
            return found
        found = getattr(found, "batch_sampler", None) or getattr(found, "sampler", None)
    return None


def _bring_generator(loader: DataLoader[Any]) -> None:
    """It makes its generator in its first iteration, so that a new process had none where the old one had one."""
    sampler = _seedable(loader)
    if sampler is not None and sampler.generator is None:
        sampler.generator = torch.Generator(torch.get_default_device())
        sampler.generator.manual_seed(sampler.initial_seed)
