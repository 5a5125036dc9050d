# SPDX-License-Identifier: Apache-2.0
"""What one engine lends another for a single checkpoint: the same objects, which the other neither hooks nor ends."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.boundary import Boundary
from layerwise_dist.loop.objects import StateObjects


class Loan(NamedTuple):
    """All that another engine needs to save what its owner does. `updates`: how many the job has made."""

    framework: Framework
    optimizer: OptimizerAdapter
    objects: StateObjects
    boundary: Boundary
    updates: int


def lend(
    framework: Framework, optimizer: OptimizerAdapter, objects: StateObjects, boundary: Boundary, updates: int
) -> Loan:
    """Of what an engine trains and counts, for another engine that saves it once."""
    return Loan(
        cast(Framework, _Lent(framework)),
        cast(OptimizerAdapter, _Lent(optimizer)),
        cast(StateObjects, _Lent(objects)),
        cast(Boundary, _Lent(boundary)),
        updates,
    )


class _Lent:
    """`thing`, but for what would hook the training or let go of it."""

    roots: tuple[Any, ...] = ()  # of a framework: nothing is trained meanwhile

    def __init__(self, thing: object) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)

    def forward_modules(self) -> list[Any]:
        return []

    def gradient_ready_params(self) -> list[Any]:
        return []

    def watch(self, events: Any) -> None:
        pass

    def detach(self) -> None:
        pass

    def close(self, **_: Any) -> bool:
        return False
