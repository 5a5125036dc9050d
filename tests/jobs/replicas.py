# SPDX-License-Identifier: Apache-2.0
"""DDP with channels_last convolutions, a frozen layer and batch statistics that differ between ranks; saved and
resumed.

replicas.py OUT BROADCAST_BUFFERS      OUT/<rank>.json is what differs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import contents, differences, process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd


def make(seed: int, broadcast: bool) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 2), nn.Flatten(), nn.Linear(28, 3))
    net[4].bias.requires_grad_(False)
    model = DistributedDataParallel(net.to(memory_format=torch.channels_last), broadcast_buffers=broadcast)
    torch.manual_seed(10 * seed + dist.get_rank())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def main() -> None:
    out, broadcast = Path(sys.argv[1]), bool(int(sys.argv[2]))
    with process_group() as rank:

        def attach(model: nn.Module, optimizer: Any) -> Any:
            return lwd.attach(
                model,
                optimizer,
                dir=str(out / "ckpt"),
                audit="always",
                commit={"timeout_s": 20.0, "on_failure": "raise"},
            )

        def train(ckpt: Any, model: nn.Module, optimizer: Any, total: int) -> None:
            for _ in ckpt.steps(total):
                model(torch.randn(2, 3, 5, 5)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        model, optimizer = make(1, broadcast)
        assert not model.module[0].weight.is_contiguous()
        ckpt = attach(model, optimizer)
        train(ckpt, model, optimizer, 3)
        ckpt.close()
        expected = contents(model, optimizer)
        buffers = {name: value for name, value in expected.items() if name.startswith("buffer/")}
        everywhere: list[Any] = [None, None]
        dist.all_gather_object(everywhere, buffers)
        model, optimizer = make(2, broadcast)
        ckpt = attach(model, optimizer)
        assert ckpt.restore() == 3
        found = contents(model, optimizer)
        ckpt.close()
        mine = {name: value for name, value in found.items() if name.startswith("buffer/")}
        told = {
            "differences": [
                name
                for name in differences(found, expected)
                if name != "rng" and not (broadcast and name.startswith("buffer/"))
            ],
            "buffers differed between ranks": differences(everywhere[0], everywhere[1]) != [],
            "buffers are rank 0's": differences(mine, everywhere[0]) == [],
        }
        (out / f"{rank}.json").write_text(json.dumps(told))
        del model, ckpt


if __name__ == "__main__":
    main()
