# SPDX-License-Identifier: Apache-2.0
"""A quick check whether any live tensor of this rank came, went or moved since the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.frameworks.contents import Contents
from layerwise_dist.frameworks.framework import Framework, ParamView, same_objects
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.tensors.geometry import Geometry


@dataclass(frozen=True, slots=True)
class StateGlance:
    """The optimizer's state at a glance. `addressed` are those of its values that are tensors with an address."""

    states: list[Mapping[str, Any]]
    contents: Contents
    addressed: list[torch.Tensor]
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Glance:
    """The very objects that a survey was made of; `geometry` is that of parameters and buffers."""

    copying: frozenset[str]
    held: StateGlance
    params: list[ParamView]
    buffers: list[tuple[str, torch.Tensor]]
    geometry: Geometry


def glance_at(
    framework: Framework, optimizer: OptimizerAdapter, copying: frozenset[str], last: Glance | None
) -> Glance:
    """`last`, if all tensors are the same objects in the same places: only state that is no tensor may have another
    value. `copying` is as `Surveyor.look`'s.
    """
    framework.follow()
    states = optimizer.states(framework.params)
    held = last.held if last is not None else None
    if held is None or states is not held.states:
        held = _hold(framework, states, held)
    buffers = framework.buffers()
    tensors = [*framework.params_in_memory(), *framework.in_memory([buffer for _, buffer in buffers])]
    if (
        last is not None
        and last.copying == copying
        and last.held is held
        and last.params is framework.params
        and last.buffers is buffers
        and last.geometry.is_of(tensors)
    ):
        return last
    return Glance(copying, held, framework.params, buffers, Geometry(tensors))


def _hold(framework: Framework, states: list[Mapping[str, Any]], last: StateGlance | None) -> StateGlance:
    """`last`, if nothing but values of state that is no tensor has changed."""
    if (
        last is not None
        and same_objects(states, last.states)
        and _same_tensors(last.contents, states)
        and last.geometry.is_of(framework.in_memory(last.addressed))
    ):
        return last
    contents = Contents(states)
    addressed = [*filter(has_address, contents.values)]
    return StateGlance(states, contents, addressed, Geometry(framework.in_memory(addressed)))


def _same_tensors(contents: Contents, states: list[Mapping[str, Any]]) -> bool:
    """Whether the states have what they had, but for values that neither were nor are tensors."""
    others = contents.others(states)
    return others is not None and not any(
        has_address(contents.values[place]) or has_address(value) for place, value in others
    )


def has_address(value: object) -> bool:
    """Whether it is a tensor with an address and strides. Others the survey refuses."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested
