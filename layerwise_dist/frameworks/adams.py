# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW as torch and DeepSpeed have them: the same update of the same state, under other names.

torch's Adam and AdamW count steps in a tensor for each parameter. DeepSpeed's FusedAdam and DeepSpeedCPUAdam count in
an int, and are both of them, as their `adam_w_mode` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.tensors.values import alike

_TORCHS = ("Adam", "AdamW")
_DEEPSPEEDS = ("FusedAdam", "DeepSpeedCPUAdam")
# What a group has in one class only, where that is not at its default; the other one always does as the default says.
_TORCH_ONLY: Mapping[str, Any] = {"amsgrad": False, "maximize": False}
_DEEPSPEED_ONLY: Mapping[str, Any] = {"bias_correction": True}

# After so many steps one less a beta's power is 1 in fp32, however it was made: 0.99999 to that is e^-20.
_POWERS_END = 2_000_000

# The members of an optimizer's description that this module makes.
MEMBERS = ("adam_w_mode", "step_by_group")


@dataclass(frozen=True, slots=True)
class _Adam:
    decoupled: bool  # weight decay, as AdamW has it
    torchs: bool


def describe(optimizer: object, *, together: bool) -> dict[str, Any]:
    """Of one of DeepSpeed's Adams, what a checkpoint says beside its groups; of any other optimizer nothing.

    `together` says that it has whole groups in each step, and not one tensor after the other, as ZeRO has it.
    """
    name = type(optimizer).__qualname__
    if name not in _DEEPSPEEDS or not type(optimizer).__module__.startswith("deepspeed."):
        return {}
    # FusedAdam counts on in the state of the last of its parameters only, and takes that for all of the group.
    by_group = {"step_by_group": True} if together and name == "FusedAdam" else {}
    return {"adam_w_mode": bool(vars(optimizer)["adam_w_mode"]), **by_group}


def count_on(optimizer: torch.optim.Optimizer, states: Iterable[Mapping[str, Any]]) -> None:
    """After a restore into DeepSpeedCPUAdam. `states` are those of its tensors.

    Its kernel keeps the powers of its betas from one step to the next, each rounded, in memory that nothing shows. A
    new one would take them from pow(), which rounds otherwise. So it makes all steps again, of one element that is
    nobody's.
    """
    kernel = getattr(optimizer, "ds_opt_adam", None)
    if type(optimizer).__qualname__ != "DeepSpeedCPUAdam" or kernel is None:
        return
    betas = {tuple(group["betas"]) for group in optimizer.param_groups}
    steps = {state["step"] for state in states if state}
    if len(betas) != 1 or len(steps) != 1:
        return  # with several it takes pow() in every step
    ((beta1, beta2),), (done,) = betas, steps
    if done > _POWERS_END:
        return
    values = [torch.zeros(1, dtype=torch.float32, device="cpu") for _ in range(4)]
    for step in range(1, done + 1):
        kernel.adam_update(vars(optimizer)["opt_id"], step, 0.0, beta1, beta2, 1.0, 0.0, True, *values)


def real_class(kind: str) -> str:
    """The class that updates, of an optimizer as the state names its class."""
    inside = kind.removeprefix("ZeroRedundancyOptimizer(")
    return inside.removesuffix(")") if inside != kind else kind


def check(saved: Mapping[str, Any], members: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> list[str]:
    """Why a live optimizer of the saved class does not go on as that one, in words: `members` are what `describe` gives
    of it, `groups` the names of its groups' parameters.
    """
    if problems := _of_another_mode(saved, members):
        return problems
    if saved.get("step_by_group") and [*map(list, groups)] != [group["params"] for group in saved["groups"]]:
        return [f"the checkpoint's {saved['class']} counts the steps of each of its groups, and has others"]
    return []


def _of_another_mode(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    was, now = saved.get("adam_w_mode"), live.get("adam_w_mode")
    if was == now or was is None or now is None:
        return []
    return [f"the checkpoint's {saved['class']} has adam_w_mode={was}, this one has {now}"]


def unequal(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Why one optimizer does not go on as the other, in words. Both as `OptimizerAdapter.describe` has them."""
    if real_class(saved["class"]) == real_class(live["class"]):
        return _of_another_mode(saved, live)
    one, other = _adam(saved), _adam(live)
    if one is None or other is None or one.decoupled != other.decoupled:
        return [f"the checkpoint's optimizer is {_called(saved, one)}, this one is {_called(live, other)}"]
    lacking = {} if one.torchs == other.torchs else _TORCH_ONLY if one.torchs else _DEEPSPEED_ONLY
    return [
        f"group {number} of the checkpoint's {saved['class']} has {key}={group[key]!r}, which {live['class']} cannot do"
        for number, group in enumerate(saved["groups"])
        for key, default in lacking.items()
        if not alike(group.get(key, default), default)
    ]


def _adam(described: Mapping[str, Any]) -> _Adam | None:
    """None if it is none of the four, or nothing says in which mode."""
    kind, groups = real_class(described["class"]), described["groups"]
    if kind in _DEEPSPEEDS and "adam_w_mode" in described:
        return _Adam(described["adam_w_mode"], torchs=False)
    # Others have an AdamW of their own: torch's is known by what its groups have.
    if kind in _TORCHS and all(group.keys() >= _TORCH_ONLY.keys() for group in groups):
        modes = [group.get("decoupled_weight_decay", kind == "AdamW") for group in groups]
        if modes and all(mode is modes[0] for mode in modes) and isinstance(modes[0], bool):
            return _Adam(modes[0], torchs=True)
    return None


def _called(described: Mapping[str, Any], adam: _Adam | None) -> str:
    mode = "" if adam is None or adam.torchs else f" with adam_w_mode={adam.decoupled}"
    return f"{described['class']}{mode}"


@dataclass(frozen=True, slots=True)
class Translation:
    """How what one of these optimizers keeps becomes what an equal one of another class keeps."""

    into_torch: bool

    def group(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A group's hyper-parameters, with what the other class has and this one does always."""
        if self.into_torch:
            return {**_TORCH_ONLY, **saved}
        lr = saved.get("lr")
        number = {"lr": lr.item()} if isinstance(lr, torch.Tensor) and lr.numel() == 1 else {}
        return {**_DEEPSPEED_ONLY, **saved, **number}


def translation(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Translation | None:
    """None where nothing is to be translated: both have the same class, or are of the same package, or not equal."""
    one, other = _adam(saved), _adam(live)
    if one is None or other is None or one.torchs == other.torchs or one.decoupled != other.decoupled:
        return None
    return Translation(other.torchs)


def steps_of_groups(saved: Mapping[str, Any], scalars: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Of an optimizer that counts by group (`describe`), how many steps each of its parameters has made."""
    found: dict[str, int] = {}
    if not saved.get("step_by_group"):
        return found
    groups: Sequence[Mapping[str, Any]] = saved["groups"]
    for group in groups:
        counted = [name for name in group["params"] if "step" in scalars.get(name, ())]
        found |= {name: scalars[counted[-1]]["step"] for name in counted}
    return found
