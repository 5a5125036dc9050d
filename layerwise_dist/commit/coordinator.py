"""The rank-0 coordinator: decides, alone, which attempts become checkpoints.

`Coordinator` is the state machine: messages and the passing of time in, messages out; it does no I/O but through the
`commit` call it was given. `CoordinatorThread` runs it. Commits go strictly by seq: a newer one aborts older attempts.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layerwise_dist.commit.metadata import InDoubt
from layerwise_dist.commit.transports import Message
from layerwise_dist.errors import OwnerError

log = logging.getLogger("layerwise_dist")

# Boundaries (counted from the session's start) that ranks may pass before the coordinator's first word.
FIRST_GRANT = 8
_GRANT_SECONDS = 2.0


@dataclass
class _Attempt:
    seq: int
    attempt: str
    step: int
    since: float
    staged: set[int] = field(default_factory=set)
    reports: dict[int, Message] = field(default_factory=dict)


class Coordinator:
    """Single-threaded. `send(message)` reaches every rank, in order.

    `commit(seq, step, reports)` makes the manifest durable, reports ordered by rank; it raises OSError (nothing was
    committed), `InDoubt` or OwnerError (nothing may be committed by this session any more).
    """

    def __init__(
        self, world_size: int, *, send: Callable[[Message], None], commit: Callable[[int, int, list[Message]], None],
        timeout_s: float, on_failure: str, raise_after: int, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._world_size, self._send, self._commit, self._clock = world_size, send, commit, clock
        self._timeout_s, self._patience = timeout_s, 1 if on_failure == "raise" else raise_after
        self._open: dict[int, _Attempt] = {}
        self._decided: set[int] = set()
        self._last_committed = 0
        self._failures = 0
        self._stopped = False
        self._at = {rank: 0.0 for rank in range(world_size)}
        self._granted = float(FIRST_GRANT) if world_size > 1 else math.inf
        self._pace: tuple[float, float] = (clock(), 0.0)

    def handle(self, message: Message) -> bool:
        """Takes one rank's message. True when a checkpoint was committed by it."""
        kind = message["t"]
        if kind == "at":
            self._advance(message["rank"], float(message["b"]))
        elif kind == "closed":
            self._advance(message["rank"], math.inf)
        elif kind in ("staged", "durable", "failed", "skipped"):
            return self._report(kind, message)
        return False

    def tick(self) -> None:
        """Ends attempts whose deadline has passed, naming the ranks that were waited for."""
        for attempt in [a for a in self._open.values() if self._clock() - a.since > self._timeout_s]:
            missing = sorted(set(range(self._world_size)) - set(attempt.reports))
            self._abort(
                attempt, f"waited {self._timeout_s:g} s for rank(s) {', '.join(map(str, missing))}", failure=True
            )

    @property
    def idle(self) -> bool:
        return not self._open

    def _report(self, kind: str, message: Message) -> bool:
        seq = message["seq"]
        if kind == "failed" and message["final"]:
            self._stop(f"checkpoint of step {message['step']} failed: rank {message['rank']}: {message['error']}")
        if seq in self._decided:
            return False
        attempt = self._open.get(seq)
        if attempt is None:
            attempt = self._open[seq] = _Attempt(seq, message["attempt"], message["step"], self._clock())
        if seq < self._last_committed:
            self._abort(attempt, f"superseded by seq {self._last_committed}", failure=False)
        elif self._stopped:
            self._abort(attempt, "this session has stopped committing", failure=False)
        elif (message["attempt"], message["step"], message["world_size"]) != (
            attempt.attempt,
            attempt.step,
            self._world_size,
        ):
            self._abort(
                attempt,
                f"rank {message['rank']} reports attempt {message['attempt']} of step {message['step']} in a world of "
                f"{message['world_size']}, others attempt {attempt.attempt} of step {attempt.step} in {self._world_size}",
                failure=True,
            )
        elif kind == "failed":
            self._abort(attempt, f"rank {message['rank']}: {message['error']}", failure=True)
        elif kind == "skipped":
            self._abort(attempt, f"rank {message['rank']}: {message['reason']}", failure=False, skipped=True)
        elif kind == "staged":
            attempt.staged.add(message["rank"])
            if len(attempt.staged) == self._world_size:
                self._send({"t": "staged", "seq": seq, "step": attempt.step})
        else:
            attempt.reports[message["rank"]] = message
            if len(attempt.reports) == self._world_size:
                return self._decide(attempt)
        return False

    def _decide(self, attempt: _Attempt) -> bool:
        self._send({"t": "durable", "seq": attempt.seq, "step": attempt.step})
        try:
            self._commit(attempt.seq, attempt.step, [attempt.reports[rank] for rank in range(self._world_size)])
        except InDoubt as error:
            # The manifest may survive or not: announcing either would be a guess, deleting anything a loss.
            del self._open[attempt.seq]
            self._decided.add(attempt.seq)
            self._stop(f"step {attempt.step} is in doubt: {error}")
            return False
        except OwnerError as error:
            self._abort(attempt, str(error), failure=False)
            self._stop(str(error))
            return False
        except OSError as error:
            self._abort(attempt, f"the manifest could not be written: {error}", failure=True)
            return False
        del self._open[attempt.seq]
        self._decided.add(attempt.seq)
        self._last_committed = attempt.seq
        self._failures = 0
        self._send({"t": "committed", "seq": attempt.seq, "step": attempt.step})
        for older in [a for a in self._open.values() if a.seq < attempt.seq]:
            self._abort(older, f"superseded by seq {attempt.seq}", failure=False)
        self._decided = {seq for seq in self._decided if seq > attempt.seq - 1024}
        return True

    def _abort(self, attempt: _Attempt, reason: str, *, failure: bool, skipped: bool = False) -> None:
        del self._open[attempt.seq]
        self._decided.add(attempt.seq)
        if failure:
            self._failures += 1
            if self._failures >= self._patience:  # said first: a rank that closes once this is decided must know it
                self._stop(f"checkpoint of step {attempt.step} failed: {reason}")
        self._send(
            {"t": "aborted", "seq": attempt.seq, "step": attempt.step, "reason": reason, "failure": failure,
             "skipped": skipped}
        )  # fmt: skip

    def _stop(self, reason: str) -> None:
        """All ranks raise at one boundary: the last one granted, which none of them can have passed."""
        if not self._stopped:
            self._stopped = True
            at = -1 if math.isinf(self._granted) else int(self._granted)
            self._send({"t": "stop", "at": at, "reason": reason})

    def _advance(self, rank: int, boundary: float) -> None:
        self._at[rank] = max(self._at[rank], boundary)
        slowest = min(self._at.values())
        if self._stopped or math.isinf(slowest) or math.isinf(self._granted):
            return
        began, first = self._pace
        now = self._clock()
        rate = (slowest - first) / max(now - began, 1e-3)
        if now - began > 10:
            self._pace = (now, slowest)
        ahead = max(FIRST_GRANT, math.ceil(rate * _GRANT_SECONDS))
        if self._granted - slowest <= ahead / 2:
            self._granted = slowest + ahead
            self._send({"t": "grant", "b": int(self._granted)})


class CoordinatorThread:
    """Runs the coordinator on rank 0, and the work that follows a commit (retention)."""

    def __init__(self, coordinator: Coordinator, after_commit: Callable[[], None]) -> None:
        self._coordinator, self._after_commit = coordinator, after_commit
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="layerwise-coordinator", daemon=True)
        self._thread.start()

    def post(self, message: Message) -> None:
        self._inbox.put(message)

    def close(self, timeout_s: float) -> None:
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            message = self._next()
            if message is None:
                return
            if message and self._coordinator.handle(message):
                self._retire()
            self._coordinator.tick()

    def _next(self) -> Any:
        try:
            return self._inbox.get(timeout=0.2 if not self._coordinator.idle else 5.0)
        except queue.Empty:
            return {}

    def _retire(self) -> None:
        try:
            self._after_commit()
        except (OSError, OwnerError) as error:
            log.warning("an old checkpoint could not be removed: %s", error)
