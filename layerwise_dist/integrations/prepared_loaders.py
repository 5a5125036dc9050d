# SPDX-License-Identifier: Apache-2.0
"""What Accelerate makes of a DataLoader, for the integrations whose loops draw from one: its own, and the Trainer's.

Nothing of Accelerate is imported here: a Trainer's loader may be a plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from layerwise_dist.errors import UnsupportedError


def base_of(loader: Any, name: str) -> DataLoader[Any]:
    """The DataLoader that draws the batches: within what `accelerator.prepare()` returned, or the loader itself.

    Raises UnsupportedError for one from which only rank 0 draws.
    """
    kind = type(loader)  # isinstance() asks `__class__`, by which Accelerate's loaders say that they are torch's
    if not f"{kind.__module__}.".startswith("accelerate."):
        return loader
    if kind.__name__ != "DataLoaderShard":
        raise UnsupportedError(
            f"loader {name!r} is Accelerate's {kind.__name__}, from which only rank 0 draws, for all: set "
            'dispatch_batches to False (accelerator_config={"dispatch_batches": False} of TrainingArguments)'
        )
    base: DataLoader[Any] = loader.base_dataloader
    bring_generator(base)
    return base


def seedable_sampler(loader: DataLoader[Any]) -> Any:
    """Accelerate's `SeedableRandomSampler` in it, whose `initial_seed` decides the order beside the epoch; or None."""
    found: Any = loader.batch_sampler or loader.sampler
    for _ in range(4):  # BatchSamplerShard around BatchSampler around the sampler
        if found is None or hasattr(found, "initial_seed"):
            return found
        found = getattr(found, "batch_sampler", None) or getattr(found, "sampler", None)
    return None


def bring_generator(loader: DataLoader[Any]) -> None:
    """As the first pass of a seedable sampler makes it: a new process has none yet, where the old one had one."""
    sampler = seedable_sampler(loader)
    if sampler is not None and sampler.generator is None:
        sampler.generator = torch.Generator(torch.get_default_device()).manual_seed(sampler.initial_seed)
