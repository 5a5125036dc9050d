# SPDX-License-Identifier: Apache-2.0
"""One param group per layer, so that ZeRO has a flat unit for each, and LR schedulers to match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerwise_dist.errors import MismatchError, UnsupportedError
from layerwise_dist.frameworks.names import CleanNames
from layerwise_dist.tensors.values import alike


def param_groups(model: nn.Module, base_groups: Iterable[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Param groups by layer for `deepspeed.initialize(model_parameters=...)` or an optimizer of your own.

    Each of `base_groups` (as torch optimizers take them; by default one with all trainable parameters) is split into
    one group a layer, in the model's order, and keeps its hyper-parameters. ``name`` is the layer's, after the name of
    a base group that has one. Parameters of a layer that is wholly frozen go along with the base group's first layer
    that is not: ZeRO takes no group without a trainable parameter. An LR scheduler must be made for these groups, not
    for the base ones.

    Raises UnsupportedError for a parameter that is not the model's or is in two groups.
    """
    layers = {id(param): names[0].rpartition(".")[0] for param, names in CleanNames(model).parameters()}
    bases = (
        [{"params": [p for p in model.parameters() if p.requires_grad]}] if base_groups is None else list(base_groups)
    )
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for number, base in enumerate(bases):
        params = [base["params"]] if isinstance(base["params"], nn.Parameter) else list(base["params"])
        by_layer: dict[str, list[nn.Parameter]] = {}
        for position, param in enumerate(params):
            if id(param) not in layers:
                raise UnsupportedError(f"parameter {position} of group {number} is not one of the model's")
            if id(param) in seen:
                raise UnsupportedError(f"parameter {position} of group {number} is in a group already")
            seen.add(id(param))
            by_layer.setdefault(layers[id(param)], []).append(param)
        trained = [layer for layer, inside in by_layer.items() if any(param.requires_grad for param in inside)]
        for layer in [layer for layer in by_layer if layer not in trained] if trained else ():
            by_layer[trained[0]] += by_layer.pop(layer)
        prefix = f"{base['name']}/" if "name" in base else ""
        found += [{**base, "params": inside, "name": f"{prefix}{layer}"} for layer, inside in by_layer.items()]
    return found


def split_groups(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object = None) -> None:
    """Splits the groups of an optimizer that is there already by layer, in place, and fits its LR scheduler to them.

    Raises UnsupportedError as `param_groups`.
    """
    before = optimizer.param_groups
    by_layer = [param_groups(model, [group]) for group in before]
    optimizer.param_groups[:] = [group for layers in by_layer for group in layers]
    if scheduler is not None:
        origins = [number for number, layers in enumerate(by_layer) for _ in layers]
        _fit(scheduler, origins, len(by_layer))


# What an LR scheduler keeps for each group: torch's, then DeepSpeed's.
_OF_EACH_GROUP = (
    "base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums",
    "delta_lrs", "min_lr", "min_moms", "max_moms", "org_lrs",
)  # fmt: skip
# Lists that torch's keep and that have nothing to do with groups.
_OF_NO_GROUP = ("_schedulers", "_milestones", "_schedule_phases")


def spread(
    schedule: Mapping[str, Any], origins: Sequence[int], before: int, live: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The state of an LR scheduler of `before` groups for other groups; `origins` has each one's old group.

    `live` is the state of the scheduler that takes it, which tells what somebody's own keeps for each group: lists that
    are as long as there are groups, there and here. Raises MismatchError where that may be so or not.
    """
    fitted = dict(schedule)
    for name, values in schedule.items():
        if not (isinstance(values, list | tuple) and len(values) == before) or name in _OF_NO_GROUP:
            continue
        if name in _OF_EACH_GROUP or _follows_groups(name, values, len(origins), live or {}):
            fitted[name] = type(values)([values[origin] for origin in origins])
    if isinstance(schedule.get("_schedulers"), list):  # a scheduler of schedulers
        inside = live.get("_schedulers") if live is not None else None
        known = inside if isinstance(inside, list) and len(inside) == len(schedule["_schedulers"]) else []
        fitted["_schedulers"] = [
            spread(each, origins, before, known[number] if known and isinstance(known[number], Mapping) else None)
            if isinstance(each, Mapping)
            else _fit(each, origins, before)
            if hasattr(each, "__dict__")
            else each
            for number, each in enumerate(schedule["_schedulers"])
        ]
    return fitted


def _follows_groups(name: str, values: Sequence[Any], now: int, live: Mapping[str, Any]) -> bool:
    here = live.get(name)
    if not isinstance(here, list | tuple) or len(here) != now:
        return False
    if len(values) == now and not all(alike(values[0], value) for value in values):
        raise MismatchError(
            f"the LR scheduler keeps {now} values as {name!r}, and there are {now} param groups, in another order than "
            "in the checkpoint: nothing says which value belongs to which group's. Put the groups in the "
            "checkpoint's order"
        )
    return len(values) != now


def _fit(scheduler: Any, origins: Sequence[int], before: int) -> Any:
    vars(scheduler).update(spread(vars(scheduler), origins, before))
    return scheduler
