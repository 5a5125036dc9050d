"""A drop-in for `import deepspeed`: the same names, and `initialize()` turns checkpointing on as ds_config says.

    import layerwise_dist.deepspeed as deepspeed

    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
    engine.layerwise.restore()

All other names are DeepSpeed's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import deepspeed as _deepspeed

from layerwise_dist.assembly import attach
from layerwise_dist.frameworks.deepspeed.groups import param_groups

__all__ = ["initialize", "param_groups"]


def initialize(
    *args: Any, layerwise_state: dict[str, Any] | None = None, layerwise_fresh: bool = False, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize()` with parameters grouped by layer, then `layerwise_dist.attach(engine)`.

    Takes and returns what DeepSpeed's does. The checkpointing engine is `engine.layerwise`; with no
    ``layerwise_checkpoint`` block in the configuration, or ``"enabled": false`` in it, it does nothing.
    `layerwise_state` and `layerwise_fresh` are `attach()`'s `state` and `fresh`.

    Parameters are grouped only if neither `model_parameters` as groups nor an optimizer that has them already is given.
    """
    given = inspect.signature(_deepspeed.initialize).bind(*args, **kwargs).arguments
    optimizer, parameters = given.get("optimizer"), given.get("model_parameters")
    has_groups = optimizer is not None and not callable(optimizer)
    if given.get("model") is not None and not has_groups:
        parameters = None if parameters is None else list(parameters)
        if parameters is None or not all(isinstance(each, dict) for each in parameters):
            base = None if parameters is None else [{"params": [p for p in parameters if p.requires_grad]}]
            given["model_parameters"] = param_groups(given["model"], base)
    engine, optimizer, loader, scheduler = _deepspeed.initialize(**given)
    engine.layerwise = attach(engine, state=layerwise_state, fresh=layerwise_fresh)
    return engine, optimizer, loader, scheduler


def __getattr__(name: str) -> Any:
    return getattr(_deepspeed, name)
