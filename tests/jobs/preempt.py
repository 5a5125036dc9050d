# SPDX-License-Identifier: Apache-2.0
"""A job that is told to leave. Every rank tells what it does in OUT/<rank>.jsonl.

    preempt.py DIR OUT TOTAL GRACE [stop] [monitor] [workers] [persistent] [asyncio]

With `stop`, the last rank stops itself (SIGSTOP) at step 3, so that the others sit in a collective. With `workers`, two
workers of a data loader make the batches, with `persistent` the same ones in all epochs. With `asyncio` an event loop
takes the wake-up descriptor of signals, and gives it back, after `attach()`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from job_kit import digest, process_group, teller
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((9,), float(index))


def batches(options: list[str]) -> Iterator[torch.Tensor]:
    if "workers" not in options:
        while True:
            yield torch.randn(4, 9)
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=4, num_workers=2, persistent_workers="persistent" in options
    )
    while True:
        yield from loader


async def _loop() -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: None)
    loop.remove_signal_handler(signal.SIGUSR1)


def main() -> None:
    folder, out, total, grace, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tell = teller(out / f"{rank}.jsonl")
    calls: list[int] = []

    def mine(number: int, frame: Any) -> None:
        calls.append(number)

    signal.signal(signal.SIGTERM, mine)
    ckpt, model = None, None
    with process_group():
        torch.manual_seed(3)
        model = DistributedDataParallel(
            torch.nn.Sequential(torch.nn.Linear(9, 30), torch.nn.Dropout(0.3), torch.nn.Linear(30, 4))
        )
        torch.manual_seed(100 + rank)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        preemption = {"enabled": True, "grace_s": grace, "exit_code": 77}
        ckpt = lwd.attach(
            model, optimizer, dir=folder, every_n_steps=1000, preemption=preemption, commit={"timeout_s": 30.0},
            mode="monitor" if "monitor" in stop else "direct",
        )  # fmt: skip
        tell(start=ckpt.restore(), pid=os.getpid(), agent=os.getppid())
        if "asyncio" in stop:
            asyncio.run(_loop())
        data = batches(stop)
        try:
            for step in ckpt.steps(total):
                model(next(data)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                tell(step=step)
                if "stop" in stop and step == 3 and rank == world - 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.01 if total > 100 else 0)
            tell(end=digest(model, optimizer))
            ckpt.close()
        except SystemExit as left:
            tell(
                left=left.code, at=ckpt.completed, committed=ckpt.committed_step, calls=calls,
                restored=signal.getsignal(signal.SIGTERM) is mine, wakeup=signal.set_wakeup_fd(-1),
            )  # fmt: skip
            raise
        finally:
            del model, optimizer, ckpt


if __name__ == "__main__":
    main()
