"""One param group a layer, so that ZeRO's flat units are as many as layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import clean


def param_groups(model: nn.Module, base_groups: Iterable[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Param groups by layer for `deepspeed.initialize(model_parameters=...)` or an optimizer of your own.

    Each of `base_groups` (as torch optimizers take them; by default one with all trainable parameters) is split into
    one group a layer, in the model's order, and keeps its hyper-parameters. ``name`` is the layer's, behind the name of
    a base group that has one. An LR scheduler must be made for these groups, not for the base ones.

    Raises UnsupportedError for a parameter that is not the model's or is in two groups.
    """
    layers = {}
    for name, param in model.named_parameters():
        layers[id(param)] = clean(name).rpartition(".")[0]
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
        prefix = f"{base['name']}/" if "name" in base else ""
        found += [{**base, "params": inside, "name": f"{prefix}{layer}"} for layer, inside in by_layer.items()]
    return found
