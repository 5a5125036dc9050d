"""DeepSpeedOptimizer: a DeepSpeed engine's optimizer as capture and restore see it, and the events of its updates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import ParamView
from layerwise_dist.frameworks.deepspeed.framework import DeepSpeedFramework
from layerwise_dist.frameworks.deepspeed.support import accumulating
from layerwise_dist.frameworks.optimizers import (
    OptimizerAdapter,
    UpdateEvents,
    adopt_groups,
    check_groups,
    group_origins,
    in_order,
)
from layerwise_dist.pieces import DTYPES
from layerwise_dist.slices import Slice

log = logging.getLogger("layerwise_dist")


class DeepSpeedOptimizer(OptimizerAdapter):
    """State of a unit is that of each parameter in it: what has the unit's shape by range, scalars to each.

    Every rank writes the scalars of all parameters of a unit that it has, also of those of which it holds no element:
    so a partition of padding alone is restored too.
    """

    def __init__(self, framework: DeepSpeedFramework) -> None:
        self._framework, self._engine, self._units = framework, framework.engine, framework.units
        self.kind = type(self._units.base).__qualname__
        self._views = [view for view in framework.params if view.fqn in framework.fragments]
        self._in_unit: dict[int, list[ParamView]] = {}
        for view in self.views:
            self._in_unit.setdefault(framework.fragments[view.fqn].unit, []).append(view)
        self._known: dict[int, tuple[list[Any], dict[str, dict[str, Any]]]] = {}
        self._loading: dict[int, dict[str, torch.Tensor]] = {}
        self._hooks: list[Any] = []
        self._groupings = self._units.groupings()
        self._names = self._group_names()
        self._warn_of_large_units()

    def _warn_of_large_units(self) -> None:
        layers = len({view.layer for view in self.views})
        units = len(self._in_unit)
        if units < layers and self._framework.rank == 0:
            sizes = Counter({n: sum(_numel(view) for view in views) for n, views in self._in_unit.items()})
            largest = 100 * sizes.most_common(1)[0][1] / max(1, sum(sizes.values()))
            log.warning(
                "DeepSpeed updates %d layers in %d unit%s, the largest of which holds %.0f %% of the parameters: what "
                "is updated at once is captured at once. One group a layer makes them as many as layers: pass "
                "model_parameters=layerwise_dist.param_groups(model) to deepspeed.initialize()",
                layers, units, "" if units == 1 else "s", largest,
            )  # fmt: skip

    @property
    def views(self) -> list[ParamView]:
        return self._views

    @property
    def mid_window(self) -> bool:
        return accumulating(self._engine)

    def gather(self) -> None:
        self._units.gather()

    # -- what there is ------------------------------------------------------------------------------------------

    def states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        by_fqn: dict[str, dict[str, Any]] = {}
        for number in self._in_unit:
            by_fqn.update(self._unit_states(number))
        return [by_fqn.get(view.fqn, _NO_STATE) for view in views]

    def _unit_states(self, number: int) -> dict[str, dict[str, Any]]:
        """Looked up anew each time, since DeepSpeed replaces tensors; the same dicts while it did not."""
        unit, state = self._units.tensor(number), self._units.state(number)
        held = [unit, *((name, value if isinstance(value, torch.Tensor) else None) for name, value in state.items())]
        known = self._known.get(number)
        if known is None or not _same(known[0], held):
            made = {view.fqn: self._fragment_states(view, unit, state) for view in self._in_unit[number]}
            known = self._known[number] = held, made
        scalars = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
        if scalars:
            for each in known[1].values():
                each.update(scalars)
        return known[1]

    def _fragment_states(self, view: ParamView, unit: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == unit.shape and unit.dim():
                found[name] = self._framework.fragment_of(view, value)
            elif isinstance(value, torch.Tensor) and value.dim():
                raise UnsupportedError(
                    f"{self.kind} keeps {name!r} of shape {list(value.shape)} for a unit of {unit.numel()} elements: "
                    "which part of it belongs to which parameter is not known"
                )
            else:
                found[name] = value
        return found

    def hyper_parameters(self) -> list[dict[str, Any]]:
        names = self._names
        return [{**group, "params": names[number]} for number, group in enumerate(self._units.base.param_groups)]

    def _group_names(self) -> list[list[str]]:
        names: list[list[str]] = [[] for _ in self._units.base.param_groups]
        by_param = {id(view.param): view.fqn for view in self.views}
        for grouping in self._groupings:
            names[grouping.group] += [by_param[id(param)] for param in grouping.params]
        return names

    # -- restore ------------------------------------------------------------------------------------------------

    def check(self, saved: Mapping[str, Any]) -> list[str]:
        return check_groups(self.kind, self._names, saved)

    def place(self, view: ParamView, entry: Slice, wrapped: bool) -> torch.Tensor:
        number = self._framework.fragments[view.fqn].unit
        dtype, shape = DTYPES[entry.dtype], torch.Size(entry.global_shape)
        if entry.is_flat:
            shape = self._units.tensor(number).shape
        loading = self._loading.setdefault(number, {})
        tensor = loading.get(entry.kind, self._units.state(number).get(entry.kind))
        if not (isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.shape == shape):
            if entry.is_flat:
                tensor = self._units.new_state(number, entry.kind, dtype)
            else:
                tensor = torch.zeros(shape, dtype=dtype, device=self._scalar_device(number))
        loading[entry.kind] = tensor
        return self._framework.fragment_of(view, tensor) if entry.is_flat else tensor

    def _scalar_device(self, number: int) -> torch.device:
        group = self._units.base.param_groups[self._groupings[number].group]
        on_device = group.get("capturable") or group.get("fused")
        return self._units.tensor(number).device if on_device else torch.device("cpu")

    def adopt(self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any]) -> None:
        for number, views in self._in_unit.items():
            loaded = self._loading.get(number, {})
            names = {name for view in views for name in states.get(view.fqn, {})}
            state: dict[str, Any] = {name: loaded[name] for name in names}
            for view in views:
                state.update(saved["scalars"].get(view.fqn, {}))
            order = dict.fromkeys(name for view in views for name in saved["order"].get(view.fqn, []))
            self._units.put_state(number, in_order(state, order) if state else {})
        self._loading.clear()
        adopt_groups(self._units.base.param_groups, self._names, saved)
        self._framework.counters.put_schedule(group_origins(self._names, saved["groups"]), len(saved["groups"]))
        self._units.after_load()

    # -- updates ------------------------------------------------------------------------------------------------

    @property
    def layer_order(self) -> Sequence[str]:
        """As ZeRO steps its units: a layer is there once the last of its units is."""
        last = {view.layer: number for number, views in sorted(self._in_unit.items()) for view in views}
        return sorted(last, key=lambda layer: last[layer])

    def watch(self, events: UpdateEvents) -> None:
        engine, base = self._engine, self._units.base
        take = engine._take_model_step
        layers = {number: {view.layer for view in views} for number, views in self._in_unit.items()}
        missing: dict[str, set[int]] = {}  # of each layer, the units that the running update has not stepped
        steps = 0

        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            """An accumulation window's update. Overflow is known only when it returns."""
            nonlocal steps
            events.update_starting()
            steps = 0
            missing.clear()
            for number, inside in layers.items():
                for layer in inside:
                    missing.setdefault(layer, set()).add(number)
            result = take(*args, **kwargs)
            applied = engine.was_step_applied()
            if applied and not steps:
                raise UnsupportedError(
                    f"DeepSpeed updated without calling step() of its {type(base).__name__}: no update was seen"
                )
            events.update_done(applied=applied)
            return result

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            """ZeRO steps its inner optimizer unit by unit."""
            nonlocal steps
            steps += 1
            events.overwriting({layer for number in self._units.stepped() for layer in layers.get(number, ())})

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            done = set()
            for number in self._units.stepped():
                self._units.updated(number, wanted=events.wanted())
                for layer in layers.get(number, ()):
                    missing[layer].discard(number)
                    if not missing[layer]:
                        done.add(layer)
            events.updated(done)

        engine._take_model_step = take_model_step
        self._hooks = [base.register_step_pre_hook(before), base.register_step_post_hook(after)]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            del self._engine._take_model_step  # the instance's; the class's own comes to light again
        self._hooks = []


_NO_STATE: Mapping[str, Any] = {}


def _numel(view: ParamView) -> int:
    return getattr(view.param, "ds_numel", view.param.numel())


def _same(known: Sequence[Any], held: Sequence[Any]) -> bool:
    """The same unit, with the same names and the very same tensors in its state."""
    return (
        len(known) == len(held)
        and known[0] is held[0]
        and all(was[0] == now[0] and was[1] is now[1] for was, now in zip(known[1:], held[1:], strict=True))
    )
