# SPDX-License-Identifier: Apache-2.0
"""What a trial of the soak is held against: uninterrupted plain training of the same layout.

Where the number of ranks changed at a step, it is plain training of the new layout that got the state of that step put
in by hand, as in tests/test_matrix.py: reductions round otherwise there, so that no uninterrupted run has these bits.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.kill import read
from kit.matrix import Layout
from kit.runners import WarmJob
from kit.trial_plan import OPTIMIZER, TOTAL

_DEADLINE_S = 180.0
Start = Callable[[Layout, dict[str, Any]], WarmJob]  # a job of tests/jobs/trial.py


@dataclass(frozen=True)
class Course:
    """How a state came about: trained under `layout` from the beginning, or from what `origin` had at `since`."""

    layout: Layout
    origin: Layout | None = None
    since: int = 0


@dataclass(frozen=True)
class Truth:
    """Of one course. By rank: digests by step. `whole`: of the global form, by step and name."""

    digests: list[dict[int, dict[str, str]]]
    whole: dict[int, dict[str, str]]


class Truths:
    """Made when they are first asked for, and kept. Any thread may ask."""

    def __init__(self, start: Start, folder: Path) -> None:
        self._start, self._folder = start, folder
        self._lock = threading.Lock()
        self._locks: dict[tuple[Layout, Layout | None], threading.Lock] = {}
        self._known: dict[Course, Truth] = {}
        self.launched = 0

    def of(self, course: Course) -> Truth:
        key = course.layout, course.origin
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if course not in self._known:
                if course.origin is not None:
                    self.of(Course(course.origin))  # which leaves the global forms
                self._make(*key)
            return self._known[course]

    def _make(self, layout: Layout, origin: Layout | None) -> None:
        out = self._folder / f"{origin or 'begin'}-{layout}".replace(":", "_")
        shutil.rmtree(out, ignore_errors=True)  # of one that failed
        out.mkdir()
        golden = self._folder / f"golden-{origin or layout}".replace(":", "_")
        starts = [0] if origin is None else list(range(1, TOTAL + 1))
        spec = {
            "wrapper": layout.wrapper, "optimizer": OPTIMIZER, "total": TOTAL, "out": str(out), "starts": starts,
            "golden": str(golden),
        }  # fmt: skip
        done = self._start(layout, spec).wait(_DEADLINE_S)
        assert done.returncode == 0, f"plain training of {layout} from {origin}: {done.output[-8000:]}"
        self.launched += 1
        told = [courses(lines) for lines in read(out, layout.ranks)]
        for start in starts:
            begun = [each[start] for each in told]
            digests = [{line.get("step", start): line for line in lines} for lines in begun]
            whole = {line["step"]: line["whole"] for line in begun[0] if "whole" in line}
            self._known[Course(layout, origin, start)] = Truth(digests, whole)


def courses(lines: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """What one rank of plain training told, by where it started from."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if "start" in line:
            now = found[line["start"]] = []
        if "hash" in line:
            now.append(line)
    return found


# -- what launches told ------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """Of one launch that is over."""

    layout: Layout
    lines: list[list[dict[str, Any]]]
    course: Course | None = None  # once it is known from where it started

    def starts(self) -> set[int]:
        return {line["start"] for lines in self.lines for line in lines if "start" in line}

    def committed(self) -> int:
        """The newest that a rank has heard of."""
        return max((line.get("committed") or 0 for lines in self.lines for line in lines), default=0)

    def steps(self) -> int:
        return sum("step" in line for lines in self.lines for line in lines)

    def ended(self) -> bool:
        return all(any("end" in line for line in lines) for lines in self.lines)


def courses_of(launches: list[Told]) -> None:
    """Finds out how the state of each launch came about. AssertionError if ranks started apart or lost a commit."""
    known = 0
    for number, launch in enumerate(launches):
        starts = launch.starts()
        assert len(starts) <= 1, f"launch {number}: ranks started from {sorted(starts)}"
        for start in starts:
            assert start >= known, f"launch {number} started from {start}, and {known} had been reported as committed"
            launch.course = _course(launch.layout, start, launches[:number])
        known = max(known, launch.committed())


def _course(layout: Layout, start: int, before: list[Told]) -> Course:
    if not start:
        return Course(layout)
    # What is committed was trained, and who trains has told from where: it is of the newest launch that began before.
    of = next(each.course for each in reversed(before) if each.course is not None and min(each.starts()) < start)
    assert of is not None
    if of.layout == layout:
        return of
    assert of.origin is None, f"{layout} goes on from {of}: more changes than there are references of"
    return Course(layout, of.layout, start)


def check(launches: list[Told], truths: Truths) -> int:
    """Each step of each launch is what it must be, to the bit. How many were compared. Raises AssertionError."""
    courses_of(launches)
    compared = 0
    for number, launch in enumerate(launches):
        if launch.course is None:
            continue
        truth = truths.of(launch.course)
        for rank, lines in enumerate(launch.lines):
            for line in lines:
                if "hash" not in line:
                    continue
                step = line.get("step", line.get("start"))
                wanted = truth.digests[rank].get(step)
                if wanted is None:  # before the first step of this course: a launch of its layout that had to go back
                    continue
                where = f"launch {number} ({launch.layout}), rank {rank}, step {step} of {launch.course}"
                assert line["hash"] == wanted["hash"], f"{where}: parameters or optimizer state differ"
                # Running statistics are each rank's own; after a change of ranks all have rank 0's at first.
                if rank == 0 or (launch.course.origin is None and "step" in line):
                    assert line["buffers"] == wanted["buffers"], f"{where}: buffers differ"
                compared += 1
    return compared


def check_read(read_: list[tuple[int, dict[str, str]]], launches: list[Told], truths: Truths) -> int:
    """What readers saw while the job ran is the global form of that step under some course of the job's."""
    for step, found in read_:
        could = [truths.of(course).whole for course in {each.course for each in launches if each.course is not None}]
        wrong = [_unlike(found, whole[step]) for whole in could if step in whole]
        assert wrong and not all(wrong), f"a reader saw step {step} with {min(wrong, key=len, default='no such step')}"
    return len(read_)


def _unlike(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    both = found.keys() & wanted.keys()
    params = sum(name.startswith("param/") for name in both)
    return [name for name in sorted(both) if found[name] != wanted[name]] + ["too few names"] * (params < 5)


def text(launches: list[Told]) -> str:
    """For a report of what went wrong: the last lines of each rank."""
    return "\n".join(
        f"launch {number} ({each.layout}) rank {rank}: " + " ".join(json.dumps(_short(line)) for line in lines[-6:])
        for number, each in enumerate(launches)
        for rank, lines in enumerate(each.lines)
    )


def _short(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("hash", "buffers")}
