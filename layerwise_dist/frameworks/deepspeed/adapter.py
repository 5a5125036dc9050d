# SPDX-License-Identifier: Apache-2.0
"""DeepSpeedOptimizer: a DeepSpeed engine's optimizer as capture and restore see it, and the events of its updates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.deepspeed.framework import DeepSpeedFramework
from layerwise_dist.frameworks.deepspeed.in_backward import InBackward
from layerwise_dist.frameworks.deepspeed.support import accumulating
from layerwise_dist.frameworks.flat import FlatState
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.frameworks.nested import Nest
from layerwise_dist.frameworks.optimizers import UpdateEvents
from layerwise_dist.frameworks.param_groups import group_origins

log = logging.getLogger("layerwise_dist")


class DeepSpeedOptimizer(FlatState):
    """The engine's optimizer behind ZeRO's units."""

    def __init__(self, framework: DeepSpeedFramework, update: str = "auto") -> None:
        """`update` is the configuration's. Raises UnsupportedError for what it is not exact with, or cannot be."""
        self._init_flat(framework)
        self._framework, self._engine, self._units = framework, framework.engine, framework.units
        self.kind = type(self._units.base).__qualname__
        self._nest = Nest(self.kind, self._units.base, None)
        self._nest.refuse_inside("DeepSpeed")
        self._groups: list[list[int]] = [[] for _ in self._units.base.param_groups]
        for number, grouping in enumerate(self._units.groupings()):
            self._groups[grouping.group].append(number)
        self._views = super().views
        self._hooks: list[Any] = []
        self.in_backward: InBackward | None = None  # with update = "in_backward"
        if update == "in_backward":
            self.in_backward = InBackward(self._engine, self._units, self._views)
        elif update == "pipelined_step":
            raise UnsupportedError(
                "update = 'pipelined_step': ZeRO steps its optimizer unit by unit itself; use 'auto'"
            )
        self._warn_of_large_units()

    def _warn_of_large_units(self) -> None:
        layers = len({view.layer for view in self.views})
        in_unit = {number: self._framework.views_in(number) for numbers in self._groups for number in numbers}
        units = len(in_unit)
        if units < layers and self._framework.rank == 0:
            sizes = Counter({n: sum(_numel(view) for view in views) for n, views in in_unit.items()})
            largest = 100 * sizes.most_common(1)[0][1] / max(1, sum(sizes.values()))
            log.warning(
                "DeepSpeed updates %d layers in %d unit%s, and the largest holds %.0f %% of the parameters: what is "
                "updated at once is captured at once. Make one group a layer: pass "
                "model_parameters=layerwise_dist.param_groups(model) to deepspeed.initialize()",
                layers, units, "" if units == 1 else "s", largest,
            )  # fmt: skip

    @property
    def base(self) -> torch.optim.Optimizer:
        return self._units.base

    @property
    def views(self) -> list[ParamView]:
        return self._views

    @property
    def mid_window(self) -> bool:
        return accumulating(self._engine)

    def units(self) -> list[list[int]]:
        return self._groups

    @property
    def together(self) -> bool:
        return self._units.replicated  # ZeRO has one unit at a time in its groups

    # -- where the state of a unit is ---------------------------------------------------------------------------

    def gather(self) -> None:
        self._units.gather()

    def state_of(self, number: int) -> Mapping[str, Any]:
        return self._units.state(number)

    def new_state(self, number: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
        return self._units.new_state(number, kind, dtype)

    def put_state(self, number: int, state: Mapping[str, Any]) -> None:
        self._units.put_state(number, state)

    def adopt(
        self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any],
        lacking: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().adopt(states, saved, lacking)
        self.keep(saved, lacking)

    def keep(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> None:
        counters = self._framework.counters
        if counters.has_schedule:
            before = len(saved["groups"])
            try:
                found = group_origins(self._group_names(), saved, lacking)
            except ValueError:  # of an optimizer that is not taken: the schedule is, as DeepSpeed does it
                found = [None]
            if "origins" in saved:  # its groups are in this job's terms already
                found, before = saved["origins"]
            origins = [origin for origin in found if origin is not None]
            counters.put_schedule(origins if len(origins) == len(found) else None, before)
        self._units.after_load()

    # -- updates ------------------------------------------------------------------------------------------------

    @property
    def layer_order(self) -> Sequence[str]:
        """As ZeRO steps its units: a layer is there once the last of its units is."""
        numbers = sorted(number for group in self._groups for number in group)
        last = {view.layer: number for number in numbers for view in self._framework.views_in(number)}
        return sorted(last, key=lambda layer: last[layer])

    def watch(self, events: UpdateEvents) -> None:
        engine, base = self._engine, self._units.base
        take = engine._take_model_step
        numbers = [number for group in self._groups for number in group]
        layers = {number: {view.layer for view in self._framework.views_in(number)} for number in numbers}
        missing: dict[str, set[int]] = {}  # of each layer, the units that the running update has not stepped
        in_backward, begun, steps, linked = self.in_backward, False, 0, False

        def begin() -> None:
            nonlocal begun, steps
            self._nest.remember()
            events.update_starting()
            begun, steps = True, 0
            missing.clear()
            for number, inside in layers.items():
                for layer in inside:
                    missing.setdefault(layer, set()).add(number)

        def begin_in_backward() -> bool:
            if events.wants_layers():
                begin()
            return begun

        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            """An accumulation window's update. Overflow is known only when it returns."""
            nonlocal begun, linked
            if in_backward is not None:
                in_backward.before_step()
            if not begun:
                begin()
            begun = False
            result = take(*args, **kwargs)
            applied = engine.was_step_applied()
            if in_backward is not None:
                in_backward.after_step(applied=applied)
            if applied and not steps:
                raise UnsupportedError(
                    f"DeepSpeed updated without calling step() of its {type(base).__name__}: no update was seen"
                )
            if applied and not linked:
                self._units.link_state()
                linked = True
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
        if in_backward is not None:
            in_backward.watch(begin_in_backward)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            del self._engine._take_model_step  # the instance's; the class's own comes to light again
            if self.in_backward is not None:
                self.in_backward.detach()
        self._hooks = []


def _numel(view: ParamView) -> int:
    return getattr(view.param, "ds_numel", view.param.numel())
