"""Which framework a model is wrapped in. Refuses, by name, what cannot be captured exactly."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import Framework
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.fsdp import FSDP2Framework

_WORKS = (
    "what works: a plain nn.Module, DistributedDataParallel around one, or FSDP2 (torch.distributed.fsdp.fully_shard)"
)


def detect(model: object, rank: int, world_size: int) -> Framework:
    """Raises UnsupportedError for anything else than a plain module, DDP or FSDP2."""
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"attach() needs a torch.nn.Module, not {type(model).__name__}; {_WORKS}")
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
