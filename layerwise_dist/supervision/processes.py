# SPDX-License-Identifier: Apache-2.0
"""Processes that benchmark, self-test and demo start: none of them outlives those, or runs what lies where they were
started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import layerwise_dist

_GRACE_S = 10.0


def own_environment() -> dict[str, str]:
    """For Python of this package's own: this very package is found, and nothing in the working directory is imported
    (``python -m`` looks there first).
    """
    here = str(Path(layerwise_dist.__file__).parent.parent)
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


@contextmanager
def running(
    command: list[str], errors: IO[Any] | int, environment: Mapping[str, str], *, asked: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own; all of it is gone when the body ends, however it does.

    `errors` takes its standard error; `environment` goes on top of `own_environment()`. With `asked` its standard input
    is a pipe from the caller, else empty.
    """
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.PIPE if asked else subprocess.DEVNULL,
        text=True, start_new_session=True, env={**own_environment(), **environment},
    )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
            try:
                job.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all of it has ended by itself
        job.wait()
        if job.stdin is not None:
            try:
                job.stdin.close()
            except BrokenPipeError:
                pass  # what was written last, nobody reads any more
        if job.stdout is not None:
            job.stdout.close()


def descendants(root: int) -> list[int]:
    """Live processes below `root`. A process group misses some: torchrun gives each rank a session of its own."""
    known = {int(entry): fields_of(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    parents = {pid: int(fields[1]) for pid, fields in known.items() if not is_over(fields)}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {root})


def births(pids: Iterable[int]) -> dict[int, str]:
    """The start times, in ticks since boot, of those that exist and have not ended."""
    found = {pid: fields_of(pid) for pid in pids}
    return {pid: fields[19] for pid, fields in found.items() if not is_over(fields)}


def still(born: Mapping[int, str]) -> list[int]:
    """Of processes with these `births`, those that are there; a number may be another process's by now."""
    return [pid for pid, when in births(born).items() if when == born[pid]]


def marked(mark: bytes) -> list[int]:
    """Live processes that were started with this, ``NAME=value``, in their environment."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and mark in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                found.append(int(entry))
        except OSError:
            continue  # it has ended, or is another user's
    return list(births(found))


def fields_of(pid: int) -> list[str]:
    """Of ``/proc/PID/stat`` (proc(5)), from the third on: state, parent, ...; empty if there is no such process."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_over(fields: list[str]) -> bool:
    """Whether a process with these `fields_of` has ended. The first thread of a process that is killed may be a zombie
    while the others still end, and with them what the process holds: files, and locks on them.
    """
    return not fields or (fields[0] in "ZX" and int(fields[17]) <= 1)


def kill_all(find: Callable[[], list[int]], timeout_s: float = 30.0) -> int:
    """SIGKILL for what `find` lists, in that order, until it lists nothing more and all of that has ended; returns how
    many it listed first.

    Raises RuntimeError naming what is alive after `timeout_s` seconds.
    """
    first: int | None = None
    deadline = time.monotonic() + timeout_s
    killed: dict[int, str] = {}
    while alive := [*dict.fromkeys([*find(), *still(killed)])]:
        first = len(alive) if first is None else first
        killed |= births(alive)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {alive} survive SIGKILL for {timeout_s:g} s")
        time.sleep(0.01)
    return first or 0


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP wait until the body is over: a second Ctrl-C does not undo the cleaning up after the
    first. Raises KeyboardInterrupt then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    heeded = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)  # ignored: nohup
    ]
    with _handled(heeded, lambda number, frame: came.append(number)):
        yield
    if came:
        raise KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the body as Ctrl-C does, so that nothing is left behind. A
    KeyboardInterrupt leaves it, also where a library in it has made another exception of that one
    (torch.distributed.checkpoint does).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    ours = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # ignored: nohup
        ours.append(signal.SIGHUP)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ours.append(signal.SIGINT)
    with _handled(ours, interrupt):
        try:
            yield
        except Exception as error:
            if came:
                raise KeyboardInterrupt from error
            raise


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """These signals go to `handler` in the body, and afterwards to what they went to before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
