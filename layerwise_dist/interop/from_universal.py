# SPDX-License-Identifier: Apache-2.0
"""Imports DeepSpeed's universal checkpoints, as `ds_to_universal` writes them: one folder a parameter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.interop.deepspeed_files import (
    MODEL,
    files_of,
    hyper_parameters,
    member,
    same,
    take_counters,
    take_model,
)  # fmt: skip
from layerwise_dist.interop.gathered_state import Found, Imported, guess_optimizer
from layerwise_dist.interop.pickles import load


def read(folder: str, *, allowed: bool, buffers: Sequence[str], optimizer: str | None) -> Imported:
    """Raises UnsupportedError, naming what cannot be read; DamageError; OSError."""
    zero, models = os.path.join(folder, "zero"), files_of(folder, MODEL)
    if not models:
        raise UnsupportedError(f"{folder}: it has no model states")
    first = load(models[min(models)], allowed=allowed)
    state = load(os.path.join(zero, "optimizer_state.pt"), allowed=allowed)
    shapes = [dict(each) for each in member(first, "param_shapes", list, models[min(models)])]
    groups = member(state, "param_groups", list, zero)
    found = Imported(folder, framework="deepspeed")
    per_rank = "optimizer_state_dict" in state  # it was made of ZeRO-3, whose steps are with the flat groups
    take_model(found, first, models, 3 if per_rank else 2, len(models), shapes, allowed, buffers)
    counted = _counted(state) if per_rank else None
    owners = list(range(len(groups)))  # of the groups that parameters are listed in
    if len(groups) != len(shapes):  # ZeRO-3 has cut them
        owners = [number for number, group in enumerate(groups) for _ in group.get("params", ())]
    if len(owners) != len(shapes):
        raise UnsupportedError(f"{folder}: {len(groups)} groups of the optimizer, {len(shapes)} of parameters")
    names: list[list[str]] = [[] for _ in groups]
    for owner, listed in zip(owners, shapes, strict=True):
        for name, shape in listed.items():
            names[owner].append(name)
            _parameter(found, zero, name, tuple(shape), counted, allowed)
    found.groups = [hyper_parameters(found, group, number, names[number]) for number, group in enumerate(groups)]
    found.optimizer = optimizer or guess_optimizer(found.groups, found.order.values(), folder)
    take_counters(found, first, state)
    return found


def _counted(state: Mapping[str, Any]) -> Any:
    """The step of all flat groups. Raises UnsupportedError where it differs, since it is not said whose it is."""
    base = member(state, "optimizer_state_dict", dict, "optimizer_state.pt")
    steps = [each["step"] for each in base.get("state", {}).values() if isinstance(each, Mapping) and "step" in each]
    if any(not same(steps[0], other) for other in steps):
        raise UnsupportedError(
            "optimizer_state.pt: the groups' steps differ, and it does not say which parameters' are"
        )
    return steps[0] if steps else None


def _parameter(found: Imported, zero: str, name: str, shape: tuple[int, ...], counted: Any, allowed: bool) -> None:
    folder = os.path.join(zero, name)
    if os.path.basename(name) != name or not os.path.isdir(folder):
        raise UnsupportedError(f"{zero}: it has no folder of {name}")
    kept: dict[str, Any] = {}
    for file in sorted(os.listdir(folder)):
        kind, ext = os.path.splitext(file)
        if ext != ".pt":
            continue
        value = load(os.path.join(folder, file), allowed=allowed)
        if isinstance(value, Mapping):
            if "param" not in value or value.get("vocab_tensor"):
                raise UnsupportedError(f"{folder}: {file}: a vocabulary that is padded, or sub-parameters")
            value = value["param"]
        if isinstance(value, torch.Tensor) and value.numel() == torch.Size(shape).numel() and kind != "step":
            value = value.detach().reshape(shape)
        elif kind != "step":
            raise UnsupportedError(f"{folder}: {file} is not of the shape {list(shape)}")
        if kind == "fp32":
            found.add("master", name, Found.of(value))
        else:
            kept[kind] = value.reshape(()) if isinstance(value, torch.Tensor) and kind == "step" else value
    if f"master/{name}" not in found.tensors:
        raise UnsupportedError(f"{folder}: it has no fp32.pt")
    if counted is not None and "step" not in kept:
        kept = {"step": counted, **kept}
    if "step" in kept:
        kept = {"step": kept.pop("step"), **kept}
    found.add_state(name, kept)
