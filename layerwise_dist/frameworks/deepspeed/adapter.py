"""DeepSpeedOptimizer: a DeepSpeed engine's optimizer as capture and restore see it, and the events of its updates."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import ParamView
from layerwise_dist.frameworks.deepspeed.framework import DeepSpeedFramework
from layerwise_dist.frameworks.deepspeed.support import accumulating
from layerwise_dist.frameworks.flat import FlatState
from layerwise_dist.frameworks.optimizers import UpdateEvents

log = logging.getLogger("layerwise_dist")


class DeepSpeedOptimizer(FlatState):
    """The engine's optimizer behind ZeRO's units."""

    def __init__(self, framework: DeepSpeedFramework) -> None:
        self._init_flat(framework)
        self._framework, self._engine, self._units = framework, framework.engine, framework.units
        self.kind = type(self._units.base).__qualname__
        self._groups: list[list[int]] = [[] for _ in self._units.base.param_groups]
        for number, grouping in enumerate(self._units.groupings()):
            self._groups[grouping.group].append(number)
        self._views = super().views
        self._hook: Any = None
        self._warn_of_large_units()

    def _warn_of_large_units(self) -> None:
        layers = len({view.layer for view in self.views})
        in_unit = {number: self._framework.views_in(number) for numbers in self._groups for number in numbers}
        units = len(in_unit)
        if units < layers and self._framework.rank == 0:
            sizes = Counter({n: sum(_numel(view) for view in views) for n, views in in_unit.items()})
            largest = 100 * sizes.most_common(1)[0][1] / max(1, sum(sizes.values()))
            log.warning(
                "DeepSpeed updates %d layers in %d unit%s, the largest of which holds %.0f %% of the parameters: what "
                "is updated at once is captured at once. One group a layer makes them as many as layers: pass "
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

    def adopt(self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any]) -> None:
        super().adopt(states, saved)
        self._units.after_load()

    # -- updates ------------------------------------------------------------------------------------------------

    def watch(self, events: UpdateEvents) -> None:
        engine, base = self._engine, self._units.base
        take, steps = engine._take_model_step, 0

        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            """An accumulation window's update. Overflow is known only when it returns."""
            nonlocal steps
            events.update_starting()
            steps = 0
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
            events.overwriting()

        engine._take_model_step = take_model_step
        self._hook = base.register_step_pre_hook(before)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            del self._engine._take_model_step  # the instance's; the class's own comes to light again
        self._hook = None


def _numel(view: ParamView) -> int:
    return getattr(view.param, "ds_numel", view.param.numel())
