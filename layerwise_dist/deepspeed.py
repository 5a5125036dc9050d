"""A drop-in for `import deepspeed`: the same names, and `initialize()` turns checkpointing on as ds_config says.

    import layerwise_dist.deepspeed as deepspeed

    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
    engine.layerwise.restore()                      # or, as in any script of DeepSpeed's:
    path, client_state = engine.load_checkpoint("checkpoints")

All other names are DeepSpeed's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import deepspeed as _deepspeed
import torch

from layerwise_dist.assembly import attach
from layerwise_dist.disabled import DisabledEngine
from layerwise_dist.engine import LayerwiseEngine
from layerwise_dist.frameworks.deepspeed.calls import CheckpointCalls
from layerwise_dist.frameworks.deepspeed.groups import param_groups, split_groups

__all__ = ["initialize", "param_groups", "serve_checkpoint_calls"]


def initialize(
    *args: Any, layerwise_state: dict[str, Any] | None = None, layerwise_fresh: bool = False, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize()` with parameters grouped by layer, then `layerwise_dist.attach(engine)`.

    Takes and returns what DeepSpeed's does. The checkpointing engine is `engine.layerwise`, closed at the process's
    exit if not before (an iteration that is open then is not saved); it serves `engine.save_checkpoint()` and
    `engine.load_checkpoint()`. With no
    ``layerwise_checkpoint`` block in the configuration, or ``"enabled": false`` in it, the two are DeepSpeed's own.
    `layerwise_state` and `layerwise_fresh` are `attach()`'s `state` and `fresh`.

    Groups that are given, in `model_parameters` or in an optimizer, are split by layer and keep their hyper-parameters.
    An LR scheduler that is given with such an optimizer is fitted to them.
    """
    given = inspect.signature(_deepspeed.initialize).bind(*args, **kwargs).arguments
    model, optimizer, scheduler = given.get("model"), given.get("optimizer"), given.get("lr_scheduler")
    if isinstance(optimizer, torch.optim.Optimizer):
        split_groups(model, optimizer, None if callable(scheduler) else scheduler)
    elif model is not None:
        given["model_parameters"] = param_groups(model, _bases(given.get("model_parameters")))
    engine, optimizer, loader, scheduler = _deepspeed.initialize(**given)
    engine.layerwise = attach(engine, state=layerwise_state, fresh=layerwise_fresh)
    serve_checkpoint_calls(engine, engine.layerwise)
    return engine, optimizer, loader, scheduler


def serve_checkpoint_calls(engine: Any, ckpt: LayerwiseEngine | DisabledEngine) -> None:
    """From now on `engine.save_checkpoint()` and `engine.load_checkpoint()` make and restore checkpoints of `ckpt`.

    `ckpt` is what `attach(engine)` returned; if it is disabled, the calls stay DeepSpeed's. Raises UnsupportedError.
    """
    if isinstance(ckpt, LayerwiseEngine):
        CheckpointCalls(engine, ckpt)


def _bases(parameters: Any) -> list[dict[str, Any]] | None:
    """`model_parameters` of `deepspeed.initialize()` (parameters, groups or nothing) as groups."""
    if parameters is None:
        return None
    given = list(parameters)
    if all(isinstance(each, dict) for each in given):
        return given
    return [{"params": [param for param in given if param.requires_grad]}]


def __getattr__(name: str) -> Any:
    return getattr(_deepspeed, name)
