# SPDX-License-Identifier: Apache-2.0
"""What a job under mpirun does, by name: mpi.py messages|train|stopped|level DIR OUT [...].

OUT/<rank>.json has the result.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK, SIZE = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])


def tell(out: Path, **what: Any) -> None:
    (out / f"{RANK}.tmp").write_text(json.dumps(what))
    os.rename(out / f"{RANK}.tmp", out / f"{RANK}.json")


def messages(folder: str, out: Path) -> None:
    """As a process that attaches twice, the second time with other ranks than MPI's."""
    from layerwise_dist.commit.transports import mpi

    good = []
    for rank in (RANK, SIZE - 1 - RANK):
        same = rank == RANK
        transport = mpi.open_mpi(None if same else rank, None if same else SIZE, 30.0)
        good.append(exchange(transport, rank))
    tell(out, good=good, threads=[thread.name for thread in threading.enumerate()])


def exchange(transport: Any, rank: int) -> bool:
    """Everybody posts, rank 0 announces. Whether all arrived once and in order."""
    heard: list[int] = []
    posted: dict[int, list[int]] = {other: [] for other in range(SIZE)}
    closed: set[int] = set()
    errors: list[str] = []
    changed = threading.Condition()

    def hear(message: dict[str, Any]) -> None:
        with changed:
            heard.append(message["n"])
            changed.notify_all()

    def take(message: dict[str, Any]) -> None:
        with changed:
            if message["t"] == "closed":
                closed.add(message["rank"])
            else:
                posted[message["rank"]].append(message["n"])
            changed.notify_all()

    def wait(what: Callable[[], bool]) -> None:
        with changed:
            assert changed.wait_for(what, 30)

    transport.start(hear, take if rank == 0 else None, errors.append)
    for number in range(100):
        transport.post({"t": "x", "rank": rank, "n": number, "text": "x" * 100 * (number % 10) ** 2})
        if rank == 0:
            transport.announce({"t": "y", "n": number, "text": "y" * 3000 * (number % 10)})
    wait(lambda: len(heard) == 100)
    wait(lambda: rank > 0 or all(len(each) == 100 for each in posted.values()))
    transport.post({"t": "closed", "rank": rank})
    wait(lambda: rank > 0 or len(closed) == SIZE)
    transport.close(20.0)
    order = list(range(100))
    return not errors and heard == order and (rank > 0 or all(each == order for each in posted.values()))


def train(folder: str, out: Path, total: str, die_at: str) -> None:
    import torch
    from job_kit import digest, odd_model

    import layerwise_dist as lwd

    model, optimizer = odd_model(RANK)
    ckpt = lwd.attach(model, optimizer, dir=folder, commit={"timeout_s": 30.0, "on_failure": "raise"})
    start = ckpt.restore()
    for step in ckpt.steps(int(total)):
        model(torch.randn(4, 33)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == int(die_at):
            ckpt.wait(step, timeout=30)
            time.sleep(0.2 * (SIZE - RANK))  # the others see the commit too
            if RANK == SIZE - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    ckpt.close()
    tell(out, start=start, step=ckpt.completed, hash=digest(model, optimizer))


def stopped(folder: str, out: Path) -> None:
    """Rank 1 stops itself; what the others get, and after how long."""
    from layerwise_dist.bench.light import LightRank
    from layerwise_dist.commit.transports import mpi
    from layerwise_dist.errors import LayerwiseError

    light = LightRank(mpi.open_mpi(None, None, 30.0), folder, timeout_s=2.0)
    began, error = time.monotonic(), ""
    try:
        for number in range(1000):
            step = light.checkpoint()
            if number < 3:
                light.participant.wait(step, "committed", 30.0)
            elif number == 3:
                if RANK == 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                began = time.monotonic()
    except LayerwiseError as caught:
        error = f"{type(caught).__name__}: {caught}"
    tell(out, error=error, seconds=time.monotonic() - began)
    time.sleep(60)


def level(folder: str, out: Path, wanted: str) -> None:
    import mpi4py

    mpi4py.rc.thread_level = wanted
    from layerwise_dist.commit.transports import mpi
    from layerwise_dist.errors import ConfigError

    try:
        mpi.open_mpi(None, None, 30.0)
        tell(out, error="")
    except ConfigError as caught:
        tell(out, error=str(caught))


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
