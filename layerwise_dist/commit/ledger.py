# SPDX-License-Identifier: Apache-2.0
"""One rank's record of its attempts, as a pure state machine: events go in, actions come out.

No clock, no I/O, no threads: a simulation can drive it through any history. `participant.Participant` runs it.

A shard that was reported durable is *in doubt*: whatever else happens, it is neither removed nor reused before rank 0's
word is read, that the attempt was aborted or that its checkpoint was retired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from layerwise_dist.commit.common_boundary import Hold, Meeting
from layerwise_dist.commit.grants import FIRST_GRANT
from layerwise_dist.commit.messages import Aborted, DurableBase, OfAttempt, ToCoordinator, ToRanks
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import Leftover, Write
from layerwise_dist.storage.reports import ShardReport

LEVELS: Final = ("staged", "durable", "committed")
_ERROR_CHARS = 2000  # of another rank's message
_REMEMBERED = 64  # aborted steps whose reason can be asked for


@dataclass(frozen=True, slots=True)
class Post:
    """Send this to the coordinator; in order with all others."""

    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the shard durable, then say `persisted` or `failed`; in order with the next two."""

    write: Write


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop writing (nothing was begun if `write` is None), then say `gave_up` with all of this."""

    attempt: AttemptId
    error: str
    write: Leftover | None
    final: bool
    told: bool = False  # the script has read of it already


@dataclass(frozen=True, slots=True)
class Discard:
    """Stop writing and remove this rank's files, then say `discarded`."""

    write: Leftover


@dataclass(frozen=True, slots=True)
class Retire:
    """The checkpoint's manifest is gone for good: its shard here may be reused."""

    attempt: AttemptId


Action = Post | Persist | GiveUp | Discard | Retire


class Ledger:
    """Each method that changes anything returns what is to be done for it, in order."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.reached: dict[str, int | None] = dict.fromkeys(LEVELS)
        self.commits = self.aborts = self.skips = 0
        self.drifts = 0  # how often ranks that should were found not to hold the same parameters, and went on
        self.stop: tuple[float, str] | None = None  # the boundary to raise at, and why
        self.lost: str | None = None
        self._lost_at = -math.inf  # the boundary to raise that at
        self.unlike: set[str] = set()  # ranks that do not share optimizer state, though they should
        self._aborted: dict[int, str] = {}
        self._aborted_seqs: set[int] = set()
        self._failures: dict[int, str] = {}  # by seq, of those aborted that were not skipped
        self._committed_seq = 0
        self._undecided: dict[int, Leftover] = {}
        self._busy: set[int] = set()
        self._granted = float(FIRST_GRANT) if world_size > 1 else math.inf
        self._intervals: list[tuple[int, int, str]] = []  # from a boundary on, so many steps, and why
        self._hold = Hold(rank)
        self._tell = self._granted / 2  # the boundary from which on the coordinator wants to hear

    # -- what the training thread does --------------------------------------------------------------------------

    def began(self, attempt: AttemptId) -> None:
        """The attempt's shard is on its way to this rank's disk, until it is durable or aborted."""
        self._busy.add(attempt.seq)

    def sealed(self, write: Write) -> list[Action]:
        """Nothing that training does can change the attempt any more."""
        if write.attempt.seq in self._aborted_seqs:  # rank 0 decided before this rank had sealed it
            return [Discard(write)]
        self._undecided[write.attempt.seq] = write
        return [Post({"t": "staged", **self._of(write.attempt)}), Persist(write)]

    def failed(
        self, attempt: AttemptId, error: str, write: Leftover | None, *, final: bool = False, told: bool = False
    ) -> list[Action]:
        """This rank gives the attempt up; the coordinator aborts it for all. `final`: and every later one, for good."""
        self._busy.add(attempt.seq)
        if write is not None:
            if attempt.seq in self._aborted_seqs:
                return [Discard(write)]
            self._undecided[attempt.seq] = write
        return [GiveUp(attempt, error, write, final, told)]

    def skipped(self, attempt: AttemptId, reason: str) -> list[Action]:
        """This rank takes no part in the attempt, which is no failure; the coordinator drops it for all."""
        return [Post({"t": "skipped", **self._of(attempt), "reason": reason})]

    def boundary(self, count: int) -> list[Action]:
        """The rank is at this boundary, counted from the session's start."""
        if count < self._tell:
            return []
        self._tell = math.inf
        return [Post({"t": "at", "rank": self.rank, "b": count})]

    def passed(self, count: int) -> Meeting | None:
        """The rank goes on after this boundary; what all have agreed to do at it."""
        return self._hold.passed(count)

    def interval(self, count: int) -> tuple[int, str] | None:
        """How many steps lie between checkpoints after boundary `count`, and why, if that changes there."""
        due = [each for each in self._intervals if each[0] <= count]
        self._intervals = [each for each in self._intervals if each[0] > count]
        return due[-1][1:] if due else None

    def ask(self, *, leave: bool, why: str) -> list[Action]:
        """For one boundary at which all ranks save, or save and leave.

        This rank waits at its next until it is known.
        """
        return [*map(Post, self._hold.ask(leave=leave, why=why))]

    def restored(self, step: int | None) -> None:
        """After a restore the step counts from there: what a later, abandoned branch had reached says nothing now."""
        self.reached = dict.fromkeys(LEVELS, step)
        self._aborted.clear()
        self._failures.clear()

    # -- what the background did --------------------------------------------------------------------------------

    def wanted(self, write: Write) -> bool:
        """Whether persisting still makes sense; if not, its clean-up was asked for."""
        return write.attempt.seq in self._undecided

    def persisted(self, attempt: AttemptId, report: ShardReport) -> list[Action]:
        self._busy.discard(attempt.seq)
        base: DurableBase | None = None
        if report.base is not None:
            base = {
                "attempt": report.base.attempt, "nbytes": report.base.nbytes, "header_bytes": report.base.header_bytes,
                "header_hash": f"{report.base.header_hash:016x}",
            }  # fmt: skip
        return [
            Post(
                {"t": "durable", **self._of(attempt), "file": report.file, "nbytes": report.nbytes,
                 "header_bytes": report.header_bytes, "header_hash": f"{report.header_hash:016x}", "base": base}
            )
        ]  # fmt: skip

    def written(self, attempt: AttemptId) -> None:
        """Another process has made the shard durable, and says so to the coordinator itself."""
        self._busy.discard(attempt.seq)

    def gave_up(self, gone: GiveUp) -> list[Action]:
        self._busy.discard(gone.attempt.seq)
        error = gone.error[:_ERROR_CHARS]
        return [Post({"t": "failed", **self._of(gone.attempt), "error": error, "final": gone.final})]

    def discarded(self, write: Leftover) -> None:
        self._busy.discard(write.attempt.seq)

    # -- what rank 0 says ---------------------------------------------------------------------------------------

    def receive(self, message: ToRanks) -> list[Action]:
        actions: list[Action] = []
        match message["t"]:
            case "grant":
                self._granted = max(self._granted, message["b"])
                self._tell = message["tell"]
            case "stop":
                self.stop = (message["at"], f"checkpointing has stopped on all ranks: {message['reason']}")
            case "staged" | "durable" | "committed" as kind:
                for level in LEVELS[: LEVELS.index(kind) + 1]:
                    self.reached[level] = max(message["step"], self.reached[level] or 0)
                if kind == "committed":
                    self.commits += 1
                    self._committed_seq = max(self._committed_seq, message["seq"])
                    self._undecided.pop(message["seq"], None)
            case "aborted":
                actions += self._note_aborted(message)
            case "drifted":
                self.drifts += 1
            case "interval":
                self._intervals.append((message["at"], message["steps"], message["why"]))
            case "hold":
                actions += map(Post, self._hold.hold(message))
            case "meet":
                self._hold.meet(message)
            case "retired":
                actions.append(Retire(AttemptId(message["epoch"], message["seq"], message["step"])))
        return actions

    def _note_aborted(self, message: Aborted) -> list[Action]:
        if message["skipped"]:
            self.skips += 1
        else:
            self.aborts += 1
        if message["unlike"]:
            self.unlike.add(message["unlike"])
        self._aborted_seqs = {seq for seq in self._aborted_seqs if seq > message["seq"] - 1024} | {message["seq"]}
        reason = f"the checkpoint of step {message['step']} was aborted: {message['reason']}"
        self._aborted[message["step"]] = reason
        if not message["skipped"]:
            self._failures[message["seq"]] = reason
        for known in (self._aborted, self._failures):
            if len(known) > _REMEMBERED:
                del known[min(known)]
        write = self._undecided.pop(message["seq"], None)
        return [] if write is None else [Discard(write)]

    def lose(self, why: str, *, at_once: bool = True) -> None:
        """The connection to rank 0 is gone, for good: what is in doubt stays so until the next start.

        Without `at_once` the others' training continues, and this rank raises where they will: at the last boundary
        that was granted.
        """
        if self.lost is None:
            self.lost = why
            self._lost_at = -math.inf if at_once or math.isinf(self._granted) else self._granted

    # -- what is known ------------------------------------------------------------------------------------------

    @property
    def on_disk_way(self) -> int:
        """How many attempts' shards are on their way to this rank's disk."""
        return len(self._busy)

    @property
    def in_flight(self) -> int:
        """How many attempts were begun and are not decided. Once nothing is decided any more: `on_disk_way`."""
        return self.on_disk_way if self.ended() is not None else len(self._busy | self._undecided.keys())

    @property
    def undecided_steps(self) -> list[int]:
        return sorted(write.attempt.step for write in self._undecided.values())

    @property
    def drained(self) -> bool:
        """Whether nothing of this rank's waits for the disk or for a decision."""
        return self.lost is not None or (not self._busy and (not self._undecided or self.stop is not None))

    @property
    def settled(self) -> bool:
        """Whether it is drained, and whatever was undecided when the session stopped is decided too."""
        return self.lost is not None or not (self._busy or self._undecided)

    def may_pass(self, count: int) -> bool:
        """Whether a rank at boundary `count` need not wait for the coordinator; it may have to raise."""
        if self.lost is not None or self.stop is not None:
            return True
        return count < self._granted and self._hold.may_pass(count)

    @property
    def holds(self) -> bool:
        """Whether this rank has promised not to pass its next boundary before it hears where all meet."""
        return self._hold.holds

    def must_raise(self, count: int) -> str | None:
        """Why a rank raises at boundary `count`."""
        if self.stop is not None and count >= self.stop[0]:
            return self.stop[1]
        return self.lost if count >= self._lost_at else None

    def ended(self) -> str | None:
        """Why the session has stopped, whichever step it is to be raised at."""
        return self.stop[1] if self.stop is not None else self.lost

    def has_reached(self, step: int, level: str) -> bool:
        reached = self.reached[level]
        return reached is not None and reached >= step

    def hopeless(self, step: int) -> str | None:
        """Why that step's checkpoint will not come."""
        return self._aborted.get(step) or self.ended()

    def is_committed(self, attempt: AttemptId) -> bool:
        """Commits go in the order of seq, so one that was not aborted by then is among those up to the newest."""
        return attempt.seq not in self._aborted_seqs and self._committed_seq >= attempt.seq

    def is_hopeless(self, attempt: AttemptId) -> bool:
        return attempt.seq in self._aborted_seqs or self.ended() is not None

    def is_decided(self, attempt: AttemptId) -> bool:
        return attempt.seq in self._aborted_seqs or self.is_committed(attempt)

    def failure(self, attempt: AttemptId) -> str | None:
        """Why that attempt was aborted, unless it was skipped."""
        return self._failures.get(attempt.seq)

    def _of(self, attempt: AttemptId) -> OfAttempt:
        return {
            "rank": self.rank, "world_size": self.world_size,
            "seq": attempt.seq, "attempt": attempt.text, "step": attempt.step,
        }  # fmt: skip
