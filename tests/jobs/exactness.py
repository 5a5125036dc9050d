# SPDX-License-Identifier: Apache-2.0
"""Trains many small configurations with and without the engine, and resumes each; writes what differs.

    exactness.py WRAPPER[:CAPTURE[:UPDATE]] OUT [OPTIMIZER/]FEATURE...

WRAPPER is one of those below; CAPTURE is lease or stage; UPDATE as configured. A feature is tried with each optimizer,
or with the one that is named. OUT/<rank>.json is {configuration: [differences]}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import contents, differences, process_group, square, unsound
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import layerwise_dist as lwd

STEPS, STOP = 5, 2
CAPTURE = UPDATE = "auto"
FEATURES = ("bare", "clipping", "accumulation", "schedule", "tied", "batchnorm", "unused", "closure", "all")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4, line_search_fn="strong_wolfe"),
}


class Net(nn.Module):
    """An embedding, a block with dropout, a head; all sizes odd, so that no shard is even."""

    def __init__(self, features: set[str], hidden: int = 29) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 13)
        self.block = nn.Sequential(nn.Linear(13, hidden), nn.Tanh(), nn.Dropout(0.2), nn.Linear(hidden, 13))
        self.norm = nn.BatchNorm1d(13) if "batchnorm" in features else nn.Identity()
        self.unused = nn.Linear(7, 3) if "unused" in features else None
        self.head = nn.Linear(13, 19, bias=False)
        if "tied" in features:
            self.head.weight = self.embed.weight
        if "frozen" in features:
            self.embed.requires_grad_(False)
        self.reused, self.recompute = "reused" in features, "recompute" in features

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for _ in range(1 + self.reused):
            hidden = checkpoint(self.block, hidden, use_reentrant=False) if self.recompute else self.block(hidden)
        return self.head(self.norm(hidden))


class Job:
    """One training script. Everything random comes from the global generator, which every rank seeds differently."""

    def __init__(self, wrapper: str, optimizer: str, feature: str, seed: int) -> None:
        self.features = (
            {feature} if feature != "all" else {"clipping", "accumulation", "schedule", "tied", "batchnorm", "unused"}
        )
        torch.manual_seed(seed)
        # Tensor parallelism wants to be even; what each rank has of the rest is odd all the same.
        self.net = Net(self.features, 30 if wrapper == "tp" else 29)
        self.model: nn.Module = self.net
        self.wrapper = wrapper
        self.wrap()
        self.optimizer = self.make(optimizer)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], 0.3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled="scaler" in self.features)
        if "compile" in self.features:
            torch._dynamo.reset()
            self.model = torch.compile(self.model, backend="aot_eager")
        self.steps = {"done": 0}
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(
            1000 * seed + (rank // 2 if wrapper == "tp" else rank)
        )  # two ranks see the same batches there
        self.closure = "closure" in self.features or optimizer == "lbfgs"

    def contents(self) -> dict[str, Any]:
        return contents(self.model, getattr(self.optimizer, "optim", self.optimizer))  # a ZeroRedundancyOptimizer's own

    def make(self, name: str) -> torch.optim.Optimizer:
        make = OPTIMIZERS[name]
        if self.wrapper != "zero":
            return make(self.model.parameters())
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.model.parameters(), lambda groups, **_: make(groups), lr=0.01)

    def wrap(self) -> None:
        net, wrapper = self.net, self.wrapper
        if wrapper in ("ddp", "zero"):
            self.model = DistributedDataParallel(net, find_unused_parameters="unused" in self.features)
        elif wrapper.startswith("fsdp1"):
            _, *kinds = wrapper.split("-")
            options = {"device_id": torch.device("cpu"), "use_orig_params": "flat" not in kinds}
            if "hybrid" in kinds:
                options["device_mesh"] = square("replicas", "shards")
            strategies = {"gradients": "SHARD_GRAD_OP", "whole": "NO_SHARD", "hybrid": "HYBRID_SHARD"}
            for kind in kinds and strategies.keys() & kinds:
                options["sharding_strategy"] = ShardingStrategy[strategies[kind]]
            net.block = FullyShardedDataParallel(net.block, **options)
            self.model = FullyShardedDataParallel(net, **options)
        elif wrapper in ("fsdp2", "hsdp", "tp"):
            mesh = None
            if wrapper == "hsdp":
                mesh = square("replicas", "shards")
            elif wrapper == "tp":
                whole = square("shards", "tensors")
                mesh = whole["shards"]
                parallelize_module(net.block, whole["tensors"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
            fully_shard(net.block, mesh=mesh)
            fully_shard(net, mesh=mesh)

    def step(self) -> str:
        batches = [torch.randint(0, 19, (2, 6)) for _ in range(2 if "accumulation" in self.features else 1)]

        def compute() -> torch.Tensor:
            self.optimizer.zero_grad()
            total = torch.zeros(())
            for number, (tokens, targets) in enumerate(batches):
                last = number == len(batches) - 1
                if self.wrapper in ("ddp", "zero"):
                    self.model.require_backward_grad_sync = last
                elif self.wrapper in ("fsdp2", "hsdp", "tp"):
                    self.net.set_requires_gradient_sync(last)
                loss = nn.functional.cross_entropy(self.model(tokens), targets) / len(batches)
                overflow = "scaler" in self.features and self.steps["done"] == 3
                self.scaler.scale(loss * torch.inf if overflow else loss).backward()
                total = total + loss.detach()
            if "clipping" in self.features:
                if self.wrapper.startswith("fsdp1"):
                    self.model.clip_grad_norm_(0.5)
                else:
                    nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            return total

        if self.closure:
            loss = self.optimizer.step(compute)
        else:
            loss = compute()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.steps["done"] += 1
        if "schedule" in self.features:
            self.scheduler.step()
        return loss.item().hex()


def trial(wrapper: str, optimizer: str, feature: str, root: str, sabotage: bool = False) -> list[str]:
    """What differs between the plain run, the run with the engine, and the run that stopped and was resumed."""
    job = Job(wrapper, optimizer, feature, seed=1)
    losses = [job.step() for _ in range(STEPS)]
    expected = job.contents()

    def attach(job: Job, folder: str, keep: int) -> Any:
        commit = {"timeout_s": 30.0, "on_failure": "raise"}
        config = {"dir": f"{root}/{folder}", "audit": "always", "capture": CAPTURE, "update": UPDATE, "keep_last": keep}
        config |= {"commit": commit, "writer": {"block_kb": 4}}  # so that each layer goes for itself
        state = {"scheduler": job.scheduler, "scaler": job.scaler, "steps": job.steps}
        return lwd.attach(job.model, job.optimizer, config, state=state)

    def compare(what: str, job: Job, found: list[str], wanted: list[str]) -> list[str]:
        problems = [] if found == wanted else [f"{what}: losses {found}, expected {wanted}"]
        return problems + [f"{what}: {name}" for name in differences(job.contents(), expected)]

    job = Job(wrapper, optimizer, feature, seed=1)
    with attach(job, "on", 1) as ckpt:
        problems = compare("engine on", job, [job.step() for _ in ckpt.steps(STEPS)], losses)
    if ckpt.committed_step != STEPS:
        problems.append(f"engine on: committed step is {ckpt.committed_step}")

    job = Job(wrapper, optimizer, feature, seed=1)
    with attach(job, "stopped", 1) as ckpt:
        for _ in ckpt.steps(STOP):
            job.step()
    job = Job(wrapper, optimizer, feature, seed=2)
    if wrapper not in ("ddp", "zero") or feature == "closure":
        # Live optimizer state and gradients to be overwritten. Not for every DDP: an iteration before the restore
        # would lay its buckets out, and hide whether their order is taken up (three ranks then add in another order).
        job.step()
    with attach(job, "stopped", 1) as ckpt:
        if ckpt.restore() != STOP:
            problems.append("resumed: from another step")
        if sabotage:
            with torch.no_grad():
                tensor = job.net.embed.weight
                tensor.view(torch.int32)[0, 0] ^= 1  # one ulp
        problems += compare("resumed", job, [job.step() for _ in ckpt.steps(STEPS)], losses[STOP:])
    return problems + unsound(f"{root}/stopped")


def main() -> None:
    global CAPTURE, UPDATE
    wrapper, CAPTURE, UPDATE = [*sys.argv[1].split(":"), "auto", "auto"][:3]
    out, features = Path(sys.argv[2]), sys.argv[3:] or FEATURES
    optimizers = [name for name in OPTIMIZERS if (wrapper == "plain" and UPDATE == "auto") or name != "lbfgs"]
    cases = [
        (name, feature.rpartition("/")[2])
        for name in optimizers
        for feature in (features if name != "lbfgs" else ("bare", "schedule", "tied"))
        if feature.rpartition("/")[0] in ("", name)
    ]
    results: dict[str, list[str]] = {}
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        if dist.is_initialized():
            dist.broadcast_object_list(paths, src=0)
        for optimizer, feature in cases:
            root = f"{paths[0]}/{optimizer}-{feature}"
            results[f"{optimizer} {feature}"] = trial(wrapper, optimizer, feature, root)
        if wrapper == "plain":
            results["sabotaged"] = trial(wrapper, "adamw-fused", "bare", f"{paths[0]}/sabotaged", sabotage=True)
        (out / f"{rank}.json").write_text(json.dumps(results))
        if dist.is_initialized():
            dist.barrier()


if __name__ == "__main__":
    main()
