# SPDX-License-Identifier: Apache-2.0
"""A job whose world may shrink or grow at a restart. Each rank of each start appends what it found to OUT/told.jsonl.

    elastic.py DIR OUT TOTAL [NODE]

It trains as long as OUT/hold is there, so that a test can take its time to break it. With NODE, DIR is on a disk of
that node: nodes are pretended, what tells them apart is patched.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import process_group, teller
from torch.utils.data import DataLoader

import layerwise_dist as lwd
from layerwise_dist.commit import places
from layerwise_dist.data import ElasticDistributedSampler

SAMPLES, BATCH = 100_000, 2
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast")


def watch() -> list[str]:
    """Names the threads that use the job's process groups from here on."""
    seen: list[str] = []

    def watched(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(threading.current_thread().name)
            return real(*args, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, watched(getattr(dist, name)))
    return seen


def main() -> None:
    folder, out, total = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        places.place = lambda: f"node {sys.argv[4]}"
    where = {"rank": int(os.environ["RANK"]), "world": int(os.environ["WORLD_SIZE"]), "pid": os.getpid()}
    tell = functools.partial(teller(out / "told.jsonl"), **where)

    with process_group():
        collectives = watch()
        model = torch.nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(range(SAMPLES), batch_size=BATCH, sampler=ElasticDistributedSampler(range(SAMPLES), seed=3))
        options = {"commit": {"timeout_s": 30.0, "on_failure": "raise"}, "state": {"loader": loader}}
        ckpt = lwd.attach(model, optimizer, dir=folder, **options)
        at_start = set(collectives)
        try:
            start = ckpt.restore()
        except lwd.errors.MismatchError as error:
            tell(error=str(error))
            ckpt.close()
            return
        tell(start=start)
        batches = iter(loader)
        for step in ckpt.steps(10**6):
            tell(step=step, samples=next(batches).tolist())
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == start + 3:
                ckpt.wait(step, timeout=30)
                tell(committed=step)
            if step >= start + 3:
                time.sleep(0.02)
            if step >= total and not (out / "hold").exists():
                break
        ckpt.close()
        tell(end=ckpt.completed, in_attach=sorted(at_start), threads=sorted(set(collectives)))


if __name__ == "__main__":
    main()
