"""Which framework a model is wrapped in, and which adapter its optimizer gets. Refuses the rest by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import Framework
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.deepspeed import DeepSpeedFramework, DeepSpeedOptimizer, is_engine
from layerwise_dist.frameworks.fsdp import FSDP2Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter, TorchOptimizer

_WORKS = (
    "what works: a plain nn.Module, DistributedDataParallel around one, FSDP2 (torch.distributed.fsdp.fully_shard), or "
    "the engine that deepspeed.initialize() returns"
)


def adapt(
    framework: Framework, optimizer: object,
    torch_adapter: Callable[[Framework, object], OptimizerAdapter] = TorchOptimizer,
) -> OptimizerAdapter:  # fmt: skip
    """The adapter of `optimizer`: `torch_adapter` of one of torch's, a DeepSpeed engine's own if None.

    Raises UnsupportedError.
    """
    if not isinstance(framework, DeepSpeedFramework):
        return torch_adapter(framework, optimizer)
    if optimizer is not None and optimizer is not framework.engine.optimizer:
        raise UnsupportedError("a DeepSpeed engine has its optimizer: call attach(engine) without one")
    return DeepSpeedOptimizer(framework)


def detect(model: object, rank: int, world_size: int) -> Framework:
    """Raises UnsupportedError for anything else than a plain module, DDP, FSDP2 or a DeepSpeed engine."""
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"attach() needs a torch.nn.Module, not {type(model).__name__}; {_WORKS}")
    if is_engine(model):
        return DeepSpeedFramework(model, rank, world_size)
    if type(model).__module__.split(".")[0] == "deepspeed":
        raise UnsupportedError(f"DeepSpeed's {type(model).__name__} is not supported by this version; {_WORKS}")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError(f"FullyShardedDataParallel (FSDP1) is not supported by this version; {_WORKS}")
    if any(isinstance(module, nn.Module) and type(module).__name__ == "DataParallel" for module in model.modules()):
        raise UnsupportedError(f"nn.DataParallel is not supported; {_WORKS}")
    sharded = any(isinstance(param, DTensor) for param in model.parameters())
    replicas = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if replicas and (sharded or replicas[0] is not model or len(replicas) > 1):
        raise UnsupportedError(f"DistributedDataParallel inside another module, or together with DTensors; {_WORKS}")
    if sharded:
        return FSDP2Framework(model, rank, world_size)
    if replicas:
        return DDPFramework(model, rank, world_size)
    return Framework(model, rank, world_size)
