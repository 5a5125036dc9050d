# SPDX-License-Identifier: Apache-2.0
"""State that an optimizer keeps under strings and in attributes, under every wrapper: cut, resumed and compared.

Arguments: a folder. Each rank writes <rank>.json: what differs, by wrapper.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import differences, process_group
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist import errors

warnings.filterwarnings("ignore")


class Counting(torch.optim.SGD):
    """Its steps fall with two counts, one under a string, one told; each rank counts in its own steps."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.k = 0
        self.state["n"] = torch.zeros(2)  # type: ignore[index]

    def step(self, closure: Any = None) -> None:
        self.k += 1 + dist.get_rank()
        self.state["n"] += self.k
        for group in self.param_groups:
            group["lr"] = 0.1 / (1 + float(self.state["n"].sum()) / 100 / (1 + dist.get_rank()))
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "k": self.k}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.k = state_dict["k"]


def build(wrapper: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Counting]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if wrapper in ("ddp", "zero"):
        model = DistributedDataParallel(model)
    elif wrapper == "fsdp2":
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
    if wrapper == "zero":
        outer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Counting, lr=0.1)
        return model, outer, outer.optim
    optimizer = Counting(model.parameters())
    return model, optimizer, optimizer


def run(root: Path, wrapper: str, total: int, seed: int) -> dict[str, Any]:
    model, optimizer, counting = build(wrapper, seed)
    with lwd.attach(model, optimizer, dir=str(root), commit={"on_failure": "raise"}) as ckpt:
        ckpt.restore()
        for step in ckpt.steps(total):
            model(torch.full((2, 5), step / 7)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ckpt.wait(total)
    held = {f"p{number}": param.detach() for number, param in enumerate(model.parameters())}
    held = {name: each.to_local() if hasattr(each, "to_local") else each for name, each in held.items()}
    return {**held, "k": counting.k, "n": counting.state["n"], "lr": counting.param_groups[0]["lr"]}


def check(root: Path, wrapper: str) -> list[str]:
    whole = run(root / "whole", wrapper, 5, 0)
    run(root / "cut", wrapper, 2, 0)
    return differences(run(root / "cut", wrapper, 5, 1), whole)


def refused(root: Path) -> list[str]:
    """One rank's problem is told on all."""
    model = DistributedDataParallel(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if dist.get_rank() == 1:
        optimizer.state[3] = 1  # type: ignore[index]
    try:
        lwd.attach(model, optimizer, dir=str(root)).close()
    except errors.UnsupportedError as error:
        return [] if "rank 1: SGD keeps state under 3" in str(error) else [str(error)]
    return ["not refused"]


def main() -> None:
    root = Path(sys.argv[1])
    with process_group() as rank:
        found = {wrapper: check(root / wrapper, wrapper) for wrapper in ("ddp", "fsdp2", "fsdp1-flat", "zero")}
        found["refused"] = refused(root / "refused")
        (root / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
