# SPDX-License-Identifier: Apache-2.0
"""Trains DeepSpeed engines in one mode after another, and kills a rank once in each; started again, it goes on.

    zero_kill.py [--plain] --seed N --out OUT MODE...

Each mode is eight updates with a checkpoint at every one. Which rank dies in which of them, and when, comes from the
seed. OUT/<mode>.<rank>.log has a line for each micro-batch of each launch, "start" lines in between;
OUT/<mode>.<rank>.json what the rank held at the end. With --plain there are no checkpoints and nobody is killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from job_kit import process_group
from zero_kit import Job, prepare

UPDATES = 8


def digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode() + data).hexdigest()[:16]
    return repr(value)


class Trial:
    def __init__(self, options: argparse.Namespace, mode: str) -> None:
        self._options, self._mode, self._rank = options, mode, dist.get_rank()
        self._file = options.out / f"{mode}.{self._rank}"
        chance = random.Random(f"{options.seed} {mode}")
        victim, self._update = chance.randrange(dist.get_world_size()), chance.randint(3, UPDATES - 1)
        self._delay = chance.random() * 0.1  # seconds; about what an update takes, writes included
        self._marker = options.out / f"{mode}.killed"
        self._doomed = not options.plain and victim == self._rank and not self._marker.exists()

    def run(self) -> None:
        folder = self._options.out / self._mode
        scratch = self._options.out / f"{self._mode}.swap"
        scratch.mkdir(exist_ok=True)
        job = Job(self._mode, 1, str(scratch), before_micro_batch=self._before, after_micro_batch=self._after)
        self._window = job.engine.gradient_accumulation_steps()
        ckpt = None if self._options.plain else job.attach(str(folder))
        start = 0 if ckpt is None else ckpt.restore()
        self._say(f"start {start}")
        job.train(ckpt, UPDATES)
        if ckpt is not None:
            ckpt.close()
        held = {name: digest(value) for name, value in job.contents().items()}
        self._file.with_name(f"{self._file.name}.json").write_text(json.dumps(held))

    def _before(self, done: int) -> None:
        update = done // self._window + 1
        if self._doomed and update > self._update:  # the moment comes no later than with the next update
            os.kill(os.getpid(), signal.SIGKILL)
        if self._doomed and update == self._update and not self._marker.exists():
            self._marker.touch()
            threading.Timer(self._delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def _after(self, done: int, loss: str) -> None:
        self._say(f"{done} {loss}")

    def _say(self, line: str) -> None:
        with open(f"{self._file}.log", "a") as log:
            log.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--seed", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher, not used")
    parser.add_argument("modes", nargs="+")
    options = parser.parse_args()
    prepare()
    with process_group() as rank:
        deepspeed.init_distributed("gloo")
        for mode in options.modes:
            done = [
                [path.exists() for path in (options.out / f"{mode}.{r}.json" for r in range(dist.get_world_size()))]
            ]
            dist.broadcast_object_list(done, src=0)
            if not all(done[0]):
                Trial(options, mode).run()
            dist.barrier()
        if rank == 0:
            print("all modes are done", flush=True)


if __name__ == "__main__":
    main()
