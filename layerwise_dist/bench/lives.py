# SPDX-License-Identifier: Apache-2.0
"""Where the time of a job went that was killed and started again. Pure: no clock, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Life:
    """From one kill to the next, by one clock in seconds. `ready`: model and optimizer are built, and checkpoints are
    looked for; `restored`: one is loaded, of step `start`; `steps`: the moments at which steps after it were done.
    """

    began: float
    ended: float = math.nan
    ready: float | None = None
    restored: float | None = None
    start: int = 0
    steps: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds, which add up to `total_s`. `useful_s` is what the useful steps take without checkpoints, `overhead_s`
    what they took beyond that; `lost_s` was trained in vain; `restart_s` passed until a new process was ready, and
    `read_s` until it had loaded. In these, `first_s` are what the first steps of lives would have taken longer than
    others without checkpoints too.
    """

    total_s: float
    useful_steps: int
    useful_s: float
    overhead_s: float
    lost_s: float
    restart_s: float
    read_s: float
    first_s: float = 0.0

    @property
    def goodput(self) -> float:
        """Useful steps a second, over those of a training that nothing disturbs."""
        return self.useful_s / self.total_s

    @property
    def ceiling(self) -> float:
        """The goodput that the launcher leaves, if restarts cost only what it takes to start processes, and what they
        do in their first step.
        """
        return (self.total_s - self.restart_s - self.first_s) / self.total_s


def parts_of(lives: Sequence[Life], step_s: float, first_s: float = 0.0) -> Parts:
    """A step is useful if no later life did it again. `step_s`: seconds of a step without checkpoints; `first_s`: by
    which a new process's first step takes longer.
    """
    useful, kept_s, lost_s, restart_s, read_s = 0, 0.0, 0.0, 0.0, 0.0
    first_again: float = math.inf  # the first step that a later life has done again, or would have
    for life in reversed(lives):
        ready = life.ended if life.ready is None else life.ready
        restored = life.ended if life.restored is None else life.restored
        restart_s += ready - life.began
        read_s += restored - ready
        if life.restored is None:
            continue
        kept = len(life.steps) if math.isinf(first_again) else max(0, int(first_again) - life.start)
        if kept > len(life.steps):  # the last one was done, and its process killed before it could say so
            mine_s = life.ended - restored
        else:
            mine_s = life.steps[kept - 1] - restored if kept else 0.0
        useful += kept
        kept_s += mine_s
        lost_s += life.ended - restored - mine_s
        first_again = min(first_again, life.start)
    total_s = lives[-1].ended - lives[0].began
    firsts_s = sum(min(first_s, life.ended - life.restored) for life in lives if life.restored is not None)
    return Parts(total_s, useful, useful * step_s, kept_s - useful * step_s, lost_s, restart_s, read_s, firsts_s)
