# SPDX-License-Identifier: Apache-2.0
"""Watches a job, and says when the interval between its checkpoints should change. Runs on rank 0."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from layerwise_dist.interval.rule import Choice, Costs, Limits, choose

FIRST = 10  # steps, until something is known
FIRST_OF_FAILING = 2  # where failures are expected: what fails before its first checkpoint learns nothing
LEAST_COSTS, LEAST_QUIET = 5, 3  # checkpoints and steps that are measured before anything is decided
_NEVER_QUIET = 8  # checkpoints in a row without a step that none slowed down
_NEVER_QUIET_YET = 4  # the same, while too few such steps are known to compare with
_REMEMBERED = 32  # costs; and as many steps
_KEPT = 8  # of them over a restart: soon outweighed, should the new machine be another
_LEAST_STEP_S = 1e-9  # what takes less was measured by a clock too coarse for it
_CHANGE = 1.25  # a smaller change is not worth one
_LEAP = 4  # times as much, or as little, at once


class Pace:
    """Watches training, and says when the interval should change.

    `step` at each boundary, `committed` for each commit; `decide` after either.
    """

    def __init__(self, limits: Limits, steps: int | None = None) -> None:
        """`steps`: the interval that the job had before, if it had one."""
        self._limits = limits
        first = FIRST if limits.mtbf_s is None else FIRST_OF_FAILING
        self.steps = limits.within(first if steps is None else steps)
        self._quiet: deque[float] = deque(maxlen=_REMEMBERED)
        self._costs: deque[float] = deque(maxlen=_REMEMBERED)
        self._writes: deque[float] = deque(maxlen=_REMEMBERED)
        self._disk: deque[float] = deque(maxlen=_REMEMBERED)
        self._written: list[float] = []  # of this stretch
        self._busy_s, self._busy, self._begun = 0.0, 0, 0  # of this stretch: seconds, steps, checkpoints
        self._fresh = False  # whether there is one since it was last decided
        self._since_quiet = 0  # checkpoints that began since a step was quiet

    def step(self, elapsed_s: float, *, busy: bool, begun: int) -> None:
        """A step took `elapsed_s`, its checkpoints' stalls included. `busy`: a checkpoint was begun in it or on its way
        during any of it; `begun`: how many were begun.
        """
        self._begun += begun
        self._since_quiet += begun
        if busy or begun:
            self._busy_s += elapsed_s
            self._busy += 1
            if self._begun < _NEVER_QUIET or len(self._quiet) < LEAST_QUIET:
                return  # else the disk never rests, and earlier steps say what one takes without it
        else:
            self._quiet.append(elapsed_s)
        self._since_quiet = 0
        if self._begun:
            base = statistics.median(self._quiet)
            self._costs.append(max(0.0, self._busy_s - self._busy * base) / self._begun)
            # The stretch has parts of two steps in which nothing was written; alone, a checkpoint took what it took.
            alone = statistics.mean(self._written) if self._written else self._busy_s
            self._disk.append(min(self._busy_s / self._begun, alone))
            self._fresh = True
        self.forget_stretch()

    def forget_stretch(self) -> None:
        """Drops what was measured since the last quiet step: it belongs to an evaluation or a restore."""
        self._busy_s, self._busy, self._begun = 0.0, 0, 0
        self._written.clear()

    def committed(self, write_s: float) -> None:
        """A checkpoint was committed `write_s` after its boundary."""
        self._writes.append(write_s)
        self._written.append(write_s)

    def kept(self) -> dict[str, list[float]]:
        """The newest seconds of each kind, by the names of `Costs`: for a job that fails before it has measured enough
        in one life.
        """
        return {name: list(each)[-_KEPT:] for name, each in self._measurements.items()}

    def take_up(self, kept: Mapping[str, Sequence[float]]) -> None:
        """Goes on with what an earlier life kept, at this interval. What this one has measured itself stands."""
        for name, each in self._measurements.items():
            if not each:
                each.extend(kept[name])

    def decide(self) -> Choice | None:
        """A new interval, if there should be one. It takes effect once `follow` says so."""
        if len(self._quiet) < LEAST_QUIET and self._since_quiet >= _NEVER_QUIET_YET:
            steps = self._limits.within(2 * self.steps)
            why = f"{self._since_quiet} checkpoints in a row left no step without one: there is nothing to compare with"
            self._since_quiet = 0
            return Choice(steps, why) if steps != self.steps else None
        if not self._fresh:
            return None
        self._fresh = False
        enough = len(self._costs) >= LEAST_COSTS and len(self._quiet) >= LEAST_QUIET
        if not enough or not all(self._measurements.values()) or self.measured.step_s < _LEAST_STEP_S:
            return None
        choice = choose(self.measured, self._limits)
        steps = self._limits.within(min(max(choice.steps, -(-self.steps // _LEAP)), _LEAP * self.steps))
        if steps == self.steps or max(steps, self.steps) < _CHANGE * min(steps, self.steps):
            return None
        return Choice(steps, choice.why)

    def follow(self, steps: int) -> None:
        """The interval is this from now on: what checkpoints cost is measured anew, since it may depend on it."""
        self.steps, self._since_quiet = steps, 0
        for each in (self._costs, self._writes, self._disk):
            each.clear()

    @property
    def measured(self) -> Costs:
        """Medians. REQUIRES: at least one of each was measured."""
        return Costs(**{name: statistics.median(each) for name, each in self._measurements.items()})

    @property
    def _measurements(self) -> dict[str, deque[float]]:
        return {
            "step_s": self._quiet, "checkpoint_s": self._costs, "write_s": self._writes, "disk_s": self._disk
        }  # fmt: skip
