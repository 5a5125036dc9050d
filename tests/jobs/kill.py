# SPDX-License-Identifier: Apache-2.0
"""A job that is killed and started again. Every rank tells what it does in OUT/<rank>.jsonl, one write a line.

kill.py WRAPPER DIR OUT [--total N] [--keep N] [--restore N] [--lr X] [--die-at N]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from job_kit import contents, process_group, teller
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    seen = hashlib.sha256()
    for name, value in sorted(contents(model, optimizer).items()):
        if name == "rng" or (
            name.startswith("buffer/") and isinstance(model, DistributedDataParallel) and dist.get_rank()
        ):
            continue  # the first is put back when steps() starts, the others by DDP's broadcast at the next forward
        seen.update(name.encode())
        if isinstance(value, torch.Tensor):
            seen.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            seen.update(repr(value).encode())
    return seen.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("wrapper")
    parser.add_argument("dir")
    parser.add_argument("out", type=Path)
    parser.add_argument("--total", type=int, default=30)
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--restore", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--die-at", type=int, default=-1)
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    tell = teller(options.out / f"{rank}.jsonl")
    tell(launched=os.environ.get("LAUNCH", "0"), pid=os.getpid())
    with process_group():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(33, 65), nn.Dropout(0.2), nn.BatchNorm1d(65), nn.Linear(65, 7))
        model: nn.Module = net
        if options.wrapper == "ddp":
            model = DistributedDataParallel(net)
        elif options.wrapper == "fsdp2":
            fully_shard(net[3])
            fully_shard(net)
        torch.manual_seed(100 + rank)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.7)
        config = {"dir": options.dir, "keep_last": options.keep, "commit": {"timeout_s": 30.0, "on_failure": "raise"}}
        ckpt = lwd.attach(model, optimizer, config, state={"scheduler": scheduler})
        start = ckpt.restore(options.restore)
        tell(start=start, hash=digest(model, optimizer))
        if options.lr:
            optimizer.param_groups[0]["lr"] = options.lr
        for step in ckpt.steps(options.total):
            loss = model(torch.randn(4, 33)).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            tell(step=step, loss=loss.item().hex(), hash=digest(model, optimizer), committed=ckpt.committed_step)
            if step == options.die_at:
                ckpt.wait(step, "committed", timeout=20)
                tell(committed=ckpt.committed_step)
                time.sleep(0.2 * rank)  # rank 1 sees it too
                os.kill(os.getpid(), signal.SIGKILL)
        ckpt.close()
        tell(end=ckpt.completed, committed=ckpt.committed_step, hash=digest(model, optimizer))
        del model, net


if __name__ == "__main__":
    main()
