# SPDX-License-Identifier: Apache-2.0
"""Turns notes of what happened into events: a pure state machine without clock, threads or I/O.

A checkpoint is one event, told once it is decided and what it cost the training thread is known. All times that go in
are seconds of `time.monotonic()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.telemetry.names import CHECKPOINT, PARTS

Event = dict[str, Any]
Measures = dict[str, int | float | None]
_LONGEST_REASON = 2000
_REMEMBERED = 256  # attempts that are not told yet: more than can be in flight


class Boundary(NamedTuple):
    step: int
    at: float


@dataclass(frozen=True, slots=True)
class Began:
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Captured:
    """It was sealed here, at `boundary`."""

    attempt: AttemptId
    state_bytes: int
    boundary: Boundary


@dataclass(frozen=True, slots=True)
class Stalled:
    """What the newest one that was captured has cost the training thread, by part, in seconds."""

    seq: int
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class Written:
    """This rank's shard is durable."""

    seq: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardDurable:
    """A rank's shard is."""

    seq: int
    rank: int


@dataclass(frozen=True, slots=True)
class Reached:
    """All ranks have."""

    seq: int
    step: int
    level: str


@dataclass(frozen=True, slots=True)
class GivenUp:
    seq: int
    step: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stopped:
    reason: str


@dataclass(frozen=True, slots=True)
class Restored:
    boundary: Boundary


Note = Began | Captured | Stalled | Written | ShardDurable | Reached | GivenUp | Stopped | Restored


@dataclass(slots=True)
class _Attempt:
    attempt: AttemptId
    began: float | None = None
    boundary: Boundary | None = None
    parts: dict[str, float] | None = None
    outcome: str | None = None
    ranks: dict[int, float] = field(default_factory=dict)  # when each one's shard was durable
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether there is nothing more to hear of it."""
        return self.outcome is not None and (self.boundary is None or self.parts is not None)

    def since(self, at: float) -> float | None:
        return None if self.began is None else at - self.began


class Assembler:
    """`facts()` are the measures that are looked at when a checkpoint is told: pool and disk. `passed()` is the newest
    boundary. Belongs to one thread.
    """

    def __init__(self, epoch: int, passed: Callable[[], Boundary], facts: Callable[[], Measures]) -> None:
        self._epoch, self._passed, self._facts = epoch, passed, facts
        self._attempts: dict[int, _Attempt] = {}
        self._done: dict[int, None] = {}  # seqs that were told: another rank may end one that this rank still captures
        self._stopped = False
        self._told = self.safe = passed()

    def take(self, note: Note, at: float) -> list[Event]:
        """The events that are whole with it. `at`: when it was noted."""
        match note:
            case Began():
                if (found := self._of(note.attempt)) is not None:
                    found.began = at
            case Captured():
                if (found := self._of(note.attempt)) is not None:
                    found.boundary = note.boundary
                    found.said["state_bytes"] = note.state_bytes
            case Stalled():
                return self._stalled(note)
            case Written():
                if (found := self._attempts.get(note.seq)) is not None:
                    found.said.update(shard_bytes=note.nbytes, write_s=(took := found.since(at)))
                    found.said["gb_per_s"] = note.nbytes / took / 1e9 if took else None
            case ShardDurable():
                if (found := self._attempts.get(note.seq)) is not None:
                    found.ranks[note.rank] = at
            case Reached():
                return self._reached(note, at)
            case GivenUp():
                if (found := self._of(AttemptId(self._epoch, note.seq, note.step))) is not None:
                    found.outcome = note.outcome
                    found.said["reason"] = note.reason[:_LONGEST_REASON]
                return self._whole()
            case Stopped():
                if not self._stopped:
                    self._stopped = True
                    return [{"event": "stopped", "reason": note.reason[:_LONGEST_REASON]}]
            case Restored():
                self._told = self.safe = note.boundary
                return [{"event": "restore", "step": note.boundary.step}]
        return []

    def progress(self) -> list[Event]:
        """An event if training has passed a boundary since it was last told of one."""
        passed = self._passed()
        if passed == self._told:
            return []
        self._told = passed
        return [{"event": "progress", "step": passed.step, **self._lag(passed)}]

    def end(self) -> list[Event]:
        """Whatever is left."""
        for each in self._attempts.values():
            each.outcome = each.outcome or "undecided"
            each.parts = each.parts or {}
        return self._whole()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _of(self, attempt: AttemptId) -> _Attempt | None:
        """None of one that was told."""
        if attempt.seq in self._done:
            return None
        found = self._attempts.setdefault(attempt.seq, _Attempt(attempt))
        known: dict[int, Any]
        for known in (self._attempts, self._done):
            while len(known) > _REMEMBERED:
                del known[min(known)]
        return found

    def _stalled(self, note: Stalled) -> list[Event]:
        for seq, each in self._attempts.items():
            if seq <= note.seq and each.boundary is not None and each.parts is None:
                each.parts = note.parts if seq == note.seq else dict.fromkeys(PARTS, 0.0)
        return self._whole()

    def _reached(self, note: Reached, at: float) -> list[Event]:
        found = self._attempts.get(note.seq)
        if found is None:
            return []
        found.said[f"{note.level}_s"] = found.since(at)
        if note.level != "committed":
            return []
        found.outcome = "committed"
        if found.boundary is not None:
            self.safe = found.boundary
        return self._whole()

    def _whole(self) -> list[Event]:
        done = sorted(seq for seq, each in self._attempts.items() if each.whole)
        self._done.update(dict.fromkeys(done))
        return [self._event(self._attempts.pop(seq)) for seq in done]

    def _event(self, found: _Attempt) -> Event:
        event: Event = {"event": "checkpoint", **dict.fromkeys(CHECKPOINT)}
        event.update(
            found.said, step=found.attempt.step, epoch=found.attempt.epoch, seq=found.attempt.seq,
            outcome=found.outcome, in_flight=len(self._attempts), **self._facts(), **self._lag(self._passed()),
        )  # fmt: skip
        if found.parts:
            event.update({f"stall_{part}_s": found.parts[part] for part in PARTS}, stall_s=sum(found.parts.values()))
        if found.ranks:
            slowest = max(found.ranks, key=lambda rank: found.ranks[rank])
            event.update(
                slowest_rank=slowest, slowest_behind_s=found.ranks[slowest] - min(found.ranks.values())
            )  # fmt: skip
        return event

    def _lag(self, passed: Boundary) -> dict[str, float]:
        return {"lag_steps": passed.step - self.safe.step, "lag_s": passed.at - self.safe.at}
