# SPDX-License-Identifier: Apache-2.0
"""One trial: train, train again with checkpoints and SIGKILL in the middle, start once more, compare every bit.

The first two happen in one job, one after the other: most of a start is the import of torch.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise_dist.supervision.processes import descendants, kill_all, running, terminable
from layerwise_dist.supervision.scratch import scratch

MARK = "@layerwise-selftest "
RANKS, STEPS = 2, 20
_DEADLINE_S = 120.0
_FREE_BYTES = 256 << 20


class TrialFailed(Exception):
    """A job did not do what it should; the message has the end of its output."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    what: str
    good: bool
    found: str


@dataclass
class Run:
    """What one training said."""

    start: int = 0
    losses: dict[int, str] = field(default_factory=dict)
    committed: int = 0
    left: list[str] = field(default_factory=list)

    def take(self, told: dict[str, Any]) -> None:
        self.start = told.get("start", self.start)
        if "step" in told:
            self.losses[told["step"]] = told["loss"]
            self.committed = max(self.committed, told["committed"] or 0)
        self.left = told.get("left", self.left)


class Trial:
    """Runs in a folder of its own below `directory`, which is removed whatever happens, Ctrl-C included."""

    def __init__(self, directory: str, *, say: Callable[[str], None], seed: int | None = None) -> None:
        """`say` is told what is going on; `seed` says at which step the job is killed, for a trial to be repeated.

        Raises OSError for a directory that cannot be written or has too little room.
        """
        free = os.statvfs(directory)
        if free.f_bavail * free.f_frsize < _FREE_BYTES:
            raise OSError(f"{directory} has less than {_FREE_BYTES >> 20} MiB of free space")
        self._directory, self._say = directory, say
        self.kill_at = random.Random(seed).randint(5, STEPS - 5)

    def run(self) -> list[Check]:
        """Raises TrialFailed when a job ends otherwise than it should, or not within two minutes."""
        with terminable(), scratch(self._directory, "layerwise-selftest-", forgiving=True) as folder:
            return self._run(folder)

    def _run(self, folder: Path) -> list[Check]:
        checkpoints = str(folder / "checkpoints")
        self._say(f"training {STEPS} steps on {RANKS} ranks without checkpoints")
        self._say(f"then with a checkpoint every step, and SIGKILL for all of it after step {self.kill_at}")
        plain, killed = self._start(folder, [None, checkpoints], kill_at=self.kill_at)
        self._say("starting it once more")
        (resumed,) = self._start(folder, [checkpoints])
        return compare(plain, killed, resumed)

    def _start(self, folder: Path, directories: list[str | None], kill_at: int | None = None) -> list[Run]:
        """Trainings one after the other, each with checkpoints in its directory or without; the last may be killed."""
        spec = json.dumps({"steps": STEPS, "dirs": directories})
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command = [sys.executable, *launcher, "-m", "layerwise_dist.selftest.job", spec]
        errors, runs = folder / "errors.txt", [Run()]
        with open(errors, "wb") as file, running(command, file, {"OMP_NUM_THREADS": "1"}) as job:
            assert job.stdout is not None
            watchdog = threading.Timer(_DEADLINE_S, _kill, [job.pid])
            watchdog.daemon = True
            began = time.monotonic()
            try:
                watchdog.start()  # Ctrl-C may come within it: an exit that waited for the thread would take its time
                for line in job.stdout:
                    if not line.startswith(MARK):
                        continue
                    if runs[-1].left:
                        runs.append(Run())
                    runs[-1].take(json.loads(line[len(MARK) :]))
                    if kill_at in runs[-1].losses and len(runs) == len(directories):
                        _kill(job.pid)
                        return runs
                code = job.wait()
            finally:
                watchdog.cancel()
        if code != 0 or len(runs) < len(directories) or not runs[-1].left:
            late = f", after {_DEADLINE_S:g} s" if time.monotonic() - began >= _DEADLINE_S else ""
            tail = errors.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise TrialFailed("\n".join([f"the job ended with exit code {code}{late}:", *tail]))
        return runs


def compare(plain: Run, killed: Run, resumed: Run) -> list[Check]:
    """A training without checkpoints, one that was killed, and the one that resumed from there."""

    def same(run: Run) -> Check:
        other = [step for step, loss in run.losses.items() if loss != plain.losses.get(step)]
        where = f"steps {min(run.losses)} to {max(run.losses)}" if run.losses else "no step"
        found = f"{where} have the same losses" if not other else f"step {other[0]} has another loss"
        return Check("", not other and bool(run.losses), found)

    went = same(killed)
    back = 0 < killed.committed <= resumed.start < STEPS
    after = same(resumed)
    left = [rank for rank, (one, two) in enumerate(zip(plain.left, resumed.left, strict=True)) if one != two]
    ends = "parameters, moments and random numbers are equal bit for bit"
    return [
        Check("training with checkpoints gives the same bits as without", went.good, went.found),
        Check(
            "the restart resumes at a committed step", back,
            f"step {resumed.start}; the killed job had reported step {killed.committed} as committed",
        ),
        Check("the resumed run equals an uninterrupted one", after.good, after.found),
        Check("it ends in the same state", not left, ends if not left else f"rank {left[0]} holds other bits"),
    ]  # fmt: skip


def _kill(agent: int) -> None:
    """All of the job: torchrun, and its ranks below it."""
    below = descendants(agent)
    kill_all(lambda: [pid for pid in (agent, *below) if Path(f"/proc/{pid}/exe").exists()])
