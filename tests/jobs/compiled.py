# SPDX-License-Identifier: Apache-2.0
"""A small model under torch.compile, trained without and with the engine, and resumed; writes what differs.

    compiled.py BACKEND OUT WRAPPER[:HOW]...      OUT/<rank>.json is {case: [differences]}

WRAPPER is plain, ddp or fsdp2, HOW one of HOWS. BACKEND is torch.compile's: aot_eager traces, and compiles nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import contents, differences, process_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist import LayerwiseOptimizer
from layerwise_dist.engine import hooks

STEPS, STOP = 5, 3
# What of the model is compiled: all of it by torch.compile(), all of it in place, or each block by itself.
HOWS = ("whole", "in place", "blocks")
UPDATES = ("whole", "pipelined_step", "in_backward")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(torch.tanh(self.one(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(wrapper: str, how: str, backend: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    torch._dynamo.reset()
    net = Net()
    if how == "blocks":
        for block in net.blocks:
            block.compile(backend=backend)
    if wrapper == "fsdp2":
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
    if how == "in place":
        net.compile(backend=backend)
    model: nn.Module = torch.compile(net, backend=backend) if how == "whole" else net
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: Any, number: int) -> str:
    rank = dist.get_rank() if dist.is_initialized() else 0
    tokens = torch.randint(16, (4, 3), generator=torch.Generator().manual_seed(100 * number + rank))
    optimizer.zero_grad()
    loss = model(tokens).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item().hex()


def trial(wrapper: str, how: str, backend: str, update: str, root: str) -> list[str]:
    def attach(job: tuple[nn.Module, Any]) -> Any:
        commit = {"timeout_s": 30.0, "on_failure": "raise"}
        return lwd.attach(*job, dir=root, update=update, audit="always", commit=commit)

    job = build(wrapper, how, backend, seed=1)
    losses = [step(*job, number) for number in range(STEPS)]
    expected = contents(*job)
    job = build(wrapper, how, backend, seed=1)
    problems = []
    if update != "whole":
        layered = LayerwiseOptimizer(job[1], job[0], mode=update)
        found = [step(job[0], layered, number) for number in range(STEPS)]
        problems += [f"layers: {name}" for name in differences(contents(*job), expected)]
        problems += [] if found == losses else ["layers: losses"]
        job = build(wrapper, how, backend, seed=1)
    with attach(job) as ckpt:
        found = [step(*job, number) for number in ckpt.steps(STOP)]
    job = build(wrapper, how, backend, seed=2)
    with attach(job) as ckpt:
        if ckpt.restore() != STOP:
            problems.append("not restored")
        found += [step(*job, number) for number in ckpt.steps(STEPS)]
    problems += [] if found == losses else [f"losses {found}, expected {losses}"]
    return problems + differences(contents(*job), expected)


def mutation(root: str) -> list[str]:
    """A hook that is traced is heard of."""
    hooks.eager = lambda hook: hook
    try:
        trial("plain", "in place", "aot_eager", "whole", root)
    except torch._dynamo.exc.InternalTorchDynamoError as error:
        return [] if "does not know how to trace" in str(error) else [str(error)]
    return ["nothing was heard of a traced hook"]


def main() -> None:
    backend, out, wrappers = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    results: dict[str, list[str]] = {}
    # Dynamo says so when it meets something of ours that it should never have looked at.
    warnings.filterwarnings("error", message="Dynamo does not know how to trace")
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        if dist.is_initialized():
            dist.broadcast_object_list(paths, src=0)
        for wrapper, _, only in (each.partition(":") for each in wrappers):
            for how in [only] if only else HOWS:
                for update in UPDATES if backend == "inductor" else ("whole", "in_backward"):
                    case = f"{wrapper} {how} {update}"
                    results[case] = trial(wrapper, how, backend, update, f"{paths[0]}/{case}")
        if "plain" in wrappers:
            results["mutation"] = mutation(f"{paths[0]}/mutation")
        (out / f"{rank}.json").write_text(json.dumps(results))
        if dist.is_initialized():
            dist.barrier()


if __name__ == "__main__":
    main()
