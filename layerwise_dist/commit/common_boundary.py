# SPDX-License-Identifier: Apache-2.0
"""Finds one boundary that no rank has passed: for `save()`, and for leaving together.

Pure, as coordinator and ledger are; these are parts of both. A rank *asks* and passes no further boundary before it
hears where they meet. The coordinator tells all to *hold*; each answers, from its background, which boundary is the
next that it has not passed, and does not pass that one. They meet at the furthest of those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from layerwise_dist.commit.messages import Ask, Held, HoldBoundary, Meet


@dataclass(frozen=True, slots=True)
class Meeting:
    """What is to be done at a boundary. `leave`: the job ends there. Not `common`: other ranks are not there."""

    leave: bool
    why: str
    common: bool = True


class Hold:
    """One rank's part. Boundaries are counted from the session's start."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._passed = 0
        self._limit = math.inf
        self._meetings: dict[int, Meeting] = {}
        self._alone: Meeting | None = None

    def ask(self, *, leave: bool, why: str) -> list[Ask]:
        """For a meeting at the next boundary, or soon after it; nothing if there is one already."""
        at = self._passed + 1
        if any(meeting.leave or not leave for place, meeting in self._meetings.items() if place >= at):
            return []
        self._limit = min(self._limit, at)
        return [{"t": "ask", "rank": self._rank, "b": at, "leave": leave, "why": why}]

    def hold(self, message: HoldBoundary) -> list[Held]:
        self._limit = min(self._limit, self._passed + 1)
        return [{"t": "held", "rank": self._rank, "round": message["round"], "b": self._passed + 1}]

    def meet(self, message: Meet) -> None:
        self._limit = math.inf
        if message["b"] is not None:
            self._meetings[message["b"]] = Meeting(message["leave"], message["why"])
        elif message["leave"]:
            self._alone = Meeting(True, message["why"], common=False)

    def may_pass(self, boundary: int) -> bool:
        return boundary < self._limit

    @property
    def holds(self) -> bool:
        return self._limit < math.inf

    def passed(self, boundary: int) -> Meeting | None:
        self._passed = boundary
        return self._meetings.pop(boundary, None) or self._alone


@dataclass
class _Round:
    number: int
    since: float
    leave: bool
    why: str
    held: dict[int, int] = field(default_factory=dict)


class CommonBoundary:
    """The coordinator's part: one round at a time. Each method returns what is to be said to all."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        """A round that not all ranks have answered in `timeout_s` seconds comes to nothing."""
        self._world_size, self._timeout_s = world_size, timeout_s
        self._rounds = 0
        self._open: _Round | None = None
        self._last, self._last_leaves = 0, False
        self._impossible: str | None = None

    def ask(self, message: Ask, now: float) -> list[HoldBoundary | Meet]:
        leave, why = message["leave"], message["why"]
        if message["b"] <= self._last and (self._last_leaves or not leave):
            return []  # the asker is about to hear of a meeting that it has not passed
        if self._impossible is not None:
            return [_nowhere(0, leave, f"{why}; {self._impossible}")]
        if self._open is not None:
            if leave and not self._open.leave:
                self._open.leave, self._open.why = True, why
            return []
        self._rounds += 1
        self._open = _Round(self._rounds, now, leave, why)
        return [{"t": "hold", "round": self._rounds, "leave": leave, "why": why}]

    def held(self, message: Held) -> list[Meet]:
        current = self._open
        if current is None or current.number != message["round"]:
            return []
        current.held[message["rank"]] = message["b"]
        if len(current.held) < self._world_size:
            return []
        self._open = None
        self._last, self._last_leaves = max(current.held.values()), current.leave
        return [{"t": "meet", "round": current.number, "b": self._last, "leave": current.leave, "why": current.why}]

    def end(self, why: str) -> list[Meet]:
        """From now on no boundary is common to all: a rank has left, is gone, or all are stopping."""
        self._impossible = self._impossible or why
        return self._give_up(why)

    def tick(self, now: float) -> list[Meet]:
        current = self._open
        if current is None or now - current.since <= self._timeout_s:
            return []
        missing = sorted(set(range(self._world_size)) - current.held.keys())
        return self._give_up(f"waited {self._timeout_s:g} s for rank(s) {', '.join(map(str, missing))}")

    @property
    def idle(self) -> bool:
        return self._open is None

    def _give_up(self, why: str) -> list[Meet]:
        current, self._open = self._open, None
        return [] if current is None else [_nowhere(current.number, current.leave, f"{current.why}; {why}")]


def _nowhere(number: int, leave: bool, why: str) -> Meet:
    return {"t": "meet", "round": number, "b": None, "leave": leave, "why": why}
