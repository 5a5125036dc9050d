# SPDX-License-Identifier: Apache-2.0
"""Replicas that drift: one bit of one parameter flips on one rank, again and again; or nothing does.

    drift.py OUT KIND TRIALS STEPS      OUT/<rank>.json is what is wrong

KIND is ddp, hsdp (two ranks or four) or zero0. After TRIALS trials, each with a flip that must be named within a
hundred checkpoints, a run of STEPS steps must find nothing.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import local, process_group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist import errors


class Net(nn.Module):
    """Batch statistics, which differ from rank to rank between two forwards: they are nobody's replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


class Job:
    def __init__(self, kind: str) -> None:
        torch.manual_seed(1)
        net: nn.Module = Net()
        self.engine: Any = None
        if kind == "zero0":
            from zero_kit import deepspeed, prepare, settings

            prepare()
            self.engine, *_ = deepspeed.initialize(
                model=net, optimizer=torch.optim.AdamW(net.parameters(), lr=1e-3), config=settings(0, set())
            )
            self.model: nn.Module = self.engine
        elif kind == "hsdp":
            world = dist.get_world_size()
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
            self.model = fully_shard(net, mesh=mesh)
        else:
            self.model = DistributedDataParallel(net)
        if self.engine is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.params = {name.rpartition("module.")[2]: param for name, param in self.model.named_parameters()}

    def attach(self, folder: str) -> Any:
        made = (self.model,) if self.engine is not None else (self.model, self.optimizer)
        return lwd.attach(*made, dir=folder, commit={"timeout_s": 60.0})

    def step(self) -> None:
        loss = self.model(torch.randn(2, 6)).square().mean()
        if self.engine is not None:
            self.engine.backward(loss)
            self.engine.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def flip(self, chance: random.Random) -> str:
        """A middle bit of a value that is not nearly zero: the loss stays a number, and no update rounds it away.
        Which parameter's.
        """
        name, values, places = chance.choice(
            [
                (name, values, places)
                for name, param in sorted(self.params.items())
                for values in [local(param.detach()).view(-1)]
                if len(places := (values.abs() > 1e-4).nonzero().view(-1).tolist())
            ]
        )
        values.view(torch.int32)[chance.choice(places)] ^= 1 << chance.randrange(14, 21)
        return name


def trial(kind: str, number: int, folder: str) -> list[str]:
    """What is not said of a bit that flips on one rank."""
    job, chance = Job(kind), random.Random(number)
    rank, when = chance.randrange(dist.get_world_size()), chance.randrange(1, 4)
    with_it = dist.get_rank() == rank
    name = [""]
    ckpt = job.attach(folder)
    try:
        for step in ckpt.steps(when + 100):
            job.step()
            if step == when:
                name[0] = job.flip(chance) if with_it else ""
                dist.broadcast_object_list(name, rank)
            if step:
                ckpt.wait(step)
        ckpt.close()
        return [f"trial {number}: {name[0]} on rank {rank} was not found"]
    except errors.CommitError as error:
        text = str(error)
        alone = dist.get_world_size() < 3 or kind == "hsdp" or f"(rank {rank} against" in text
        ckpt.close()
        named = any(f"{kept}/{name[0]} (block 0" in text for kept in ("param", "master"))  # ZeRO has the latter
        said = named and f"rank {rank}" in text and " at step " in text
        return [] if said and alone else [f"trial {number}: {name[0]} on rank {rank}: {text}"]


def main() -> None:
    out, kind, trials, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    problems: list[str] = []
    with process_group() as rank:
        for number in range(trials + 1):
            folder = [tempfile.mkdtemp(dir=out) if rank == 0 else ""]
            dist.broadcast_object_list(folder)
            if number < trials:
                problems += trial(kind, number, folder[0])
                continue
            job = Job(kind)
            with job.attach(folder[0]) as ckpt:
                for _ in ckpt.steps(steps):
                    job.step()
            if ckpt.stats()["checkpoints_aborted"] or ckpt.stats()["replica_drifts"]:
                problems.append(f"a healthy run: {ckpt.stats()}")
    (out / f"{rank}.json").write_text(json.dumps(problems))


if __name__ == "__main__":
    main()
