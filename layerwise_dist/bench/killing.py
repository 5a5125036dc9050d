# SPDX-License-Identifier: Apache-2.0
"""A job under torchrun that is killed by a trace, and what its lives were."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise_dist.bench.failure import BenchFailed
from layerwise_dist.bench.kill_trace import KillTrace
from layerwise_dist.bench.launching import command_of, last_words, told
from layerwise_dist.bench.lives import Life
from layerwise_dist.supervision.processes import births, descendants, kill_all, running, still

_SILENCE_S = 180.0  # without a word of the job, after which it counts as stuck
_STEPS_AFTER = 3  # the last kill, where that ends the job


@dataclass(slots=True)
class Killed:
    """What became of a job. `every`: steps between its checkpoints at the end."""

    lives: list[Life] = field(default_factory=list)
    kills: int = 0
    every: int = 0


def run_and_kill(
    module: str, spec: Mapping[str, Any], folder: Path, *, what: str, ranks: int, environment: Mapping[str, str],
    trace: KillTrace, at_last_kill: bool, shown: Callable[[int, int], None],
) -> Killed:  # fmt: skip
    """Trains until `trace.seconds` after the first step began, or with `at_last_kill` until a few steps after the last
    kill; at each moment of the trace all ranks get SIGKILL, or once they train again if the moment falls into a
    restart. The end is one more SIGKILL, which is not counted.
    `shown(step, kills)` hears how far it is. A step under way at the end is lost.

    Raises BenchFailed, which says `what`, if the job ends by itself, or says nothing for three minutes.
    """
    errors = folder / "errors.txt"
    command = command_of(module, spec, ranks, restarts=len(trace.moments))
    with open(errors, "wb") as file, running(command, file, environment) as job, _ended(job):
        watch = _Watch(job, trace, at_last_kill)
        with watch.on():
            for each in told(job):
                shown(watch.hear(each), watch.kills)
        if not watch.over:
            problem = watch.problem or f"ended with exit code {job.wait()}"
            raise BenchFailed("\n".join([f"{what}: the job {problem}:", *last_words(errors)]))
    return watch.found()


class _Watch:
    """Hears the job on one thread, and kills on another. The clock starts when the first step begins."""

    def __init__(self, job: subprocess.Popen[str], trace: KillTrace, at_last_kill: bool) -> None:
        self._job, self._trace, self._at_last_kill = job, trace, at_last_kill
        self._changed = threading.Condition()
        self._closed = False
        self._heard = time.monotonic()
        self._lives: list[Life] = []
        self._every = 0
        self.kills = 0
        self.over = False
        self.problem: str | None = None

    def hear(self, said: dict[str, Any]) -> int:
        """The newest step. What a life has said may be read after its end."""
        with self._changed:
            self._heard = time.monotonic()
            if not self._lives and "restored" in said:
                self._lives.append(Life(said["restored"]))
            if said["life"] < len(self._lives):
                self._hear(self._lives[said["life"]], said)
            elif self._lives:
                self.problem = "lost a rank that nobody had killed"
            self._changed.notify_all()
            return self._lives[-1].start + len(self._lives[-1].steps) if self._lives else 0

    def _hear(self, life: Life, said: dict[str, Any]) -> None:
        match said:
            case {"ready": moment}:
                life.ready = moment
            case {"restored": moment, "step": step}:
                life.restored, life.start = moment, step
                life.ready = life.ready or moment
            case {"at": moment, "every": every}:
                life.steps.append(moment)
                self._every = every

    @contextmanager
    def on(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="bench-kills", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            thread.join()

    def found(self) -> Killed:
        return Killed(self._lives, self.kills, self._every)

    # -- the other thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._kill()
        except BaseException as error:  # the other thread, which waits for the job's words, has to know
            self.problem = f"could not be killed: {error}"
            _end(self._job)

    def _kill(self) -> None:
        if not self._wait(lambda: bool(self._lives)):
            return
        zero = self._lives[0].began
        for moment in self._trace.moments:
            if not self._sleep_until(zero + moment) or not self._kill_ranks():
                return
        if self._at_last_kill:
            life = self._lives[-1]
            there = self._wait(lambda: len(life.steps) >= _STEPS_AFTER)
        else:
            there = self._sleep_until(zero + self._trace.seconds)
        if there:
            with self._changed:
                self.over = True
                self._lives[-1].ended = time.monotonic()
            _end(self._job)

    def _kill_ranks(self) -> bool:
        """Once they train: False if the job is over first."""
        life = self._lives[-1]
        if not self._wait(lambda: life.restored is not None):
            return False
        ranks = births(descendants(self._job.pid))
        kill_all(lambda: still(ranks))
        with self._changed:
            now = time.monotonic()
            self._lives[-1].ended = now
            self._lives.append(Life(now))
            self.kills += 1
        return True

    def _sleep_until(self, moment: float) -> bool:
        return self._wait(lambda: time.monotonic() >= moment, moment)

    def _wait(self, done: Callable[[], bool], wake: float = float("inf")) -> bool:
        """Whether it is done; False if the job is over first, or had to be ended because something is wrong."""
        with self._changed:
            while not self._closed and self.problem is None:
                if done():
                    return True
                now = time.monotonic()
                silent = self._heard + _SILENCE_S
                if now > silent:
                    self.problem = f"said nothing for {_SILENCE_S:g} s"
                self._changed.wait(max(0.0, min(wake, silent + 1) - now))
            if self._closed:
                return False
        _end(self._job)
        return False


@contextmanager
def _ended(job: subprocess.Popen[str]) -> Iterator[None]:
    """torchrun's ranks have sessions of their own: at the end of the body all of them are gone."""
    try:
        yield
    finally:
        _end(job)


def _end(job: subprocess.Popen[str]) -> None:
    """SIGKILL for the agent, which is stopped first so that it starts no more ranks, and for all below it."""
    if job.poll() is not None:
        return
    os.kill(job.pid, signal.SIGSTOP)
    ranks = births(descendants(job.pid))
    job.kill()
    kill_all(lambda: still(ranks))
    job.wait()
