# SPDX-License-Identifier: Apache-2.0
"""A job in monitor mode. Every rank tells what it does in OUT/<rank>.jsonl, one write a line.

    monitored.py WRAPPER DIR OUT [--total N] [--mode M] [--odd NAME] [--timeout S] [--end HOW] [--pause STEP,RANK]
                 [--frozen] [--roll STEP]

`--odd NAME`: the monitors are those of odd_monitor.py. `--pause`: at that step, between the update and the boundary,
that rank waits until OUT/go is there. `--end`: close (the default), raise (an exception in the last step), exit (no
close), fork (a child that lives on), wait (for the last step to be staged, then sleep). `--roll`: go back to that step.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from job_kit import process_group, teller
from kill import digest
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.monitor import process

HERE = Path(__file__).parent


def build(wrapper: str, frozen: bool) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(200, 600), nn.Dropout(0.2), nn.BatchNorm1d(600), nn.Linear(600, 150))
    if frozen:
        net.append(nn.Linear(150, 2500))  # 1.5 MB: enough for a base in direct mode
        for param in net[4].parameters():
            param.requires_grad_(False)
    if wrapper == "ddp":
        return DistributedDataParallel(net)
    if wrapper == "fsdp2":
        fully_shard(net[0])
        fully_shard(net)
    return net


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("wrapper")
    parser.add_argument("dir")
    parser.add_argument("out", type=Path)
    parser.add_argument("--total", type=int, default=12)
    parser.add_argument("--mode", default="monitor")
    parser.add_argument("--odd")
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--end", default="close")
    parser.add_argument("--pause", default="")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--roll", type=int)
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    tell = teller(options.out / f"{rank}.jsonl")
    tell(pid=os.getpid())
    if options.odd:
        process.COMMAND = [sys.executable, str(HERE / "odd_monitor.py"), options.odd]
    pause_step, pause_rank = map(int, options.pause.split(",")) if options.pause else (-1, -1)
    with process_group():
        model = build(options.wrapper, options.frozen)
        torch.manual_seed(100 + rank)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        ckpt = lwd.attach(
            model, optimizer, dir=options.dir, mode=options.mode, keep_last=50, state={"scheduler": scheduler},
            fence_timeout_s=options.timeout, commit={"timeout_s": options.timeout}, writer={"block_kb": 64},
        )  # fmt: skip
        if options.mode == "monitor":
            tell(monitor=workings_of(ckpt).adapter.link.process.pid)
        start = ckpt.restore(options.roll)
        tell(start=start, hash=digest(model, optimizer))
        try:
            for step in ckpt.steps(options.total):
                loss = model(torch.randn(8, 200)).square().mean()
                loss.backward()
                optimizer.step()
                if (step, rank) == (pause_step, pause_rank):
                    tell(paused=step)
                    while not (options.out / "go").exists():
                        tell(staged=workings_of(ckpt).participant.reached("staged"))
                        time.sleep(0.05)
                scheduler.step()
                optimizer.zero_grad()
                if options.end == "raise" and step == options.total - 1:
                    raise ZeroDivisionError("an error in the script")
                tell(step=step + 1, hash=digest(model, optimizer))
                tell(staged=ckpt.staged_step, committed=ckpt.committed_step)
            if options.end == "wait":
                ckpt.wait(options.total, "staged")
                tell(staged=ckpt.staged_step, committed=ckpt.committed_step)
                time.sleep(600)
            if options.end == "fork":
                child = os.fork()
                if child == 0:
                    time.sleep(60)
                    os._exit(0)
                tell(child=child)
                time.sleep(600)
            if options.end != "exit":
                ckpt.close()
                tell(end=ckpt.completed, committed=ckpt.committed_step)
        except Exception as error:
            tell(error=type(error).__name__, message=str(error), at=ckpt.completed)
            began = time.monotonic()
            ckpt.close()
            tell(closed=time.monotonic() - began)
            raise
        finally:
            del model, ckpt


if __name__ == "__main__":
    main()
