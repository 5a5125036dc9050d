# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of optimizers, and of parameters that stand for other tensors, beside their tensors.

As docs/format/state.md has it under "The state extent": values for typed JSON.
"""

from __future__ import annotations

from typing import Any, TypedDict, final

# Of one group: its hyper-parameters, whatever they are, and `params`, the names of its parameters.
Group = dict[str, Any]

_OfClass = TypedDict("_OfClass", {"class": str})


class KeptElsewhere(TypedDict, total=False):
    """State that is not by parameter."""

    state: dict[str, Any]
    on_device: list[str]
    told: dict[Any, Any]


class _Inside(_OfClass):
    own_state: bool


class Inside(_Inside, KeptElsewhere, total=False):
    """An optimizer inside another."""

    groups: list[Group]


class _Described(_OfClass):
    groups: list[Group]


class DescribedOptimizer(_Described, KeptElsewhere, total=False):
    """One optimizer, as `OptimizerAdapter.describe()` has it; `updates` of one of several, and what `adams` says."""

    inside: dict[str, Inside]
    around: dict[str, KeptElsewhere]
    updates: int
    adam_w_mode: bool
    step_by_group: bool


class _PerParameter(TypedDict):
    scalars: dict[str, dict[str, Any]]
    order: dict[str, list[str]]


@final
class SingleOptimizer(_PerParameter, DescribedOptimizer):
    """All that a checkpoint says of one optimizer."""


@final
class SeveralOptimizers(_PerParameter):
    """Of several, by name."""

    optimizers: dict[str, DescribedOptimizer]


OptimizerState = SingleOptimizer | SeveralOptimizers


class Standing(_OfClass):
    """A parameter that stands for other tensors."""

    context: Any
    size: list[int]
    stride: list[int]
    inner: list[str]
    nested: dict[str, Standing]


class _CarriedCounters(TypedDict):
    counters: dict[str, int]
    window: int
    loss_scale: dict[str, Any] | None
    lr_scheduler: dict[str, Any] | None


class CarriedCounters(_CarriedCounters, total=False):
    """What a DeepSpeed engine had come to (`Framework.carry`). `window`: micro-batches an update."""

    lr_scheduler_class: str
