# SPDX-License-Identifier: Apache-2.0
"""At each step: gradients of a DDP that has run on, against those of a new one around the same contents.

buckets.py take_up|leave      rank 0 prints `differing <steps>`
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from job_kit import process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.frameworks.ddp import DDPFramework


def main() -> None:
    with process_group() as rank:
        world = dist.get_world_size()
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(33, 65), nn.BatchNorm1d(65), nn.Linear(65, 7))
        model = DistributedDataParallel(net)
        framework = DDPFramework(model, rank, world)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(100 + rank)
        differing = 0
        for step in range(20):
            inputs = torch.randn(4, 33)
            again = DistributedDataParallel(copy.deepcopy(net))
            if step and sys.argv[1] == "take_up":
                resumed = DDPFramework(again, rank, world)
                resumed.take_up(framework.carry())
                assert resumed.carry() == framework.carry()
                assert all(
                    a.grad is None or torch.equal(a.grad, b.grad)
                    for a, b in zip(again.parameters(), model.parameters(), strict=True)
                )
            for one in (model, again):
                one.zero_grad()
                one(inputs).square().mean().backward()
            pairs = zip(model.parameters(), again.parameters(), strict=True)
            differing += not all(torch.equal(a.grad, b.grad) for a, b in pairs)
            optimizer.step()
            del again, one, pairs
        if rank == 0:
            print(f"differing {differing}", flush=True)
        del model, framework


if __name__ == "__main__":
    main()
