# SPDX-License-Identifier: Apache-2.0
"""The ranks of `bench goodput`, under torchrun.

    python -m layerwise_dist.bench.goodput_worker '{"do": "costs" or a contender, "shape": {...}, "folder": ..., ...}'

A contender trains until it is killed. Rank 0 says what it does and found in lines of JSON after a mark on standard
output; goodput.py reads them. Moments are of CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from layerwise_dist.bench.contenders import BY_COST, CONTENDERS
from layerwise_dist.bench.launching import end_with_launcher, tell
from layerwise_dist.bench.model import Shape, windows
from layerwise_dist.bench.modes import Mode
from layerwise_dist.bench.trainings import Training

_GROUP_TIMEOUT = datetime.timedelta(seconds=120)
_LEAST_S = 1e-6  # of a checkpoint that costs nothing that can be measured


class Worker:
    """One rank's training."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec, self._shape = spec, Shape(**spec["shape"])
        self._life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self._rank, self._ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._folder = Path(spec["folder"])
        dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
        torch.manual_seed(self._rank)
        self.training = Training(self._shape, "foreach", self._ranks)

    def train(self) -> None:
        """Never returns."""
        spec = self._spec
        contender = CONTENDERS[spec["do"]](
            self.training, self._folder, spec["every"].get(spec["do"], 1), spec["mtbf_s"], self._ranks
        )
        self._say({"ready": time.monotonic()})
        step = contender.resume()
        self._say({"restored": time.monotonic(), "step": step})
        while True:
            self._backward()
            contender.update()
            self.training.optimizer.zero_grad()
            step += 1
            contender.end_iteration(step)
            self._say({"step": step, "at": time.monotonic(), "every": contender.interval})

    def costs(self) -> None:
        """Tells seconds of a step without checkpoints, by which the first one is longer, and by which each peer's
        checkpoint lengthens training.
        """
        plain = Mode(self.training.model, self.training.optimizer, 1, self._ranks)
        first = self._block(plain, 1)  # imports and compiles what torch needs, and makes the optimizer's state
        self._block(plain, 1)
        every, count = self._spec["calibrate_every"], self._spec["calibrate_checkpoints"]
        steps = every * count
        bare, costs = [self._block(plain, steps) / steps], {}
        for name in self._spec["contenders"]:
            if name not in BY_COST:
                continue
            mode = BY_COST[name](self.training.model, self.training.optimizer, every, self._ranks)
            folder = self._folder / name
            folder.mkdir(exist_ok=True)
            mode.start(folder)
            took = self._block(mode, steps)
            bare.append(self._block(plain, steps) / steps)
            costs[name] = max(_LEAST_S, (took - steps * (bare[-2] + bare[-1]) / 2) / count)
            dist.barrier()
            if self._rank == 0:
                shutil.rmtree(folder)
        self._say({"step_s": median(bare), "first_s": max(0.0, first - median(bare)), "costs": costs})

    def _block(self, mode: Mode, steps: int) -> float:
        """Seconds, until the last checkpoint is done too."""
        dist.barrier()
        began = time.perf_counter()
        for step in range(1, steps + 1):
            self._backward()
            mode.update()
            self.training.optimizer.zero_grad()
            mode.end_iteration(step)
            mode.between(step)
        mode.finish()
        dist.barrier()
        return time.perf_counter() - began

    def _backward(self) -> None:
        self.training.backward(self.training.model(windows(self._shape, self._ranks)))

    def _say(self, what: dict[str, Any]) -> None:
        if self._rank == 0:
            tell({**what, "life": self._life})


def main() -> None:
    end_with_launcher()
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    worker = Worker(spec)
    if spec["do"] != "costs":
        worker.train()
    worker.costs()
    worker.training.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
