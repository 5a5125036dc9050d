# SPDX-License-Identifier: Apache-2.0
"""torchtitan's way: a checkpoint manager with the interface of its own, on top of `layerwise_dist`.

    python examples/torchtitan_way.py --dir checkpoints/titan
    torchrun --standalone --nproc-per-node 2 examples/torchtitan_way.py --dir checkpoints/titan-fsdp

torchtitan's Trainer builds one of `model_parts`, OptimizersContainer, `lr_schedulers`, `dataloader` and
`{"train_state": trainer}`, then calls `load()` before its loop, `save(step, last_step)` after each step, and `close()`.
`LayerwiseCheckpointManager` takes and answers just that. What stands around it here has the shape of torchtitan 0.3's
classes (several model parts, one optimizer a part, containers around both), so that this runs without torchtitan.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import layerwise_dist as lwd


class LayerwiseCheckpointManager:
    """Every step ends in `save()`. Which of them are saved says `every_n_steps`, and the last one is in any case."""

    def __init__(
        self, *, dataloader: Any, model_parts: list[nn.Module], optimizers: Any, lr_schedulers: Any,
        states: dict[str, Any], **config: Any,
    ) -> None:  # fmt: skip
        parts = {f"part_{number}": part for number, part in enumerate(model_parts)}
        inner = {f"optimizer_{number}": each for number, each in enumerate(optimizers.optimizers)}
        state = {"lr_scheduler": lr_schedulers, "dataloader": dataloader, **states}
        self.ckpt = lwd.attach(models=parts, optimizers=inner, state=state, **config)
        self.ckpt.explicit()

    def load(self, step: int = -1) -> bool:
        return (self.ckpt.restore() if step == -1 else self.ckpt.restore(step)) > 0

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        self.ckpt.end_step()
        if self.ckpt.completed != curr_step:
            raise RuntimeError(f"torchtitan is at step {curr_step}, the checkpoints at step {self.ckpt.completed}")
        return True

    def maybe_wait_for_staging(self) -> None:
        """An update waits by itself for what is still read of its own layers."""

    def close(self) -> None:
        self.ckpt.close()


class OptimizersContainer:
    def __init__(self, model_parts: list[nn.Module], lr: float) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=lr) for part in model_parts]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class LRSchedulersContainer:
    """As torchtitan's: the learning rate is a function of `last_epoch`, which is all that its state tells."""

    def __init__(self, optimizers: OptimizersContainer, warmup: int) -> None:
        self.schedulers = [LambdaLR(each, lambda step: min(1.0, (step + 1) / warmup)) for each in optimizers.optimizers]

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch = state["last_epoch"]


class Trainer:
    def __init__(self, directory: str) -> None:
        torch.manual_seed(0)
        self.rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        width = 32
        self.model_parts: list[nn.Module] = [
            nn.Sequential(nn.Embedding(64, width), nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)),
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 64)),
        ]
        if world > 1:
            for part in self.model_parts:
                fully_shard(part)
        self.optimizers = OptimizersContainer(self.model_parts, lr=3e-3)
        self.lr_schedulers = LRSchedulersContainer(self.optimizers, warmup=10)
        tokens = torch.randint(0, 64, (256, 17), generator=torch.Generator().manual_seed(1))
        mine = TensorDataset(tokens[self.rank :: world])
        self.dataloader = DataLoader(mine, 8, shuffle=True, generator=torch.Generator().manual_seed(2))
        self.step, self.ntokens_seen = 0, 0
        torch.manual_seed(self.rank)
        self.checkpointer = LayerwiseCheckpointManager(
            dataloader=self.dataloader, model_parts=self.model_parts, optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers, states={"train_state": self}, dir=directory,
        )  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]

    def batches(self) -> Iterator[torch.Tensor]:
        while True:
            for (batch,) in self.dataloader:
                yield batch

    def train_step(self, data: Iterator[torch.Tensor]) -> float:
        self.optimizers.zero_grad()
        batch = next(data)
        hidden = batch[:, :-1]
        for part in self.model_parts:
            hidden = part(hidden)
        loss = nn.functional.cross_entropy(hidden.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizers.step()
        self.lr_schedulers.step()
        self.ntokens_seen += batch.numel()
        return loss.item()

    def train(self, steps: int) -> None:
        self.checkpointer.load()
        self.say(f"training starts at step {self.step + 1}")
        data = self.batches()
        while self.step < steps:
            self.step += 1
            loss = self.train_step(data)
            self.checkpointer.save(self.step, last_step=self.step == steps)
            self.say(f"step {self.step} loss {loss:.9g} tokens {self.ntokens_seen}")
        self.checkpointer.close()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints/titan")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    Trainer(given.dir).train(given.steps)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
