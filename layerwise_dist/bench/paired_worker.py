# SPDX-License-Identifier: Apache-2.0
"""What `bench train --blocks` starts, once for each way to train. It trains when it hears a line, and then rests.

    python -m layerwise_dist.bench.paired_worker '{"shape": {...}, "mode": "layerwise", ...}'

Another installation runs this very file, to be measured beside this one: of the package it needs `bench.model`,
`bench.trainings`, `bench.modes` and `capture.pages` only, as they have been since 1322151.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from layerwise_dist.bench.model import Shape, windows
from layerwise_dist.bench.modes import MODES, Layerwise, Mode
from layerwise_dist.bench.trainings import Training
from layerwise_dist.capture.pages import back_by_huge_pages

_MARK = "@layerwise-bench "  # as launching.py
_PR_SET_PDEATHSIG = 1
_QUIET_S = 0.25  # as long must nothing be written, and as good as nothing be computed
_QUIET_SHARE = 0.02  # of a core; threads that wait look around now and then
_REST_S = 120.0
_SETTLED = 2  # steps after those that a mode needs


class Worker:
    """Trains one model in one way, a few steps at a time."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec, self._shape = spec, Shape(**spec["shape"])
        torch.manual_seed(0)
        self._training = Training(self._shape, spec["optimizer"], 1)
        self._mode, self._step = self._made(Mode), 0
        self._iterate()  # makes the optimizer's state

    def _made(self, kind: type[Mode]) -> Mode:
        return kind(self._training.model, self._training.optimizer, self._spec["every"], 1)

    def run(self) -> None:
        if self._spec["mode"] != "none":
            self._mode, self._step = self._made(MODES[self._spec["mode"]]), 0
        folder = Path(self._spec["folder"], "checkpoints")
        folder.mkdir()
        self._mode.start(folder)
        if isinstance(self._mode, Layerwise):
            self._back_by_huge_pages()
        for _ in range(self._spec["every"] if self._spec["quick"] else self._mode.warm_steps() + _SETTLED):
            self._iterate()
        self._rest()
        self._tell({"state_bytes": self._training.state_bytes()})
        for _ in sys.stdin:
            self._tell(self._turn())
        self._mode.finish()
        self._training.close()

    def _back_by_huge_pages(self) -> None:
        """As the library has it after some minutes of checkpoints. A plain training has none."""
        state = self._training.optimizer.state.values()
        tensors = [*self._training.model.parameters(), *(value for each in state for value in each.values())]
        back_by_huge_pages((tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors)

    def _turn(self) -> dict[str, Any]:
        """Seconds of a step; of CPU time and of stall, a step, and of the CPU time of each of the package's threads."""
        cpu, stalled, before = time.process_time(), self._mode.stalled(), _threads()
        self._iterate()  # not counted: the caches have what others did meanwhile
        seconds = [self._iterate() for _ in range(self._spec["steps"])]
        self._rest()
        steps = 1 + len(seconds)
        return {
            "seconds": fmean(seconds), "cpu": (time.process_time() - cpu) / steps,
            "stall": (self._mode.stalled() - stalled) / steps,
            "threads": {name: (used - before.get(name, 0.0)) / steps for name, used in _threads().items()},
        }  # fmt: skip

    def _iterate(self) -> float:
        self._step += 1
        began = time.perf_counter()
        self._training.backward(self._training.model(windows(self._shape, 1)))
        self._mode.update()
        self._training.optimizer.zero_grad()
        self._mode.end_iteration(self._step)
        took = time.perf_counter() - began
        self._mode.between(self._step)
        return took

    def _rest(self) -> None:
        """Until all that was saved is written, and what followed from it is done."""
        deadline = time.monotonic() + _REST_S
        while True:
            self._mode.stalled()  # the engine's verdict on what it has read may be wanted
            cpu, written = time.process_time(), _bytes_written()
            time.sleep(_QUIET_S)
            if written == _bytes_written() and time.process_time() - cpu < _QUIET_SHARE * _QUIET_S:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._spec['mode']} was still busy {_REST_S:g} s after its last step")

    def _tell(self, what: dict[str, Any]) -> None:
        print(_MARK + json.dumps(what), flush=True)


def _threads() -> dict[str, float]:
    """Seconds of CPU time that the package's threads have had, by name; those that are over are left out."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            name = names.get(int(task.name)) or (task / "comm").read_text().strip()
            used = int((task / "schedstat").read_text().split()[0]) / 1e9  # kernel: Documentation/scheduler/sched-stats
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended just now
        if name.startswith("layerwise"):
            found[name] = found.get(name, 0.0) + used
    return found


def _bytes_written() -> int:
    """By this process, to disks: ``write_bytes`` of proc_pid_io(5)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


def main() -> None:
    # A worker that outlives whoever started it would go on writing.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    Worker(spec).run()


if __name__ == "__main__":
    main()
