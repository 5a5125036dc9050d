# SPDX-License-Identifier: Apache-2.0
"""A job in a storm: what goes on around it is `tests/kit/soak.py`'s. Each rank tells every step in OUT/<rank>.jsonl.

    storm.py DIR OUT TOTAL PAUSE_S

Batches come from forked workers that draw random numbers. With "plain" for DIR there is no engine: what it would be.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from job_kit import digest, process_group, teller
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import layerwise_dist as lwd


class Noisy(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 160

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((9,), float(index)) + torch.randn(9)


class Data:
    """Epoch after epoch of one loader, by hand, as the steps want it."""

    def __init__(self) -> None:
        self.progress = {"epoch": 0}
        self._sampler = DistributedSampler(Noisy(), seed=0)
        self.loader = DataLoader(Noisy(), batch_size=2, sampler=self._sampler, num_workers=2)
        self._iterator: Iterator[torch.Tensor] | None = None

    def next(self) -> torch.Tensor:
        while True:
            if self._iterator is None:
                self._sampler.set_epoch(self.progress["epoch"])
                self._iterator = iter(self.loader)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
                self.progress["epoch"] += 1


def main() -> None:
    folder, out, total, pause_s = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    tell = teller(out / f"{os.environ['RANK']}.jsonl")
    tell(launched=os.environ.get("LAUNCH", "0"), pid=os.getpid())
    with process_group() as rank:
        torch.manual_seed(3)
        net = torch.nn.Sequential(torch.nn.Linear(9, 300), torch.nn.Dropout(0.3), torch.nn.Linear(300, 300))
        model = DistributedDataParallel(net)
        torch.manual_seed(100 + rank)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        data = Data()
        ckpt, steps = None, iter(range(total))
        if folder != "plain":
            ckpt = lwd.attach(
                model, optimizer, dir=folder, state={"data": data.loader, "progress": data.progress}, keep_last=2,
                preemption={"enabled": True, "grace_s": 12.0, "exit_code": 77},
                # A disk that is full for a while is no reason to end.
                commit={"timeout_s": 40.0, "on_failure": "warn", "raise_after": 1_000_000},
            )  # fmt: skip
            tell(start=ckpt.restore())
            steps = ckpt.steps(total)
        try:
            for step in steps:
                model(data.next()).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                tell(step=step, hash=digest(model, optimizer), committed=ckpt.committed_step if ckpt else None)
                time.sleep(pause_s)
            if ckpt is not None:
                ckpt.close()
            tell(end=total)
        except SystemExit as left:
            tell(left=left.code, at=ckpt.completed if ckpt else None)
            raise
        finally:
            del model, net, optimizer, ckpt, steps, data


if __name__ == "__main__":
    main()
