# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's LR scheduler and loss scale, and the scheduler and GradScaler in `state`: one stands for the other.

A DeepSpeed engine has both within itself; a script without one names its own in `attach(state=...)`. What a checkpoint
has of the one goes to the other where there is exactly one of the same class. Otherwise an error says so, or the
warning of what has no place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from layerwise_dist.errors import MismatchError
from layerwise_dist.frameworks.deepspeed.counters import adapts, from_grad_scaler, to_grad_scaler
from layerwise_dist.frameworks.deepspeed.framework import DeepSpeedFramework
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.loop.objects import SCALER, StateObjects
from layerwise_dist.loop.sealed import SealedState


def exchange(
    sealed: SealedState, saved: str, framework: Framework, objects: StateObjects, parts: Parts
) -> tuple[SealedState, dict[str, Any] | None]:
    """The state with what was the engine's of a framework by the name of `saved` among its objects; and what this job's
    engine takes of the checkpoint's objects, if it is one (`DeepSpeedFramework.carry_on`).

    Raises MismatchError where both are there and it is not clear that they are the same.
    """
    if parts.module_only or saved == framework.name:
        return sealed, None
    if saved == "deepspeed":
        return _out_of_engine(sealed, objects), None
    if isinstance(framework, DeepSpeedFramework):
        return _into_engine(sealed, framework, objects, parts)
    return sealed, None


def _out_of_engine(sealed: SealedState, objects: StateObjects) -> SealedState:
    found, wrapper = dict(sealed["objects"]), dict(sealed["wrapper"])
    classes = objects.classes()
    lacking = [name for name in classes if name not in found]
    schedules = [name for name in lacking if classes[name] != SCALER]
    if wrapper["lr_scheduler"] is not None and schedules:
        was = wrapper.get("lr_scheduler_class", "one whose class the checkpoint does not say")
        name = _only(schedules, "attach(state=...) names", "the LR scheduler of its DeepSpeed engine", was)
        if classes[name] != was:
            raise MismatchError(
                f"state[{name!r}] is a {classes[name]}, and the checkpoint's DeepSpeed engine had {was}: make the same "
                "LR scheduler, or leave it out of state"
            )
        found[name], wrapper["lr_scheduler"] = wrapper["lr_scheduler"], None
    scalers = [name for name in lacking if classes[name] == SCALER]
    for name in scalers:
        if not objects.is_on(name):
            found[name] = {}  # it would have saved nothing
    scalers = [name for name in scalers if objects.is_on(name)]
    if adapts(wrapper["loss_scale"]) and scalers:
        name = _only(scalers, "attach(state=...) names", "the loss scale of its DeepSpeed engine", SCALER)
        found[name] = to_grad_scaler(wrapper["loss_scale"], objects.take()[name])
        wrapper["loss_scale"] = None
    return {**sealed, "objects": found, "wrapper": wrapper}


def _into_engine(
    sealed: SealedState, framework: DeepSpeedFramework, objects: StateObjects, parts: Parts
) -> tuple[SealedState, dict[str, Any]]:
    found, given = dict(sealed["objects"]), dict[str, Any]()
    classes = {name: kind for name, kind in sealed.get("classes", {}).items() if name in found}
    left = [name for name in classes if name not in objects.names()]
    live = framework.engine.lr_scheduler
    schedules = [name for name in left if classes[name] != SCALER]
    if live is not None and parts.scheduler and schedules:
        here = type(live).__qualname__
        name = _only(schedules, "the checkpoint has", "the LR scheduler of this DeepSpeed engine", here)
        if classes[name] != here:
            raise MismatchError(
                f"this DeepSpeed engine has {here}, and the checkpoint's state[{name!r}] is a {classes[name]}: make "
                "the same LR scheduler"
            )
        given["lr_scheduler"] = found.pop(name)
    scalers = [name for name in left if classes[name] == SCALER]
    for name in [name for name in scalers if not found[name]]:
        del found[name]  # it was off, and has nothing
    scalers = [name for name in scalers if name in found]
    if framework.counters.adapts and parts.optimizer and scalers:
        name = _only(scalers, "the checkpoint has", "the loss scale of this DeepSpeed engine", SCALER)
        given["loss_scale"] = from_grad_scaler(found.pop(name), name)
    return cast(SealedState, {**sealed, "objects": found}), given


def _only(names: Sequence[str], whose: str, other: str, kind: str) -> str:
    if len(names) > 1:
        raise MismatchError(f"{whose} {sorted(names)}: nothing says which of them stands for {other} ({kind})")
    return names[0]
