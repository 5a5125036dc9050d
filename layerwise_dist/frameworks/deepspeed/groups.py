"""One param group a layer, so that ZeRO's flat units are as many as layers, and LR schedulers fitted to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.names import CleanNames


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


def spread(schedule: Mapping[str, Any], origins: Sequence[int], before: int) -> dict[str, Any]:
    """The state of an LR scheduler of `before` groups for other groups; `origins` has each one's old group."""
    fitted = dict(schedule)
    for name in _OF_EACH_GROUP:
        values = schedule.get(name)
        if isinstance(values, (list, tuple)) and len(values) == before:
            fitted[name] = type(values)([values[origin] for origin in origins])
    if isinstance(schedule.get("_schedulers"), list):  # a scheduler of schedulers
        fitted["_schedulers"] = [
            spread(each, origins, before)
            if isinstance(each, Mapping)
            else _fit(each, origins, before)
            if hasattr(each, "__dict__")
            else each
            for each in schedule["_schedulers"]
        ]
    return fitted


def _fit(scheduler: Any, origins: Sequence[int], before: int) -> Any:
    vars(scheduler).update(spread(vars(scheduler), origins, before))
    return scheduler
