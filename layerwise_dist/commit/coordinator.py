# SPDX-License-Identifier: Apache-2.0
"""The rank-0 coordinator: decides which attempts become checkpoints.

`Coordinator` is a pure state machine: a message or the time goes in, what is to be done comes out. It reads no clock,
does no I/O and knows no threads, so that a simulation can drive it through any history. A `CoordinatorThread` runs it.
Commits go strictly by seq: a newer one aborts older attempts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerwise_dist.commit.alike import Alike, Samples, Unlike
from layerwise_dist.commit.common_boundary import CommonBoundary
from layerwise_dist.commit.grants import Grants
from layerwise_dist.commit.messages import AlikeSaid, Durable, Failed, Kept, Skipped, Staged, ToCoordinator, ToRanks
from layerwise_dist.commit.metadata import InDoubt
from layerwise_dist.commit.orders import Announce, ComposeManifest, Output, Retired, RetireOld, WriteManifest
from layerwise_dist.errors import OwnerError
from layerwise_dist.storage.filenames import AttemptId

log = logging.getLogger("layerwise_dist")


@dataclass
class _Attempt:
    seq: int
    attempt: str
    step: int
    since: float  # the deadline counts from here
    staged: set[int] = field(default_factory=set)
    reports: dict[int, Durable] = field(default_factory=dict)
    alike: Alike = field(default_factory=Alike)
    ready: bool = False  # all have reported
    asked: str = ""  # of the keepers: prepare or publish
    keepers: set[int] = field(default_factory=set)  # that have not answered


class Coordinator:
    """Every method that changes anything returns what is to be done, in order. `now` is seconds of any monotonic clock.
    `WriteManifest` and `ComposeManifest` are the last of their list; their end is said before anything else is.

    One attempt at a time is *current*: all have reported, and its manifest is on its way. With keepers (of directories
    that rank 0 does not see) they first *prepare* it; then rank 0 writes it, which is the commit; then they *publish*
    it.
    """

    def __init__(
        self, world_size: int, *, timeout_s: float, on_failure: str, raise_after: int, now: float,
        keepers: Collection[int] = (), replica_drift: str = "raise",
    ) -> None:  # fmt: skip
        """Attempts that are not decided in `timeout_s` seconds are aborted."""
        self._forgives_drift = replica_drift == "warn"
        self._samples, self._drifts = Samples(), set[tuple[str, str]]()  # those that were told
        self._keepers, self._now = frozenset(keepers), now
        self._current: _Attempt | None = None
        self._withdrawing: dict[int, tuple[list[AttemptId], set[int]]] = {}
        self._batches = 0
        self._world_size, self._timeout_s = world_size, timeout_s
        self._patience = 1 if on_failure == "raise" else raise_after
        self._open: dict[int, _Attempt] = {}
        self._decided: set[int] = set()
        self._last_committed = 0
        self._failures = 0
        self._stopped = False
        self._finished: str | None = None  # why nothing is committed any more
        self._silent: set[int] = set()  # that have left or are gone
        self._orphaned: set[int] = set()  # gone, and their monitors still report
        self._grants = Grants(world_size, now)
        self._common = CommonBoundary(world_size, timeout_s / 2)  # ranks that wait for it have `timeout_s`
        self._out: list[Output] = []

    def handle(self, message: ToCoordinator, now: float) -> list[Output]:
        """Takes one rank's message."""
        self._now = now
        match message["t"]:
            case "at":
                self._advance(message["rank"], float(message["b"]), now)
            case "closed":
                self._advance(message["rank"], math.inf, now)
                self._say_all(self._common.end(f"rank {message['rank']} has left"))
                self._miss(message["rank"])
            case "ask":
                self._say_all(self._common.ask(message, now))
            case "held":
                self._say_all(self._common.held(message))
            case "pace":
                if not self._stopped:
                    at = self.last_granted
                    self._say({"t": "interval", "at": at, "steps": message["steps"], "why": message["why"]})
            case "broke":
                self._finish(f"rank {message['rank']}: {message['why']}")
            case "gone":
                self._lose(message["rank"], message["why"], orphaned=False)
            case "orphaned":
                self._lose(message["rank"], message["why"], orphaned=True)
            case "alike" | "staged" | "durable" | "failed" | "skipped":
                self._report(message, now)
            case "kept":
                self._kept(message)
        return self._taken()

    @property
    def last_granted(self) -> int:
        """The boundary that no rank can have passed; -1 if that is any."""
        return self._grants.last

    def tick(self, now: float) -> list[Output]:
        """Ends attempts whose deadline has passed, naming the ranks that were waited for."""
        self._now = now
        for attempt in [a for a in self._open.values() if now - a.since > self._timeout_s]:
            missing = sorted(attempt.keepers or set(range(self._world_size)) - set(attempt.reports))
            whom = f"for rank(s) {', '.join(map(str, missing))}" if missing else "after an older attempt"
            self._give_up(attempt, f"waited {self._timeout_s:g} s {whom}")
        self._say_all(self._common.tick(now))
        return self._taken()

    def wrote(self, seq: int, problem: OSError | OwnerError | None) -> list[Output]:
        """How the `WriteManifest` of `seq` ended. OSError: nothing was committed; InDoubt or OwnerError: nothing may be
        committed by this session any more.
        """
        attempt = self._current
        if attempt is None or attempt.seq != seq:
            raise ValueError(f"no manifest of seq {seq} is being written")
        if isinstance(problem, InDoubt):
            # The manifest may survive or not: announcing either would be a guess, deleting anything a loss.
            self._close(attempt)
            self._finish(f"step {attempt.step} is in doubt: {problem}")
        elif isinstance(problem, OwnerError):
            self._abort(attempt, str(problem), failure=False)
            self._finish(str(problem))
        elif problem is not None:
            self._abort(attempt, f"the manifest could not be written: {problem}", failure=True)
        elif self._keepers:
            attempt.since = self._now
            self._ask_keepers(attempt, "publish", "")
        else:
            self._committed(attempt)
        return self._taken()

    def composed(self, seq: int, text: str, problem: OSError | OwnerError | None) -> list[Output]:
        """The manifest's text, or what `wrote` takes."""
        attempt = self._current
        if problem is not None or attempt is None:
            return self.wrote(seq, problem)
        self._ask_keepers(attempt, "prepare", text)
        return self._taken()

    def withdrawn(self, attempts: list[AttemptId]) -> list[Output]:
        """Rank 0 has removed these manifests, durably."""
        if self._keepers and attempts:
            self._batches += 1
            self._withdrawing[self._batches] = attempts, set(self._keepers)
            listed = [[a.epoch, a.seq, a.step] for a in attempts]
            self._say({"t": "withdraw", "batch": self._batches, "attempts": listed})
        else:
            self._out += map(Retired, attempts)
        return self._taken()

    @property
    def idle(self) -> bool:
        """Whether no attempt waits for anything."""
        return not self._open and self._common.idle

    @property
    def settled(self) -> bool:
        """Whether it is idle, and what was retired is gone everywhere."""
        return self.idle and not self._withdrawing

    # -- attempts -----------------------------------------------------------------------------------------------

    def _report(self, message: AlikeSaid | Staged | Durable | Failed | Skipped, now: float) -> None:
        seq = message["seq"]
        if message["t"] == "failed" and message["final"] and not self._orphaned:
            self._finish(f"checkpoint of step {message['step']} failed: rank {message['rank']}: {message['error']}")
        if seq in self._decided:
            if message["t"] == "alike":
                self._compare(message)
            return
        attempt = self._open.get(seq)
        if attempt is None:
            attempt = self._open[seq] = _Attempt(seq, message["attempt"], message["step"], now)
        if self._is_superseded(attempt):
            self._abort(attempt, f"superseded by seq {self._last_committed}", failure=False)
        elif self._finished is not None:
            self._abort(attempt, f"this session has stopped committing: {self._finished}", failure=False)
        elif (message["attempt"], message["step"], message["world_size"]) != (
            attempt.attempt,
            attempt.step,
            self._world_size,
        ):
            self._abort(
                attempt,
                f"rank {message['rank']} reports attempt {message['attempt']} of step {message['step']} in a world of "
                f"{message['world_size']}, others attempt {attempt.attempt} of step {attempt.step} in "
                f"{self._world_size}",
                failure=True,
            )
        elif message["t"] == "failed":
            self._abort(attempt, f"rank {message['rank']}: {message['error']}", failure=True)
        elif message["t"] == "skipped":
            self._abort(attempt, f"rank {message['rank']}: {message['reason']}", failure=False, skipped=True)
        elif message["t"] == "alike":
            self._compare(message)
        elif message["t"] == "staged":
            if message["rank"] not in attempt.staged:
                attempt.staged.add(message["rank"])
                if len(attempt.staged) == self._world_size:
                    self._say({"t": "staged", "seq": seq, "step": attempt.step})
            self._abort_if_missed(attempt)
        else:
            attempt.reports[message["rank"]] = message
            self._abort_if_missed(attempt)
            if self._has_all_reports(attempt):
                self._judge(seq, attempt.step, self._samples.rest(seq))
            if self._has_all_reports(attempt) and seq in self._open:
                self._say({"t": "durable", "seq": seq, "step": attempt.step})
                attempt.ready = True

    def _compare(self, message: AlikeSaid) -> None:
        """What a rank says to hold alike with others, with what they have said."""
        attempt = self._open.get(message["seq"])
        if attempt is not None and (unlike := attempt.alike.compare(message)) is not None:
            self._judge(message["seq"], message["step"], [unlike])
        for group in message["groups"]:
            self._judge(message["seq"], message["step"], self._samples.take(message["rank"], group))

    def _judge(self, seq: int, step: int, found: Iterable[Unlike]) -> None:
        """What was found when this attempt was heard of; it may be of an earlier one."""
        for unlike in found:
            if unlike.final and self._forgives_drift:
                known = unlike.ranks, unlike.sides
                first = known not in self._drifts
                self._drifts.add(known)
                self._say({"t": "drifted", "seq": seq, "step": step, "reason": unlike.why, "first": first})
                continue
            if unlike.final:
                self._finish(unlike.why)
            if (attempt := self._open.get(seq)) is not None:
                self._abort(attempt, unlike.why, failure=unlike.final, unlike="" if unlike.final else unlike.ranks)

    def _is_superseded(self, attempt: _Attempt) -> bool:
        """Whether a newer one is committed already."""
        return attempt.seq < self._last_committed

    def _has_all_reports(self, attempt: _Attempt) -> bool:
        """Whether every rank's shard is durable."""
        return len(attempt.reports) == self._world_size

    # -- manifests ----------------------------------------------------------------------------------------------

    def _proceed(self) -> None:
        """With the oldest attempt that is ready, if none is current."""
        if self._current is not None:
            return
        for attempt in sorted((a for a in self._open.values() if a.ready), key=lambda a: a.seq):
            if self._may_commit(attempt):
                self._current = attempt
                self._out.append((ComposeManifest if self._keepers else WriteManifest)(*self._reported(attempt)))
                return

    def _may_commit(self, attempt: _Attempt) -> bool:
        if self._finished is not None:
            self._abort(attempt, f"this session has stopped committing: {self._finished}", failure=False)
        return self._finished is None

    def _reported(self, attempt: _Attempt) -> tuple[int, int, list[Durable]]:
        return attempt.seq, attempt.step, [attempt.reports[rank] for rank in range(self._world_size)]

    def _ask_keepers(self, attempt: _Attempt, what: Literal["prepare", "publish"], manifest: str) -> None:
        attempt.asked, attempt.keepers = what, set(self._keepers)
        if what == "prepare":
            self._say({"t": what, "seq": attempt.seq, "step": attempt.step, "manifest": manifest})
        else:
            self._say({"t": what, "seq": attempt.seq, "step": attempt.step})
        for rank in sorted(self._keepers & self._silent)[:1]:
            self._give_up(attempt, f"rank {rank}, which keeps the manifests of its node, left")

    def _kept(self, message: Kept) -> None:
        """A keeper did what it was asked for, or could not."""
        rank, problem = message["rank"], message["error"]
        if message["what"] == "withdraw":
            batch = message["batch"]
            attempts, waiting = self._withdrawing.get(batch, ([], set()))
            waiting.discard(rank)
            if problem is not None:
                log.warning("rank %d could not remove old manifests: %s", rank, problem)
                self._withdrawing.pop(batch, None)  # nobody may touch what is left of those
            elif not waiting and batch in self._withdrawing:
                del self._withdrawing[batch]
                self._out += map(Retired, attempts)
            return
        attempt = self._current
        if attempt is None or (attempt.seq, attempt.asked) != (message["seq"], message["what"]):
            return
        attempt.keepers.discard(rank)
        if problem is not None:
            self._give_up(attempt, f"rank {rank}, which keeps the manifests of its node: {problem}")
        elif attempt.keepers:
            return
        elif attempt.asked == "publish":
            self._committed(attempt)
        elif self._may_commit(attempt):
            self._out.append(WriteManifest(*self._reported(attempt)))

    def _give_up(self, attempt: _Attempt, reason: str) -> None:
        """An attempt whose manifest rank 0 has written is a checkpoint, whatever becomes of it elsewhere."""
        if attempt.asked == "publish":
            self._close(attempt)
            self._finish(f"step {attempt.step} is committed, but its manifest is not on every node: {reason}")
        else:
            self._abort(attempt, reason, failure=True)

    def _committed(self, attempt: _Attempt) -> None:
        self._close(attempt)
        self._last_committed = attempt.seq
        self._failures = 0
        self._say({"t": "committed", "seq": attempt.seq, "step": attempt.step})
        for older in [a for a in self._open.values() if self._is_superseded(a)]:
            self._abort(older, f"superseded by seq {attempt.seq}", failure=False)
        self._decided = {seq for seq in self._decided if seq > attempt.seq - 1024}
        self._out.append(RetireOld())

    def _abort(self, attempt: _Attempt, reason: str, *, failure: bool, skipped: bool = False, unlike: str = "") -> None:
        self._close(attempt)
        self._judge(attempt.seq, attempt.step, self._samples.rest(attempt.seq))
        if failure and not self._orphaned:  # else all have stopped, and what monitors hold is still to be committed
            self._failures += 1
            if self._failures >= self._patience:  # said first: a rank that closes once this is decided must know it
                self._finish(f"checkpoint of step {attempt.step} failed: {reason}")
        self._say(
            {"t": "aborted", "seq": attempt.seq, "step": attempt.step, "reason": reason, "failure": failure,
             "skipped": skipped, "unlike": unlike}
        )  # fmt: skip

    def _close(self, attempt: _Attempt) -> None:
        del self._open[attempt.seq]
        self._decided.add(attempt.seq)
        if attempt is self._current:
            self._current = None

    def _lose(self, rank: int, why: str, *, orphaned: bool) -> None:
        """What it has reported as durable, or its monitor, if that has lost it, as staged, may become a checkpoint."""
        self._stop(f"rank {rank} is gone: {why}")
        if orphaned:
            self._orphaned.add(rank)
            for attempt in list(self._open.values()):
                self._abort_if_missed(attempt)
        else:
            self._miss(rank)

    def _miss(self, rank: int) -> None:
        """Nothing more comes from this rank."""
        self._silent.add(rank)
        if rank in self._keepers:
            self._withdrawing.clear()  # nobody may touch what is left of those
        if self._current is not None and rank in self._current.keepers:
            self._give_up(self._current, f"rank {rank}, which keeps the manifests of its node, left")
        for attempt in list(self._open.values()):
            self._abort_if_missed(attempt)

    def _abort_if_missed(self, attempt: _Attempt) -> None:
        # Of those that are gone, who are few: this is asked at every report.
        left = sorted(rank for rank in self._silent if rank not in attempt.reports)
        if missing := left or sorted(rank for rank in self._orphaned if rank not in attempt.staged):
            how = "left without a report" if left else "ended before they staged it"
            self._abort(attempt, f"rank(s) {', '.join(map(str, missing))} {how}", failure=True)

    # -- stopping at one boundary -------------------------------------------------------------------------------

    def _finish(self, reason: str) -> None:
        """Nothing is committed any more."""
        self._finished = self._finished or reason
        self._stop(reason)

    def _stop(self, reason: str) -> None:
        """All ranks raise at one boundary: the last one granted, which none of them can have passed."""
        if not self._stopped:
            self._stopped = True
            self._say({"t": "stop", "at": self.last_granted, "reason": reason})
            self._say_all(self._common.end(reason))

    def _advance(self, rank: int, boundary: float, now: float) -> None:
        if not self._stopped:
            self._say_all(self._grants.advance(rank, boundary, now))

    def _say(self, message: ToRanks) -> None:
        self._out.append(Announce(message))

    def _say_all(self, messages: Sequence[ToRanks]) -> None:
        self._out += map(Announce, messages)

    def _taken(self) -> list[Output]:
        self._proceed()
        out, self._out = self._out, []
        return out
