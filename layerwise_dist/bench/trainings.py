# SPDX-License-Identifier: Apache-2.0
"""The trainings of `bench train`: a GPT in one process, under FSDP2 or DDP, or under DeepSpeed."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch

from layerwise_dist.bench.model import GPT, Shape, adamw
from layerwise_dist.frameworks.deepspeed import DeepSpeedFramework, param_groups


class Training:
    """A model and its optimizer. With several ranks the default process group is there, and FSDP2 shards the model, or
    with `ddp` each rank holds all of it.
    """

    def __init__(self, shape: Shape, optimizer: str, ranks: int, *, ddp: bool = False) -> None:
        self.model: Any = GPT(shape)
        if ddp:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        elif ranks > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (ranks,))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer: Any = adamw(self.model.parameters(), optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def tensors(self) -> list[torch.Tensor]:
        """This rank's parts of the parameters and the optimizer's state."""
        tensors = list(self.model.parameters())
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]

    def state_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def close(self) -> None:
        """FSDP's threads must be gone before the interpreter goes."""
        del self.model, self.optimizer
        gc.collect()


class DeepSpeedTraining(Training):
    """ZeRO in fp32, with one param group a layer. The optimizer is the engine's step, whose gradients it clears."""

    def __init__(self, shape: Shape, optimizer: str, ranks: int, stage: int) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # It is compiled for a minute, and only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        model = GPT(shape)
        config = {
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "steps_per_print": 1_000_000,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        steps = adamw(param_groups(model), optimizer)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=steps, config=config)
        self.optimizer = _EngineStep(self.model)
        self._ranks = ranks

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)

    def tensors(self) -> list[torch.Tensor]:
        units = DeepSpeedFramework(self.model, self.model.global_rank, self._ranks).units
        tensors: list[torch.Tensor] = []
        for number in range(len(units.groupings())):
            tensors += [units.tensor(number), *units.state(number).values()]
        return tensors


class _EngineStep:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def step(self) -> None:
        self._engine.step()

    def zero_grad(self) -> None:
        pass
