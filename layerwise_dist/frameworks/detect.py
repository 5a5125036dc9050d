# SPDX-License-Identifier: Apache-2.0
"""Detects a model's wrapper and an optimizer's adapter. Refuses the rest by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.compiled import without_compiled_wrapper
from layerwise_dist.frameworks.composite import CompositeFramework, CompositeOptimizer, check_names
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.deepspeed import DeepSpeedFramework, DeepSpeedOptimizer, is_engine
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.fsdp import FSDP2Framework
from layerwise_dist.frameworks.fsdp1 import FSDP1FlatOptimizer, FSDP1Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.private_names import require
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer
from layerwise_dist.frameworks.unwrapping import unwrap
from layerwise_dist.frameworks.zero_redundancy import ZeroRedundancyAdapter, is_zero_redundancy

_WORKS = (
    "what works: a plain nn.Module, DistributedDataParallel around one, FSDP2 (torch.distributed.fsdp.fully_shard), "
    "FSDP1 (FullyShardedDataParallel), or the engine that deepspeed.initialize() returns"
)

TorchAdapter = Callable[[Framework, object], OptimizerAdapter]


def find_framework(model: object, models: Mapping[str, object] | None, rank: int, world_size: int) -> Framework:
    """The framework of one model, or of several by name. Raises UnsupportedError, as `detect`."""
    if models is None:
        return detect(model, rank, world_size)
    if model is not None:
        raise UnsupportedError("attach() takes either a model or models={name: model}, not both")
    check_names("models", models)
    return CompositeFramework({name: detect(each, rank, world_size, name) for name, each in models.items()})


def find_optimizer(
    framework: Framework, optimizer: object, optimizers: Mapping[str, object] | None, torch_adapter: TorchAdapter,
    update: str = "auto",
) -> OptimizerAdapter:  # fmt: skip
    """The adapter of one optimizer, or of several by name. DeepSpeed engines bring their own, under the model's name.

    `torch_adapter` makes that of one of torch's; `update`, the configuration's, is for an engine's. Raises
    UnsupportedError.
    """
    parts = framework.parts if isinstance(framework, CompositeFramework) else {}
    engines = {name: part for name, part in parts.items() if isinstance(part, DeepSpeedFramework)}
    if optimizers is None and not engines:
        return adapt(framework, optimizer, torch_adapter, update)
    if optimizer is not None:
        raise UnsupportedError(
            "attach() takes one optimizer, or optimizers={name: optimizer}; the latter beside engines"
        )
    if optimizers is not None:
        check_names("optimizers", optimizers)
    given = dict(optimizers or {})
    if twice := sorted(given.keys() & engines.keys()):
        raise UnsupportedError(f"optimizers: {twice[0]!r} is a DeepSpeed engine, which brings its own: leave it out")
    members = {name: adapt(framework, each, torch_adapter) for name, each in given.items()}
    return CompositeOptimizer(
        framework, members | {name: adapt(part, None, torch_adapter) for name, part in engines.items()}
    )


def adapt(
    framework: Framework, optimizer: object, torch_adapter: TorchAdapter, update: str = "auto"
) -> OptimizerAdapter:
    """The adapter of `optimizer`: `torch_adapter` of one of torch's, a DeepSpeed engine's own if None.

    Raises UnsupportedError.
    """
    if not isinstance(framework, DeepSpeedFramework):
        special: TorchOptimizer | None = None
        real, _ = unwrap(optimizer)
        require("a torch optimizer")
        if is_zero_redundancy(real):
            require("ZeroRedundancyOptimizer")
            special = ZeroRedundancyAdapter(framework, optimizer)
        elif flat := _flat_parts(framework, real):
            special = FSDP1FlatOptimizer(flat[0], optimizer)
        if special is not None and torch_adapter is not TorchOptimizer:
            raise UnsupportedError(f"{special.kind}, layer by layer: {special.whole_only}; use update = 'auto'")
        return special or torch_adapter(framework, optimizer)
    own = framework.engine.optimizer
    if optimizer is not None and optimizer is not own and getattr(optimizer, "optimizer", None) is not own:
        raise UnsupportedError("a DeepSpeed engine has its optimizer: call attach(engine) without one")
    return DeepSpeedOptimizer(framework, update)


def _flat_parts(framework: Framework, optimizer: object) -> list[FSDP1Framework]:
    """Those whose flat parameters this optimizer holds."""
    parts = framework.parts.values() if isinstance(framework, CompositeFramework) else [framework]
    held = {id(param) for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}
    return [
        part for part in parts if isinstance(part, FSDP1Framework) and part.holds_flat and held & part.names().keys()
    ]


def detect(model: object, rank: int, world_size: int, prefix: str = "") -> Framework:
    """The framework of one model; `prefix` is its name among several.

    Raises UnsupportedError for anything else than a plain module, DDP, FSDP1, FSDP2 or a DeepSpeed engine.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"attach() needs a torch.nn.Module, not {type(model).__name__}; {_WORKS}")
    require("any model")
    if is_engine(model):
        return DeepSpeedFramework(model, rank, world_size, prefix)
    if type(model).__module__.split(".")[0] == "deepspeed":
        raise UnsupportedError(f"DeepSpeed's {type(model).__name__} is not supported by this version; {_WORKS}")
    if any(isinstance(module, nn.Module) and type(module).__name__ == "DataParallel" for module in model.modules()):
        raise UnsupportedError(f"nn.DataParallel is not supported; {_WORKS}")
    model = without_compiled_wrapper(model)
    sharded = any(isinstance(param, DTensor) for param in model.parameters())
    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    replicas = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if replicas and (sharded or flat or replicas[0] is not model or len(replicas) > 1):
        raise UnsupportedError(f"DistributedDataParallel inside another module, or together with FSDP; {_WORKS}")
    if flat and sharded:
        raise UnsupportedError(f"FullyShardedDataParallel (FSDP1) together with DTensors; {_WORKS}")
    if flat:
        require("FSDP1")
        return FSDP1Framework(model, rank, world_size, prefix)
    if sharded:
        require("DTensors (FSDP2, tensor parallelism)")
        return FSDP2Framework(model, rank, world_size, prefix)
    if replicas:
        require("DistributedDataParallel")
        return DDPFramework(model, rank, world_size, prefix)
    return Framework(model, rank, world_size, prefix)
