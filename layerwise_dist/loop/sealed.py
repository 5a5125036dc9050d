# SPDX-License-Identifier: Apache-2.0
"""What a boundary seals beside tensors: the types of the state extent (docs/format/state.md), values for typed JSON.

`capture/sealed.py` takes it, `restore/sealed_state.py` reads it and checks that it is so.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from torch import Tensor

from layerwise_dist.frameworks.described import OptimizerState, Standing


class _RngState(TypedDict):
    torch: Tensor
    cuda: dict[int, Tensor]
    python: tuple[Any, ...]


class RngState(_RngState, total=False):
    """The global generators (`rng.py`); `numpy` where it is installed."""

    numpy: tuple[Any, ...] | dict[str, Any]


class GeneratorStates(TypedDict):
    """`own`: of a loader and its samplers, by where they sit in it."""

    rng: RngState
    own: dict[str, Tensor]


class LoaderNow(TypedDict):
    own: dict[str, Tensor]
    epochs: dict[str, int]


class ElasticPosition(TypedDict):
    """Where an epoch stands that an ElasticDistributedSampler deals out (`elastic.py`).

    `begin` and `position`: samples of all ranks, where this iteration began and where it is. `draws`: batches of this
    rank since. `samples`, `seed`, `shuffle`: what decides the order, beside the epoch.
    """

    begin: int
    draws: int
    position: int
    batch_size: int | None
    samples: int
    seed: int
    shuffle: bool


class _CountedLoader(TypedDict):
    kind: Literal["counted"]
    iterating: bool
    draws: int
    start: GeneratorStates | None
    first: GeneratorStates | None
    later: dict[int, GeneratorStates]
    again: bool
    now: LoaderNow


class CountedLoader(_CountedLoader, total=False):
    """Where a loader stands whose batches are counted (`loaders.py`). `replicas`: to how many a DistributedSampler
    deals the samples out. `ahead`: the generators before the batch that comes next, where the loop had drawn it already
    (`placed.py`).
    """

    ahead: RngState
    replicas: int
    elastic: ElasticPosition


class _StatefulLoader(TypedDict):
    kind: Literal["stateful"]
    iterating: bool
    start: GeneratorStates | None
    state: Any
    now: LoaderNow


class StatefulLoader(_StatefulLoader, total=False):
    """Where a loader stands that tells by itself."""

    ahead: RngState
    replicas: int
    elastic: ElasticPosition


LoaderState = CountedLoader | StatefulLoader


class _BoundaryState(TypedDict):
    kind: Literal["explicit", "loader", "inferred", "call"]
    rng: RngState
    rng_event: Literal["boundary", "draw"]
    rng_after: RngState | None
    at: list[str]
    loaders: dict[str, LoaderState]


class BoundaryState(_BoundaryState, total=False):
    """As `mark.BoundaryMark.state()`."""

    starts: list[str]


class _SealedState(TypedDict):
    step: int
    updates: int
    boundary: BoundaryState
    objects: dict[str, Any]
    client_state: dict[Any, Any] | None
    optimizer: OptimizerState
    wrapper: Any
    gradients: list[str]
    extra_state: dict[str, Any]


class PacedSeconds(TypedDict):
    """As `interval.Costs` has them, newest last."""

    step_s: list[float]
    checkpoint_s: list[float]
    write_s: list[float]
    disk_s: list[float]


class PacedCosts(TypedDict):
    """What checkpoints of a job of so many ranks were found to cost."""

    ranks: int
    seconds: PacedSeconds


class Paced(TypedDict, total=False):
    """Where the interval follows what checkpoints cost: steps between them; and on rank 0, what they cost."""

    interval: int
    costs: PacedCosts


class SealedState(_SealedState, Paced, total=False):
    """All of it. `standing`: parameters that stand for others, by fqn. `aliases`: further names of tied ones.
    `classes`: of the LR schedulers and GradScalers in `objects`, by name.
    """

    classes: dict[str, str]
    aliases: dict[str, list[str]]
    standing: dict[str, Standing]
