# SPDX-License-Identifier: Apache-2.0
"""Parameters in flat tensors: which part belongs to which, and optimizer state by parameter.

A *unit* is one tensor in an optimizer's groups that holds parts of one or more parameters, as FSDP1's flat parameters
and ZeRO's partitions do. Its optimizer state has its shape, or is a scalar.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks import adams
from layerwise_dist.frameworks.contents import Contents
from layerwise_dist.frameworks.framework import Framework, ParamView, same_objects
from layerwise_dist.frameworks.nested import NO_STATE, Nest
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.param_groups import adopt_groups, check_groups, in_order
from layerwise_dist.tensors.geometry import Geometry
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import Slice


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `start` to `start + length` of a parameter (row-major), from element `offset` of unit `unit` on.

    `length` is 0 for a parameter of the unit that this rank holds nothing of.
    """

    unit: int
    start: int
    offset: int
    length: int


class FlatFramework(Framework):
    """A framework whose optimizer holds units. `fragments` are of the parameters that lie in one, by name."""

    whole = opens = False
    fragments: dict[str, Fragment]

    def unit(self, number: int) -> torch.Tensor:
        """The very tensor that the optimizer holds, as it is now."""
        raise NotImplementedError

    def views_in(self, number: int) -> Sequence[ParamView]:
        """The parameters that a unit holds parts of, in its order."""
        raise NotImplementedError

    def unit_of(self, view: ParamView) -> int:
        """The number of the unit that holds a part of it."""
        return self.fragments[view.fqn].unit

    def fragment_of(self, view: ParamView, flat: torch.Tensor) -> torch.Tensor:
        """The part of a unit, or of state of its shape, that belongs to `view`: one dimension, sharing memory."""
        fragment = self.fragments[view.fqn]
        if not flat.is_contiguous():
            raise UnsupportedError(f"parameter {view.fqn}: its master or optimizer state is not row-major in memory")
        return flat.detach().view(-1)[fragment.offset : fragment.offset + fragment.length]


class FlatState(OptimizerAdapter):
    """State of a unit is that of each parameter in it: what has the unit's shape by range, scalars to each.

    Every rank writes the scalars of all parameters of a unit that it has, also of those that it holds no element of:
    so a partition of padding alone is restored too.
    """

    flat: FlatFramework
    _nest: Nest

    def _init_flat(self, framework: FlatFramework) -> None:
        self.flat = framework
        self._cut: _Cut | None = None
        self._loading: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def base(self) -> torch.optim.Optimizer:
        """The optimizer whose `step()` updates the units."""
        raise NotImplementedError

    def units(self) -> list[list[int]]:
        """For each of its param groups, the numbers of the units in it."""
        raise NotImplementedError

    def _numbers(self) -> list[int]:
        return [number for numbers in self.units() for number in numbers]

    @property
    def views(self) -> list[ParamView]:
        names = {view.fqn for number in self._numbers() for view in self.flat.views_in(number)}
        return [view for view in self.flat.params if view.fqn in names]

    # -- where the state of a unit is ---------------------------------------------------------------------------

    def state_of(self, number: int) -> Mapping[str, Any]:
        return self.base.state.get(self.flat.unit(number), NO_STATE)

    def new_state(self, number: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor for state of the unit's shape: of zeros, which is what the padding at a partition's end has."""
        unit = self.flat.unit(number)
        return torch.zeros(unit.shape, dtype=dtype, device=unit.device)

    def put_state(self, number: int, state: Mapping[str, Any]) -> None:
        """The unit's state is this now, tensors of `new_state` included; empty for none."""
        if state:
            self.base.state[self.flat.unit(number)] = dict(state)
        else:
            self.base.state.pop(self.flat.unit(number), None)

    # -- what there is ------------------------------------------------------------------------------------------

    def states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        """The very same list while nothing changed: units are examined again each time, since tensors may be replaced,
        or given other memory.
        """
        numbers = self._numbers()
        units, states = [*map(self.flat.unit, numbers)], [*map(self.state_of, numbers)]
        if self._cut is None or not self._cut.is_of(views, units, states):
            parts = [
                {view.fqn: self._fragment_states(view, unit, state) for view in self.flat.views_in(number)}
                for number, unit, state in zip(numbers, units, states, strict=True)
            ]
            self._cut = _Cut(views, units, states, parts)
        return self._cut.states

    def _fragment_states(self, view: ParamView, unit: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == unit.shape and unit.dim():
                found[name] = self.flat.fragment_of(view, value)
            elif isinstance(value, torch.Tensor) and value.dim():
                raise UnsupportedError(
                    f"{self.kind} keeps {name!r} of shape {list(value.shape)} for a unit of {unit.numel()} elements: "
                    "which part belongs to which parameter is unknown"
                )
            else:
                found[name] = value
        return found

    def hyper_parameters(self) -> list[dict[str, Any]]:
        groups = zip(self.base.param_groups, self._group_names(), strict=True)
        return [{**group, "params": names} for group, names in groups]

    def _group_names(self) -> list[list[str]]:
        return [[view.fqn for number in numbers for view in self.flat.views_in(number)] for numbers in self.units()]

    def describe(self) -> dict[str, Any]:
        return {**OptimizerAdapter.describe(self), **self._adam(), **self._nest.describe()}

    @property
    def together(self) -> bool:
        """Whether a step of the optimizer has all units of a group at once."""
        return True

    def _adam(self) -> dict[str, Any]:
        return adams.describe(self.base, together=self.together)

    # -- restore ------------------------------------------------------------------------------------------------

    def check(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> list[str]:
        if lacking:
            return ["parameters that the checkpoint lacks cannot be left unchanged where several share one tensor"]
        groups = self._group_names()
        problems = check_groups(self.kind, groups, saved) or adams.check(saved, self._adam(), groups)
        return problems or self._nest.check(saved)

    def place(self, view: ParamView, entry: Slice, wrapped: bool) -> torch.Tensor:
        number = self.flat.unit_of(view)
        dtype, shape, unit = DTYPES[entry.dtype], torch.Size(entry.global_shape), self.flat.unit(number)
        # Whole, but of a parameter that lies in a unit with others: where ranks hold all of a unit alike.
        inside = entry.is_flat or (bool(shape) and shape != unit.shape and shape.numel() == self._numel(view))
        if inside:
            shape = unit.shape
        loading = self._loading.setdefault(number, {})
        tensor = loading.get(entry.kind, self.state_of(number).get(entry.kind))
        if not (isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.shape == shape):
            if inside:
                tensor = self.new_state(number, entry.kind, dtype)
            else:
                tensor = torch.zeros(shape, dtype=dtype, device=self._scalar_device(number))
        loading[entry.kind] = tensor
        return self.flat.fragment_of(view, tensor) if inside else tensor

    def _numel(self, view: ParamView) -> int:
        fragment = self.flat.fragments.get(view.fqn)
        return view.param.numel() if fragment is None else fragment.length

    def _scalar_device(self, number: int) -> torch.device:
        group = next(g for g, numbers in zip(self.base.param_groups, self.units(), strict=True) if number in numbers)
        on_device = group.get("capturable") or group.get("fused")
        return self.flat.unit(number).device if on_device else torch.device("cpu")

    def joined(self) -> list[list[str]]:
        return [[view.fqn for view in self.flat.views_in(number)] for number in self._numbers()]

    def adopt(
        self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any],
        lacking: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._put_units(states, saved)
        if self._nest.put(saved):
            self._put_units(states, saved)
            self._nest.confirm(saved)
        self._loading.clear()
        adams.count_on(self.base, (self.state_of(number) for number in self._numbers()))

    def _put_units(self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any]) -> None:
        for number in self._numbers():
            views, loaded = self.flat.views_in(number), self._loading.get(number, {})
            names = {name for view in views for name in states.get(view.fqn, {})}
            state: dict[str, Any] = {name: loaded[name] for name in names}
            for view in views:
                state.update(saved["scalars"].get(view.fqn, {}))
            order = dict.fromkeys(name for view in views for name in saved["order"].get(view.fqn, []))
            self.put_state(number, in_order(state, order) if state else {})
        adopt_groups(self.base.param_groups, self._group_names(), saved)


class _Cut:
    """The state of units, cut into that of parameters: `states` are those of `views`, `parts` each unit's by name."""

    def __init__(
        self, views: Sequence[ParamView], units: list[torch.Tensor], states: list[Mapping[str, Any]],
        parts: list[dict[str, dict[str, Any]]],
    ) -> None:  # fmt: skip
        by_fqn = {fqn: each for part in parts for fqn, each in part.items()}
        self.states: list[Mapping[str, Any]] = [by_fqn.get(view.fqn, NO_STATE) for view in views]
        self._views, self._units, self._parts, self._contents = views, units, parts, Contents(states)
        self._unit_of = [number for number, state in enumerate(states) for _ in state]  # of each place in the contents
        self._tensors = [value for value in self._contents.values if isinstance(value, torch.Tensor)]
        self._geometry = Geometry(self._tensors)

    def is_of(self, views: Sequence[ParamView], units: list[torch.Tensor], states: list[Mapping[str, Any]]) -> bool:
        """Whether it was cut from these very tensors, which are where they were. Brings scalars up to date."""
        if views is not self._views or not same_objects(units, self._units):
            return False
        others, values = self._contents.others(states), self._contents.values
        if others is None or any(isinstance(each, torch.Tensor) for at, now in others for each in (values[at], now)):
            return False
        if not self._in_place():
            return False
        for at, now in others:
            values[at] = now
            for part in self._parts[self._unit_of[at]].values():
                part[self._contents.names[at]] = now
        return True

    def _in_place(self) -> bool:
        return self._geometry.is_of(self._tensors)
