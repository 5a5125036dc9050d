# SPDX-License-Identifier: Apache-2.0
"""Updates in the backward: each of ZeRO's units is stepped as soon as its gradient is final, by DeepSpeed's own step.

DeepSpeed reduces gradients in its backward hooks and updates in `engine.step()`. Without clipping and loss scaling,
what it would do there with one unit depends on that unit's gradient alone, so it is done when the last part of the
gradient was reduced; `engine.step()` then passes the unit by, and derives the low-precision copies as ever.
`stages.py` knows how that is for each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from layerwise_dist.errors import BoundaryError, UnsupportedError
from layerwise_dist.frameworks.deepspeed.flattening import Units, Unwrapped, Zero3, Zero12
from layerwise_dist.frameworks.deepspeed.nvme import Zero3OnNvme
from layerwise_dist.frameworks.deepspeed.stages import Stage0, Stage3, Stages1And2, ZeroStage
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.frameworks.private_names import require_of_deepspeed

_ENGINE = (
    "is_gradient_accumulation_boundary", "gradient_accumulation_steps", "managed_gradient_accumulation",
    "gradient_clipping", "fp16_enabled",
)  # fmt: skip


class InBackward:
    """Steps units in the backward. The first window is only watched, and stepped as DeepSpeed does.

    Raises UnsupportedError: there after the first backward, if a gradient arrives more than once in one; when it is
    built, for what it is not exact with. Later, BoundaryError for an update that can no longer be what it should be.
    """

    def __init__(self, engine: Any, units: Units, views: Sequence[ParamView]) -> None:
        """`views` are the trained parameters."""
        require_of_deepspeed(engine, _ENGINE, "the engine")
        reason = _why_not(engine, units)
        if reason:
            raise UnsupportedError(f"update = 'in_backward': {reason}; use 'auto'")
        self._engine, self._units = engine, units
        self._names = {id(view.param): view.fqn for view in views}
        self._stage = _stage(engine, units, views)
        self._numbers = range(self._stage.count)
        self._order: list[int] = []  # in which the first window's were complete
        self._of: dict[int, list[int]] = {}
        for number in self._numbers:
            for param in self._stage.members(number):
                self._of.setdefault(id(param), []).append(number)
        self._observed = False
        self._begin: Callable[[], bool] = lambda: False
        self._reset()

    def _reset(self) -> None:
        self._arrived: dict[int, int] = {}
        self._missing = {number: {id(param) for param in self._stage.members(number)} for number in self._numbers}
        self._stepped: dict[int, list[dict[str, Any]]] = {}
        self._wanted: bool | None = None

    @property
    def stepped(self) -> int:
        """How many units were updated in the window's backward so far."""
        return len(self._stepped)

    def watch(self, begin: Callable[[], bool]) -> None:
        """`begin` is called before a window's first unit is stepped. False: this window's update is DeepSpeed's own."""
        self._begin = begin
        self._stage.watch(self._have_arrived, self._is_stepped)

    def _is_stepped(self, number: int) -> bool:
        return number in self._stepped

    def detach(self) -> None:
        self._stage.detach()

    # -- in the backward ----------------------------------------------------------------------------------------

    def _have_arrived(self, params: Iterable[nn.Parameter]) -> None:
        if not self._engine.is_gradient_accumulation_boundary():
            return
        touched: dict[int, None] = {}
        for param in params:
            self._arrived[id(param)] = self._arrived.get(id(param), 0) + 1
            for number in self._of.get(id(param), ()):
                if number in self._stepped:
                    raise BoundaryError(
                        f"parameter {self._names[id(param)]} got another gradient after its update in this backward, "
                        "unlike in the first one: what was updated is wrong, go back to a checkpoint"
                    )
                self._missing[number].discard(id(param))
                touched[number] = None
        if not self._observed:
            self._order += [number for number in touched if not self._missing[number] and number not in self._order]
            return
        while len(self._stepped) < len(self._order) and not self._missing[self._order[len(self._stepped)]]:
            if not self._step(self._order[len(self._stepped)]):
                return

    def _step(self, number: int) -> bool:
        if self._wanted is None:
            self._wanted = self._begin()
        if self._wanted:
            self._stepped[number] = self._hyper_parameters()
            with torch.no_grad():
                self._stage.step(number)
        return self._wanted

    def _hyper_parameters(self) -> list[dict[str, Any]]:
        groups = self._units.base.param_groups
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    # -- around engine.step() -----------------------------------------------------------------------------------

    def before_step(self) -> None:
        twice = [self._names[param] for param, count in self._arrived.items() if count > 1]
        if not self._observed and twice:
            raise UnsupportedError(
                f"update = 'in_backward': parameter {twice[0]} gets its gradient more than once in a backward (several "
                "backwards, or reentrant checkpointing of a shared layer); use 'auto'"
            )
        now = self._hyper_parameters() if self._stepped else []
        if any(used != now for used in self._stepped.values()):
            raise BoundaryError(
                "the optimizer's hyper-parameters changed between the backward and engine.step(): layers were updated "
                "with the old ones, go back to a checkpoint"
            )

    def after_step(self, *, applied: bool) -> None:
        stepped = bool(self._stepped)
        self._observed = True
        self._reset()
        if stepped and not applied:
            raise BoundaryError(
                "DeepSpeed skipped this update, since its gradients are not finite: layers were updated with them "
                "already, go back to a checkpoint"
            )


def _stage(engine: Any, units: Units, views: Sequence[ParamView]) -> ZeroStage:
    if isinstance(units, Unwrapped):
        return Stage0(engine, units, views)
    return (Stage3 if isinstance(units, Zero3) else Stages1And2)(units.wrapper, len(units.groupings()))


def _why_not(engine: Any, units: Units) -> str | None:
    """Why updates in the backward are not exact, or not possible, for this engine."""
    wrapper, window = units.wrapper, engine.gradient_accumulation_steps()
    if isinstance(units, Zero3OnNvme) or getattr(wrapper, "offload_optimizer", False):
        return "the optimizer is offloaded, and gets its gradients after the backward"
    if getattr(wrapper, "cpu_offload", False):
        return "the optimizer is offloaded, and gets its gradients after the backward"
    if not isinstance(units, (Unwrapped, Zero12, Zero3)):
        return f"{type(wrapper).__name__} casts all gradients before it updates anything"
    if isinstance(units, Unwrapped) and engine.dp_world_size > 2:
        return "at stage 0 more than two ranks' sums depend on which gradients are averaged together"
    if engine.gradient_clipping() > 0:
        return (
            "gradient_clipping, which is 1.0 unless ds_config says 0, needs the norm of all gradients before any update"
        )
    if engine.fp16_enabled() or getattr(wrapper, "loss_scale", 1.0) != 1.0:
        return "loss scaling must know of overflows in all gradients before any update"
    if not engine.managed_gradient_accumulation():
        return "with managed_gradient_accumulation off, no backward can tell whether it is an update's last"
    if window > 1 and isinstance(units, Zero12):
        return (
            f"ZeRO-1 and 2 sum up {window} micro-batches when the last backward is over; ZeRO-3 does it in the backward"
        )
    return None
