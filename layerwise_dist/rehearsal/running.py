# SPDX-License-Identifier: Apache-2.0
"""One run of the user's own command, watched until it has followed its plan; leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from layerwise_dist.rehearsal.plan import VARIABLE, Plan
from layerwise_dist.rehearsal.story import Story
from layerwise_dist.supervision.processes import births, descendants, kill_all, marked, still, undisturbed

_LOOK_S = 0.05  # between two looks at what the ranks recorded
_GRACE_S = 30.0  # for a launcher whose ranks have ended
_TAIL, _TAIL_CHARACTERS = 60, 3000  # lines of a failed run's output; a message has its end, where the error is
_TAIL_BYTES = 1 << 16

Say = Callable[[str], None]


class RunFailed(Exception):
    """A run did not do what a script that is resumed in real life would; the message says which, and how it ended.

    `attached`: whether it came as far as attach(). `kept`: the folder with its checkpoints and output, if that is kept.
    """

    kept: str | None = None

    def __init__(self, message: str, *, attached: bool) -> None:
        super().__init__(message)
        self.attached = attached


class Job(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def kill(self) -> None:
        """SIGKILL for all of its processes, the launcher first, until none is left. Raises RuntimeError naming those
        that survive it.
        """
        ...

    def output(self) -> str:
        """The end of it at least."""
        ...


class Start(Protocol):
    """Starts a command; its output, of all its processes, goes into `log`. Raises OSError."""

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Job: ...


class Process:
    """A command in a session of its own. Its processes are known by a variable in their environment, which passes from
    one to the next: launchers give ranks sessions of their own, and workers outlive ranks.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._mark = f"{VARIABLE}={environment[VARIABLE]}".encode()
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, **environment},
            )  # fmt: skip

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        below: dict[int, str] = {}
        if self._process.poll() is None:
            # One that writes its title over its environment is known by this only.
            below = births(descendants(self._process.pid))
            self._process.kill()
        # A number that the system has given to another process meanwhile has another birth.
        kill_all(lambda: sorted({*marked(self._mark), *still(below)}))
        self._process.wait()

    def output(self) -> str:
        with open(self._log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read(_TAIL_BYTES).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Run:
    """What is left of one. `name` is how messages call it. `whole`: its ranks stopped where the plan says."""

    name: str
    plan: Plan
    story: Story
    whole: bool

    def place(self, directory: str) -> str:
        return self.story.place(directory)


def run(
    name: str, plan: Plan, command: Sequence[str], folder: Path, environment: Mapping[str, str], *, start: Start,
    say: Say, limit_s: float,
) -> Run:  # fmt: skip
    """Runs it to the plan's end: all ranks have stopped, or wait to be killed and are. `limit_s` is in seconds.

    Raises RunFailed for any other end, but for one with exit code 0 before the plan's last step: then the run is not
    `whole`. OSError where the command can't be started.
    """
    path = folder / f"{name}.json"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(plan.model_dump_json())
    story, log = Story(plan), folder / f"{name}.txt"
    job: Job | None = None
    try:
        with undisturbed():  # what is started is known here
            job = start(command, {**environment, VARIABLE: str(path)}, log)
        deadline, newest, done_at = time.monotonic() + limit_s, 0, None
        while True:
            code = job.poll()  # before the story: what it told to its end is then in that
            story.read()
            if story.newest > newest:
                newest = story.newest
                say(f"{name} run: step {newest} of {plan.stop_at}")
            if plan.kill_after is not None and story.all_are("ready"):
                say(f"{name} run: SIGKILL after step {newest}; step {story.committed} is committed")
                return Run(name, plan, story, whole=True)
            if story.all_are("stopped"):
                done_at = done_at or time.monotonic()
                if code is not None or time.monotonic() - done_at > _GRACE_S:
                    return Run(name, plan, story, whole=True)
            elif code is not None:
                return _ended(name, plan, story, job, code)
            if time.monotonic() > deadline:
                where = f"at step {newest}" if newest else "before the first step"
                raise _failed(name, f"had not finished after {limit_s:g} s, {where} (--timeout)", story, job)
            time.sleep(_LOOK_S)
    finally:
        try:
            if job is not None:
                with undisturbed():  # a second Ctrl-C would leave processes behind
                    job.kill()
        except RuntimeError as error:  # a disk that hangs holds them
            raise RunFailed(f"the {name} run can't be ended: {error}", attached=bool(story.directories)) from None
        finally:
            path.unlink()


def _ended(name: str, plan: Plan, story: Story, job: Job, code: int) -> Run:
    if code != 0:
        raise _failed(name, f"failed with exit code {code}", story, job)
    if not story.directories:
        raise _failed(name, "ended without an enabled attach()", story, job)
    return Run(name, plan, story, whole=False)


def _failed(name: str, how: str, story: Story, job: Job) -> RunFailed:
    tail = "\n".join(job.output().splitlines()[-_TAIL:])
    if len(tail) > _TAIL_CHARACTERS:
        tail = "..." + tail[-_TAIL_CHARACTERS:]
    return RunFailed(f"the {name} run {how}:\n{tail}", attached=bool(story.directories))
