# SPDX-License-Identifier: Apache-2.0
"""What a DeepSpeed engine counts and adapts besides the optimizer: steps, samples, loss scale, LR scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerwise_dist.errors import MismatchError
from layerwise_dist.frameworks.deepspeed.flattening import Units
from layerwise_dist.frameworks.deepspeed.groups import spread
from layerwise_dist.frameworks.described import CarriedCounters
from layerwise_dist.frameworks.private_names import require_of_deepspeed

_COUNTED = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
# Of loss scalers of both kinds, what changes while training; a static scale has the first only.
_SCALED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def adapts(scale: Mapping[str, Any] | None) -> bool:
    """Whether a loss scale that was taken (`Counters.take`) is one that changes while training."""
    return scale is not None and scale.get("last_overflow_iter") is not None


def to_grad_scaler(scale: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a GradScaler that goes on where such a loss scale was. How fast it grows and falls is `live`'s.

    Raises MismatchError for what is no loss scale that changes.
    """
    if not (
        type(scale.get("cur_iter")) is type(scale["last_overflow_iter"]) is int and _is_number(scale.get("cur_scale"))
    ):
        raise MismatchError(
            "the loss scale of the checkpoint's DeepSpeed engine is not one that changes while training"
        )
    # Updates since the last overflow. DeepSpeed's grows in the one after a whole window, a GradScaler in its last one.
    since = scale["cur_iter"] - scale["last_overflow_iter"] - 1
    tracker = max(0, since - 1) % live["growth_interval"]
    return {**live, "scale": float(scale["cur_scale"]), "_growth_tracker": tracker}


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def from_grad_scaler(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The other way round. `name` is what the GradScaler was called. Raises MismatchError for what is none's state."""
    scale, since = state.get("scale"), state.get("_growth_tracker")
    if not (_is_number(scale) and type(since) is int and 0 <= since < 1 << 31):
        raise MismatchError(f"state[{name!r}] of the checkpoint is not what a GradScaler saves")
    return {"cur_scale": scale, "cur_iter": since + 1, "last_overflow_iter": -1, "external": None}


class Counters:
    """Taken at the boundary: inside `engine.step()` micro_steps is one short, and a resume would shift the window."""

    def __init__(self, engine: Any, units: Units) -> None:
        self._engine, self._wrapper = engine, units.wrapper
        self._schedule: dict[str, Any] | None = None
        if self._scaler is not None:
            require_of_deepspeed(self._wrapper, ("custom_loss_scaler", "external_loss_scale"))

    @property
    def _scaler(self) -> Any:
        return getattr(self._wrapper, "loss_scaler", None) or getattr(self._wrapper, "loss_scale_config", None)

    def take(self) -> CarriedCounters:
        engine, scaler = self._engine, self._scaler
        loss_scale: dict[str, Any] | None = None
        if scaler is not None:
            loss_scale = {name: getattr(scaler, name) for name in _SCALED if hasattr(scaler, name)}
            loss_scale["external"] = self._wrapper.external_loss_scale if self._wrapper.custom_loss_scaler else None
        found: CarriedCounters = {
            "counters": {name: getattr(engine, name) for name in _COUNTED},
            "window": engine.gradient_accumulation_steps(),
            "loss_scale": loss_scale,
            "lr_scheduler": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        }
        if engine.lr_scheduler is not None:
            found["lr_scheduler_class"] = type(engine.lr_scheduler).__qualname__
        return found

    @property
    def adapts(self) -> bool:
        """Whether there is a loss scale that changes while training."""
        return getattr(self._scaler, "last_overflow_iter", None) is not None

    def at(self, step: int, given: Mapping[str, Any], *, scheduled: bool) -> dict[str, Any]:
        """What an engine would have counted that has made this many steps, as `put` takes it, with what is `given`; the
        rest stays as it is.

        Raises MismatchError if there is an LR scheduler that is to be put back (`scheduled`), and nothing to put.
        """
        engine = self._engine
        if engine.lr_scheduler is not None and scheduled and "lr_scheduler" not in given:
            raise MismatchError(
                "the checkpoint is not of DeepSpeed, and its state objects have no LR scheduler for this engine's "
                f"({type(engine.lr_scheduler).__name__}): make the scheduler yourself, and give it in state={{...}}"
            )
        window = engine.gradient_accumulation_steps()
        counted = (step, step * engine.train_batch_size(), 0, step * window)
        return {**given, "counters": dict(zip(_COUNTED, counted, strict=True)), "window": window}

    def put(self, taken: dict[str, Any]) -> None:
        """All of it but the LR scheduler, which `put_schedule` puts back. What is not in `taken` stays as it is, and so
        does a loss scale of another kind: stage 0 in fp32 has none, that of fp16 adapts itself and begins as a new one.

        Raises MismatchError where the LR scheduler is there in one of the two only, or of another class.
        """
        engine, scaler = self._engine, self._scaler
        live = engine.lr_scheduler
        if "lr_scheduler" in taken and (taken["lr_scheduler"] is None) != (live is None):
            here, there = ("has none", "has one") if live is None else ("has one", "has none")
            raise MismatchError(f"lr scheduler: this engine {here}, the checkpoint's {there}")
        kind = type(live).__qualname__
        if taken.get("lr_scheduler") is not None and (was := taken.get("lr_scheduler_class", kind)) != kind:
            raise MismatchError(f"lr scheduler: this engine has {kind}, the checkpoint's has {was}")
        for name, value in taken.get("counters", {}).items():
            setattr(engine, name, value)
        if taken.get("window", engine.gradient_accumulation_steps()) != engine.gradient_accumulation_steps():
            # It is used modulo the window only, and a boundary is where a window ends.
            engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        elif "window" in taken:
            engine.micro_steps -= engine.micro_steps % taken["window"]  # one that was saved within begins anew
        scale = taken.get("loss_scale")
        if scaler is not None and scale is not None and adapts(scale) == self.adapts:
            external = scale["external"]
            for name in _SCALED:
                if name in scale and hasattr(scaler, name):
                    setattr(scaler, name, scale[name])
            self._wrapper.custom_loss_scaler = external is not None
            self._wrapper.external_loss_scale = external
        self._schedule = taken.get("lr_scheduler")

    @property
    def has_schedule(self) -> bool:
        """Whether `put` left something to `put_schedule`."""
        return self._schedule is not None

    def put_schedule(self, origins: Sequence[int] | None, groups: int) -> None:
        """Loads the LR scheduler's state that `put` took. `origins` has the number of the saved group that each of this
        engine's groups comes from; `groups` says how many were saved. With None the saved groups are not this engine's.
        """
        schedule, self._schedule = self._schedule, None
        if schedule is not None:
            live = self._engine.lr_scheduler
            if origins is not None and list(origins) != list(range(groups)):
                schedule = spread(schedule, origins, groups, live.state_dict())
            live.load_state_dict(schedule)
