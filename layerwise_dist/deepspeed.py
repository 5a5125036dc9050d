# SPDX-License-Identifier: Apache-2.0
"""A drop-in for `import deepspeed`: the same names, and `initialize()` turns checkpointing on as ds_config says.

    import layerwise_dist.deepspeed as deepspeed

    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
    engine.layerwise.restore()                      # or, as in any script of DeepSpeed's:
    path, client_state = engine.load_checkpoint("checkpoints")

All other names are DeepSpeed's own.
"""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any, cast

import deepspeed as _deepspeed
import torch
from deepspeed import initialize as _initialize  # a script may put this module's in its place

from layerwise_dist import unattached
from layerwise_dist.config import LayerwiseConfig, load_config
from layerwise_dist.engine.assembly import attach
from layerwise_dist.engine.at_exit import open_directories
from layerwise_dist.engine.deepspeed_calls import CheckpointCalls
from layerwise_dist.engine.disabled import DisabledEngine
from layerwise_dist.engine.engine import LayerwiseEngine, workings_of
from layerwise_dist.engine.on_call import OnCall
from layerwise_dist.errors import ConfigError
from layerwise_dist.frameworks.deepspeed.groups import param_groups, split_groups
from layerwise_dist.frameworks.deepspeed.support import config_block
from layerwise_dist.rehearsal.plan import redirected

log = logging.getLogger("layerwise_dist")
unattached.watch()

__all__ = ["initialize", "param_groups", "serve_checkpoint_calls"]


def initialize(
    *args: Any, layerwise_state: dict[str, Any] | None = None, layerwise_fresh: bool = False, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize()` with parameters grouped by layer, then `layerwise_dist.attach(engine)`.

    Takes and returns what DeepSpeed's does. The checkpointing engine is `engine.layerwise`, closed at the process's
    exit if not before (an iteration that is open then is not saved); it serves `engine.save_checkpoint()` and
    `engine.load_checkpoint()`. With no ``layerwise_checkpoint`` block in the configuration, or ``"enabled": false`` in
    it, the two are DeepSpeed's own.
    `layerwise_state` and `layerwise_fresh` are `attach()`'s `state` and `fresh`.

    Groups that are given, in `model_parameters` or in an optimizer, are split by layer and keep their hyper-parameters.
    An LR scheduler that is given with such an optimizer is fitted to them.
    """
    given = inspect.signature(_initialize).bind(*args, **kwargs).arguments
    model, optimizer, scheduler = given.get("model"), given.get("optimizer"), given.get("lr_scheduler")
    if isinstance(optimizer, torch.optim.Optimizer):
        split_groups(cast(torch.nn.Module, model), optimizer, None if callable(scheduler) else scheduler)
    elif model is not None:
        given["model_parameters"] = param_groups(model, _bases(given.get("model_parameters")))
    engine, optimizer, loader, scheduler = _initialize(**given)
    folder: dict[str, Any] = {}
    settings = _settings(engine)
    if settings.enabled and (own := _own_folder(settings.path)) != settings.path:
        folder = {"dir": own}
        log.warning(
            "another engine of this process saves in %s: this one saves in %s. Give each a directory of its own, or "
            "attach both as one with layerwise_dist.attach(models={...})", settings.path, own
        )  # fmt: skip
    engine.layerwise = attach(engine, state=layerwise_state, fresh=layerwise_fresh, **folder)
    serve_checkpoint_calls(engine, engine.layerwise, settings.path)
    return engine, optimizer, loader, scheduler


def _settings(engine: Any) -> LayerwiseConfig:
    """What its block says; of one that is bad `attach()` tells all ranks."""
    try:
        block = config_block(engine)
        return LayerwiseConfig(enabled=False) if block is None else load_config(block)
    except ConfigError:
        return LayerwiseConfig(enabled=False)


def _own_folder(path: str) -> str:
    """`path`, or a folder in it if an engine of this process that is open saves there already."""
    taken = set(map(os.path.realpath, open_directories()))
    number, own = 1, path
    while os.path.realpath(redirected(own)) in taken:
        number += 1
        own = os.path.join(path, f"engine{number}")
    return own


def serve_checkpoint_calls(engine: Any, ckpt: LayerwiseEngine | DisabledEngine, asked_for: str | None = None) -> None:
    """From now on `engine.save_checkpoint()` and `engine.load_checkpoint()` make and restore checkpoints of `ckpt`.

    `ckpt` is what `attach(engine)` returned; if it is disabled, the calls stay DeepSpeed's. `asked_for` is another
    name under which the script knows the directory of `ckpt`. Raises UnsupportedError.
    """
    if isinstance(ckpt, LayerwiseEngine):
        folder = ckpt.config.path if asked_for is None else asked_for
        way_on = (
            f"call engine.load_checkpoint({folder!r}) or engine.layerwise.restore() before the first step, or pass "
            "layerwise_fresh=True to initialize() to start anew beside them"
        )
        CheckpointCalls(engine, OnCall(workings_of(ckpt), way_on), folder)


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
