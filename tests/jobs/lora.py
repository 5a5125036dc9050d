# SPDX-License-Identifier: Apache-2.0
"""Adapters beside frozen layers: trained with and without checkpoints, and resumed; the frozen layers are merged once.

    lora.py OUT WRAPPER...      OUT/<rank>.json is {wrapper: [what is wrong]}; a wrapper is plain, ddp or fsdp2

Sizes are odd, and any number of bytes is enough for a base.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import contents, differences, process_group, unsound
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist.capture import survey

STEPS, MERGED, STOP = 7, 2, 4  # merged after so many steps


class Adapted(nn.Module):
    """A frozen linear layer, and a trained one of low rank beside it."""

    def __init__(self, inputs: int, outputs: int, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merge(self) -> None:
        """The frozen weight moves. Only its version counter tells."""
        self.base.weight.mul_(0.9).add_(0.01)


class Job:
    """Everything random comes from the global generator. `all_params`: the optimizer is given the frozen ones too."""

    def __init__(self, wrapper: str, seed: int, width: int = 29, *, all_params: bool = True) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(Adapted(13, width), nn.Tanh(), nn.Dropout(0.1), Adapted(width, 7))
        self.model: nn.Module = self.net
        if wrapper == "ddp":
            self.model = DistributedDataParallel(self.net)
        elif wrapper == "fsdp2":
            fully_shard(self.net[0])
            fully_shard(self.net)
        params = self.model.parameters() if all_params else [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(1000 * seed + rank)

    def step(self) -> str:
        loss = self.model(torch.randn(5, 13)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item().hex()

    def train(self, steps: Any) -> list[str]:
        losses = []
        for step in steps:
            if step == MERGED:
                self.net[0].merge()
                self.net[3].merge()
            losses.append(self.step())
        return losses

    def contents(self) -> dict[str, Any]:
        return contents(self.model, self.optimizer)


def trial(wrapper: str, root: str, **options: Any) -> list[str]:
    """What differs between the plain run, the run with checkpoints, and the run that stopped and was resumed."""
    job = Job(wrapper, 1)
    losses = job.train(range(STEPS))
    expected = job.contents()
    commit = {"timeout_s": 30.0, "on_failure": "raise"}
    problems: list[str] = []

    def attach(job: Job, folder: str) -> Any:
        return lwd.attach(job.model, job.optimizer, dir=f"{root}/{folder}", commit=commit, **options)

    def compare(what: str, job: Job, found: list[str], wanted: list[str]) -> None:
        if found != wanted:
            problems.append(f"{what}: losses {found}, expected {wanted}")
        problems.extend(f"{what}: {name}" for name in differences(job.contents(), expected))

    def count(what: str, ckpt: Any, bases: int) -> None:
        written, committed = ckpt.stats()["bases_written"], ckpt.committed_step
        if (written, committed) != (bases, STEPS):
            problems.append(f"{what}: {written} bases were written, not {bases}; committed is {committed}")

    job = Job(wrapper, 1)
    ckpt = attach(job, "on")
    compare("checkpoints on", job, job.train(ckpt.steps(STEPS)), losses)
    ckpt.close()
    count("checkpoints on", ckpt, 2)

    job = Job(wrapper, 1)
    ckpt = attach(job, "stopped")
    job.train(ckpt.steps(STOP))
    ckpt.close()
    job = Job(wrapper, 2)
    ckpt = attach(job, "stopped")
    if ckpt.restore() != STOP:
        problems.append("resumed from another step")
    compare("resumed", job, job.train(ckpt.steps(STEPS)), losses[STOP:])
    ckpt.close()
    count("resumed", ckpt, 0)
    return problems + unsound(f"{root}/stopped")


def main() -> None:
    out = Path(sys.argv[1])
    survey.LEAST_BASE_BYTES = 1
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        if dist.is_initialized():
            dist.broadcast_object_list(paths, src=0)
        results = {wrapper: trial(wrapper, f"{paths[0]}/{wrapper}") for wrapper in sys.argv[2:]}
        (out / f"{rank}.json").write_text(json.dumps(results))
        if dist.is_initialized():
            dist.barrier()


if __name__ == "__main__":
    main()
