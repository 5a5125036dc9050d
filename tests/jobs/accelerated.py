# SPDX-License-Identifier: Apache-2.0
"""A script of Accelerate's that is killed and started again. Every rank tells what it does in OUT/<rank>.jsonl.

accelerated.py DIR OUT [--epochs N] [--accumulate N] [--seedable] [--workers N] [--die-at MICRO_BATCH] [--die-rank R]
    [--plain] [--deepspeed] [--fsdp2]

--fsdp2: the plugin, which Accelerate turns on for several accelerators only. So it is told that the ranks, on CPUs and
gloo, have one each; all that follows is its own.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from job_kit import digest, process_group, teller
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset

from layerwise_dist.integrations.accelerate import attach


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples of 12 numbers that draw from the global generator, in the process that reads them."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x, self.y = torch.randn(size, 12, generator=generator), torch.randn(size, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(12), self.y[index]


class Untold:
    """In place of an engine: the loop as it is without checkpoints."""

    completed = 0

    def epochs(self, total: int) -> range:
        return range(total)

    def close(self) -> None:
        pass


def fsdp2_on_cpus() -> FullyShardedDataParallelPlugin:
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, cpu_ram_efficient_loading=False
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--die-at", type=int, default=-1)
    parser.add_argument("--die-rank", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seedable", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--fsdp2", action="store_true")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    tell = teller(options.out / f"{rank}.jsonl")
    with process_group():
        data = DataLoaderConfiguration(use_seedable_sampler=options.seedable)
        plugin = None
        if options.deepspeed:
            plugin = accelerate.DeepSpeedPlugin(hf_ds_config={
                "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": options.accumulate,
                "zero_optimization": {"stage": 1},
            })  # fmt: skip
        sharding = fsdp2_on_cpus() if options.fsdp2 else None
        accelerator = accelerate.Accelerator(
            cpu=not options.deepspeed, gradient_accumulation_steps=options.accumulate, dataloader_config=data,
            deepspeed_plugin=plugin, fsdp_plugin=sharding,
        )  # fmt: skip
        torch.manual_seed(3)
        model: Any = nn.Sequential(nn.Linear(12, 33), nn.BatchNorm1d(33), nn.Dropout(0.2), nn.Linear(33, 3))
        torch.manual_seed(100 + rank)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
        train: Any = DataLoader(Noisy(46), batch_size=4, shuffle=True, num_workers=options.workers)
        test: Any = DataLoader(Noisy(12), batch_size=4, shuffle=True)
        model, optimizer, scheduler, train, test = accelerator.prepare(model, optimizer, scheduler, train, test)
        history: dict[str, Any] = {"sum": 0.0}
        ckpt: Any = Untold()
        if not options.plain:
            ckpt = attach(
                accelerator, model, optimizer, scheduler, train, dir=options.dir, every_n_steps=options.every,
                state={"history": history}, commit={"timeout_s": 30.0, "on_failure": "raise"},
            )  # fmt: skip
        tell(start=ckpt.completed, sharded=isinstance(model, FSDPModule))
        used = 0
        for epoch in ckpt.epochs(options.epochs):
            model.train()
            for x, y in train:
                with accelerator.accumulate(model):
                    noise = torch.randn(())  # ahead of the forward
                    loss = (model(x) - y).square().mean() + 0.01 * noise
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                history["sum"] += loss.item()
                used += 1
                tell(
                    epoch=epoch, loss=loss.item().hex(), sum=history["sum"].hex(), step=ckpt.completed,
                    lr=optimizer.param_groups[0]["lr"].hex(), window=accelerator.step, passes=train.iteration,
                )  # fmt: skip
                if used == options.die_at:
                    if ckpt.completed:  # on all ranks: one in the next collective does not judge what it has saved
                        ckpt.wait(ckpt.completed)
                    if rank == options.die_rank:
                        os.kill(os.getpid(), signal.SIGKILL)
            model.eval()
            with torch.no_grad():
                seen = [(model(x) - y).square().mean().item().hex() for x, y in test]
            tell(epoch=epoch, seen=seen)
        ckpt.close()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the evaluation's forward, which no backward follows, has left the root whole
        real = model.optimizer if options.deepspeed else optimizer.optimizer
        tell(
            end=ckpt.completed, hash=digest(accelerator.unwrap_model(model), real) if not options.deepspeed else "",
            schedule=scheduler.scheduler.state_dict()["last_epoch"], passes=train.iteration, window=accelerator.step,
        )  # fmt: skip
        del ckpt, model, optimizer, scheduler, train, test, accelerator


if __name__ == "__main__":
    main()
