# SPDX-License-Identifier: Apache-2.0
"""What `bench train` starts: one process, or one for each rank under torchrun.

    python -m layerwise_dist.bench.train_worker '{"shape": {...}, "folder": ..., ...}'

Rank 0 says what it does and found in lines of JSON after a mark on standard output; train.py reads them.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from layerwise_dist.bench import memory
from layerwise_dist.bench.deepspeed_modes import DEEPSPEED_MODES
from layerwise_dist.bench.launching import end_with_launcher, tell
from layerwise_dist.bench.model import Shape, windows
from layerwise_dist.bench.modes import MODES, Mode
from layerwise_dist.bench.raw import RawFile
from layerwise_dist.bench.trainings import DeepSpeedTraining, Training
from layerwise_dist.capture.audit import FULL_FIRST
from layerwise_dist.capture.pages import back_by_huge_pages
from layerwise_dist.commit.transports.rendezvous import over_default_group

_RECORD_BYTES = 1 << 20  # of what a rank has measured in a block: some 60 bytes a step
_GROUP_TIMEOUT = datetime.timedelta(seconds=120)


def modes_of(deepspeed: int | None) -> dict[str, type[Mode]]:
    """By name, the ways to checkpoint a training with that ZeRO stage, or without DeepSpeed."""
    return MODES if deepspeed is None else DEEPSPEED_MODES


class Worker:
    """Trains one model, a block of steps at a time, each under one mode."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._shape = Shape(**spec["shape"])
        self._ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._rank = int(os.environ.get("RANK", "0"))
        self._folder = Path(spec["folder"])
        if self._ranks > 1 or spec["deepspeed"] is not None:
            dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
        torch.manual_seed(0)
        if spec["deepspeed"] is None:
            self._training = Training(self._shape, spec["optimizer"], self._ranks, ddp=spec["ddp"])
        else:
            self._training = DeepSpeedTraining(self._shape, spec["optimizer"], self._ranks, spec["deepspeed"])
        self._modes = modes_of(spec["deepspeed"])
        self._iterate(self._mode(Mode, 1), 1)  # makes the optimizer's state
        # As this library would have it after some minutes of checkpoints; here for all contenders.
        back_by_huge_pages(
            (each.data_ptr(), each.numel() * each.element_size()) for each in self._training.tensors() if each.is_cpu
        )

    def _mode(self, kind: type[Mode], every: int) -> Mode:
        return kind(self._training.model, self._training.optimizer, every, self._ranks)

    def run(self) -> None:
        state = self._all(self._training.state_bytes())
        total = max(state) if self._spec["ddp"] else sum(state)  # replicas are written once
        self._say({"state_bytes": state, "total_bytes": total})
        modes = [name for name in self._spec["modes"] if self._works(name)]
        disk = None
        if self._rank == 0:
            nbytes = min(total, self._spec["disk_bytes"])
            disk = RawFile(self._folder / "raw", nbytes, block_bytes=1 << 20, depth=4)
        for number in range(self._spec["rounds"]):
            for every in self._spec["every"]:
                if disk is not None:
                    self._say({"disk": disk.write()})
                for name in ["none", *(each for mode in modes for each in (mode, "none"))]:
                    self._say({"now": f"round {number + 1}, every {every}, {name}"})
                    self._say({"block": {"round": number, "every": every, "mode": name, **self._block(name, every)}})
        if disk is not None:
            disk.close()

    def _works(self, name: str) -> bool:
        """Whether the mode can be used here, by one step of it; says why not."""
        self._say({"now": f"trying {name}"})
        mode = self._mode(self._modes[name], 1)
        problem = None
        try:
            mode.start(self._new_folder())
            self._iterate(mode, 1)
            mode.finish()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its reason, and is shown
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        problems = [text for text in self._all(problem) if text is not None]
        about = {"mode": name, "title": mode.name, "flushes": mode.flushes, "audits": mode.audits}
        self._say({"tried": {**about, "problem": problems[0] if problems else None}})
        self._clean()
        return not problems

    def _block(self, name: str, every: int) -> dict[str, Any]:
        mode = self._mode(self._modes[name] if name != "none" else Mode, every)
        warm = every if self._spec["quick"] else mode.warm_steps()
        steps = -(-self._spec["steps"] // every) * every
        self._barrier()
        memory.start_peak()
        mode.start(self._new_folder())
        seconds, stalls, audits = [], [], []
        for step in range(1, warm + steps + 1):
            if step == warm + 1:
                mode.to_committed.clear()
            stalled, audited = mode.stalled(), mode.audited()
            seconds.append(self._iterate(mode, step))
            stalls.append(mode.stalled() - stalled)
            audits.append(mode.audited() - audited)
            mode.between(step)
        mode.finish()

        def held(part: slice) -> list[tuple[float, float]]:
            """Of each checkpoint the stall, and what of it audits took."""
            return [*zip(by_checkpoint(stalls[part], every), by_checkpoint(audits[part], every), strict=True)]

        mine = {
            "seconds": seconds[warm:], "first": held(slice(warm))[:FULL_FIRST], "stalls": held(slice(warm, None)),
            "committed": mode.to_committed, "peak": memory.peak(), "copied": mode.bytes_copied(),
        }  # fmt: skip
        self._clean()
        return {key: [rank[key] for rank in everyone] for everyone in [self._all(mine)] for key in mine}

    def _iterate(self, mode: Mode, step: int) -> float:
        began = time.perf_counter()
        self._training.backward(self._training.model(windows(self._shape, self._ranks)))
        mode.update()
        self._training.optimizer.zero_grad()
        mode.end_iteration(step)
        return time.perf_counter() - began

    def _new_folder(self) -> Path:
        folder = self._folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        self._barrier()
        return folder

    def _clean(self) -> None:
        """Removes what the block wrote, and has the disk done with it: nothing is left to the next block."""
        gc.collect()
        self._barrier()
        if self._rank == 0:
            shutil.rmtree(self._folder / "checkpoints")
            if not self._spec["quick"]:
                os.sync()
        self._barrier()

    def _all(self, mine: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self._ranks == 1:
            return [mine]
        return [each["value"] for each in over_default_group(_RECORD_BYTES)({"value": mine})]

    def _barrier(self) -> None:
        if self._ranks > 1:
            dist.barrier()

    def _say(self, what: dict[str, Any]) -> None:
        if self._rank == 0:
            tell(what)

    def close(self) -> None:
        self._training.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def by_checkpoint(stalls: list[float], every: int) -> list[float]:
    """From one number a step to one a checkpoint: its own step, the last of `every`, and those up to the next.

    What the last checkpoint still costs falls after the block; what the one before the block cost in it stands in.
    """
    turned = stalls[every - 1 :] + stalls[: every - 1]
    return [sum(turned[begin : begin + every]) for begin in range(0, len(turned), every)]


def main() -> None:
    end_with_launcher()
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    worker = Worker(spec)
    worker.run()
    worker.close()


if __name__ == "__main__":
    main()
