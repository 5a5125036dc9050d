# SPDX-License-Identifier: Apache-2.0
"""`every_n_steps: auto`: rank 0 measures, all ranks change the interval at one boundary.

Ranks of one job mostly wait for each other in each step, so what one rank times has the others' checkpoints in it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import cast

from layerwise_dist.commit.participant import Participant
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.interval import Limits, Pace
from layerwise_dist.loop.sealed import Paced, PacedSeconds
from layerwise_dist.scheduler import LayerwiseCheckpointScheduler

log = logging.getLogger("layerwise_dist")


class Pacing:
    """One rank's part. Belongs to the training thread.

    Attributes:
        changes: how often it was changed.
    """

    def __init__(
        self, config: LayerwiseConfig, participant: Participant, scheduler: LayerwiseCheckpointScheduler, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._participant, self._scheduler, self._clock = participant, scheduler, clock
        self.changes = 0
        self._every: int | None = None  # the interval in force; None where it is fixed
        self._pace: Pace | None = None
        self._asked = False
        self._captures = 0
        self._since: float | None = None  # the boundary before, if the step after it is to be counted
        self._was_busy = False
        self._on_way: deque[tuple[int, float]] = deque()  # (step, boundary) of what is not committed yet
        self._limits = Limits(
            max_overhead=config.interval.max_overhead, mtbf_s=config.interval.mtbf_s,
            min_steps=config.interval.min_steps, max_steps=config.interval.max_steps,
        )  # fmt: skip
        if config.every_n_steps == "auto":
            pace = Pace(self._limits)
            self._hold(pace.steps)
            if participant.rank == 0:
                self._pace = pace

    @property
    def steps(self) -> int:
        """The interval; 0 where nothing is saved unasked."""
        return self._scheduler.every or 0

    def seal(self) -> Paced:
        """For the checkpoint's state: the interval in force; on rank 0 also what checkpoints have cost at it."""
        if self._every is None:
            return {}
        if self._pace is None:
            return {"interval": self._every}
        seconds = cast(PacedSeconds, self._pace.kept())
        return {"interval": self._every, "costs": {"ranks": self._participant.world_size, "seconds": seconds}}

    def passed(self, count: int, step: int, captures: int) -> None:
        """The rank goes on after boundary number `count` of the session; `captures` were sealed so far."""
        if self._every is None:
            return
        if (told := self._participant.interval(count)) is not None:
            self._change(*told, step)
        if self._pace is not None:
            self._watch(self._pace, step, captures)

    def restored(self, sealed: Paced) -> None:
        """Everything is as at a checkpoint that has this, if its interval was an automatic one. The job may have been
        given other limits since.
        """
        if self._every is None:
            return
        self._since = None
        self._on_way.clear()
        steps, costs = sealed.get("interval"), sealed.get("costs")
        if steps is not None:
            self._hold(self._limits.within(steps))
        if self._pace is not None:
            self._pace.forget_stretch()
            self._pace.follow(self._scheduler.every or 1)
            if costs is not None and steps == self._every and costs["ranks"] == self._participant.world_size:
                self._pace.take_up(cast(dict[str, list[float]], costs["seconds"]))

    def _hold(self, steps: int) -> None:
        self._scheduler.every = self._every = steps

    def _change(self, steps: int, why: str, step: int) -> None:
        if self._participant.rank == 0:
            log.info("a checkpoint every %d steps after step %d, before every %d: %s", steps, step, self.steps, why)
        self.changes += 1
        self._hold(steps)
        self._asked = False
        if self._pace is not None:
            self._pace.follow(steps)

    def _watch(self, pace: Pace, step: int, captures: int) -> None:
        now, busy = self._clock(), self._participant.in_flight > 0
        begun, self._captures = captures - self._captures, captures
        if self._since is not None:
            pace.step(now - self._since, busy=busy or self._was_busy, begun=begun)
        self._since, self._was_busy = now, busy
        if begun:
            self._on_way.append((step, now))
        newest = self._participant.reached("committed")
        while newest is not None and self._on_way and self._on_way[0][0] <= newest:
            saved, began = self._on_way.popleft()
            if saved == newest:
                pace.committed(now - began)
        if not self._asked and (choice := pace.decide()) is not None:
            self._asked = True
            self._participant.post({"t": "pace", "rank": 0, "steps": choice.steps, "why": choice.why})
