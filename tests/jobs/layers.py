"""Training by layers against plain training, in one job.

layers.py ddp|fsdp2      each rank prints `exact <case>` or `differs <case>` for each case, and `refused <why>`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kit import contents, differences, process_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import Reused  # noqa: E402

from layerwise_dist import LayerwiseOptimizer  # noqa: E402
from layerwise_dist.errors import UnsupportedError  # noqa: E402

KERNELS: list[dict[str, Any]] = [{"foreach": True}, {"foreach": False}, {"fused": True}]


def build(wrapper: str, kernel: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model: nn.Module = Reused(unused=False)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model.block)
        fully_shard(model.middle)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, **kernel)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, clip: bool) -> None:
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        model(torch.randint(16, (2, 4), generator=generator)).square().mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()


def main(wrapper: str) -> None:
    with process_group():
        modes = ("pipelined_step", "in_backward") if wrapper == "fsdp2" else ("pipelined_step",)
        for kernel in KERNELS:
            for mode in modes:
                for clip in (False, True) if mode == "pipelined_step" else (False,):
                    plain, layered = build(wrapper, kernel), build(wrapper, kernel)
                    calls: list[str] = []
                    LayerwiseOptimizer(
                        layered[1], layered[0], mode=mode, after_layer=lambda layer, _, calls=calls: calls.append(layer)
                    )
                    train(*plain, clip)
                    train(*layered, clip)
                    one, two = contents(*plain), contents(*layered)
                    same = list(one) == list(two) and not differences(one, two)
                    same = same and len(calls) == 4 * len(set(calls)) >= 16
                    print(f"{'exact' if same else 'differs'} {kernel} {mode} clip={clip}", flush=True)
                    del plain, layered
        for model in (build(wrapper, {})[0], Reused()):
            try:
                LayerwiseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mode="in_backward")
            except UnsupportedError as error:
                print(f"refused {error}", flush=True)
        del model
        if wrapper == "fsdp2":
            model, optimizer = build(wrapper, {})
            LayerwiseOptimizer(optimizer, model, mode="in_backward")
            try:
                train(model, optimizer, clip=True)
            except UnsupportedError as error:
                print(f"refused {error}", flush=True)
            del model, optimizer


if __name__ == "__main__":
    main(sys.argv[1])
