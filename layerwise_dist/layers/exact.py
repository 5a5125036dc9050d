# SPDX-License-Identifier: Apache-2.0
"""What can be updated one layer at a time, bit for bit as in a whole step; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.averaging import Averaging
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.frameworks.overlaps import LayersApart
from layerwise_dist.frameworks.subset_step import SubsetStep
from layerwise_dist.layers.gradients import Arrivals

Mode = Literal["pipelined_step", "in_backward"]
_INSTEAD = "; mode='pipelined_step' is exact here"


def check_layered(optimizer: torch.optim.Optimizer, model: nn.Module, mode: Mode, views: Sequence[ParamView]) -> None:
    """Raises UnsupportedError with the reason if this optimizer, wrapper or model cannot be stepped by layers exactly.

    `model` is without the wrapper of torch.compile; `views` are all its parameters.
    """
    SubsetStep(optimizer)
    LayersApart(views).check(optimizer.param_groups)
    if mode == "in_backward":
        _check_wrapper(model)


def _check_wrapper(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        try:
            Averaging.check(model)
        except UnsupportedError as error:
            raise UnsupportedError(f"in_backward under DDP: {error}{_INSTEAD}") from None
        return
    modules = list(model.modules())
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        raise UnsupportedError("in_backward with DDP inside the model: give DDP itself as the model" + _INSTEAD)
    units = [module for module in modules if isinstance(module, FullyShardedDataParallel)]
    if not all(unit._use_orig_params for unit in units):
        raise UnsupportedError("in_backward under FSDP1 needs use_orig_params=True" + _INSTEAD)
    sharded = bool(units) or any(isinstance(param, DTensor) for param in model.parameters())
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not sharded:
        raise UnsupportedError(
            f"in_backward in a job of {dist.get_world_size()} ranks: without DDP or FSDP, nothing shows when "
            "gradients are reduced" + _INSTEAD
        )


def check_observed(optimizer: torch.optim.Optimizer, arrivals: Arrivals) -> None:
    """Raises UnsupportedError for what would make an update in this backward inexact. Nothing was updated in it."""
    check_scaler(optimizer)
    for fqn, count in arrivals.fires.items():
        if count > 1:
            raise UnsupportedError(
                f"in_backward: the gradient of {fqn} arrived {count} times in one iteration (accumulation, several "
                "backwards, or reentrant activation checkpointing of a shared layer)" + _INSTEAD
            )
    if sparse := arrivals.sparse():
        raise UnsupportedError(f"in_backward: the gradient of {sparse[0]} is sparse" + _INSTEAD)
    if changed := arrivals.changed():
        raise UnsupportedError(
            f"in_backward: the gradient of {changed[0]} is changed between its arrival and step() (clipping, a scaler, "
            "or a hook)" + _INSTEAD
        )


def check_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Raises UnsupportedError if a GradScaler steps it."""
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise UnsupportedError("in_backward with a GradScaler: it needs all gradients before the update" + _INSTEAD)
