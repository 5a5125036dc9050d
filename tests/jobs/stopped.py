# SPDX-License-Identifier: Apache-2.0
"""Rank 0 stops itself (SIGSTOP) in the middle; rank 1, which needs no collective, tells what each wait of its gives.

stopped.py DIR OUT TIMEOUT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from job_kit import process_group

import layerwise_dist as lwd


def main() -> None:
    folder, out, timeout = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    result: dict[str, tuple[str, str, float]] = {}

    def tried(where: str, action: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            action()
            result[where] = ("nothing", "", time.monotonic() - began)
        except Exception as error:  # noqa: BLE001
            result[where] = (type(error).__name__, str(error), time.monotonic() - began)

    with process_group() as rank:
        model = torch.nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ckpt = lwd.attach(model, optimizer, dir=folder, commit={"timeout_s": timeout})

        def train() -> None:
            for step in ckpt.steps(1000):
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 2 and rank == 0:
                    os.kill(os.getpid(), signal.SIGSTOP)

        tried("the grant horizon", train)
        tried("wait()", lambda: ckpt.wait(ckpt.completed, "committed"))
        tried("close()", ckpt.close)
        if rank == 1:
            (out / "result.tmp").write_text(json.dumps(result))
            os.rename(out / "result.tmp", out / "result.json")


if __name__ == "__main__":
    main()
