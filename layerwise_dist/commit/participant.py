# SPDX-License-Identifier: Apache-2.0
"""One rank's part in commits: persists sealed shards in the background, reports them, and learns the decisions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

from layerwise_dist.commit.agreement import Agreement
from layerwise_dist.commit.common_boundary import Meeting
from layerwise_dist.commit.coordinator_thread import CoordinatorThread
from layerwise_dist.commit.keeper import HEARS, KeeperThread
from layerwise_dist.commit.ledger import Action, Ledger, Post, Retire
from layerwise_dist.commit.messages import ToCoordinator, ToRanks
from layerwise_dist.commit.news import Listener, News, Witness, warn_of
from layerwise_dist.commit.persisting import Persisting
from layerwise_dist.commit.transports import Transport
from layerwise_dist.commit.waits import Waits
from layerwise_dist.errors import CommitError, LayerwiseError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import Leftover, Write
from layerwise_dist.supervision.patience import DISK_SHARE

log = logging.getLogger("layerwise_dist")


class Participant:
    """Runs this rank's `Ledger`, and has its part in what all ranks agree on.

    Thread-safe. Every wait has a deadline of `timeout_s` seconds or its own, and says for whom it waited.
    """

    def __init__(
        self, transport: Transport, *, timeout_s: float, coordinator: CoordinatorThread | None = None,
        through_monitor: bool = False, tells: bool = True,
    ) -> None:  # fmt: skip
        """Hears from now on.

        Args:
            coordinator: what decides, on rank 0, if it is there before this. By default `opened` brings it.
            through_monitor: another process speaks for this rank, whose end is not that of another rank's training.
            tells: whether rank 0 warns of what became of all ranks' checkpoints; the other ranks never do.
        """
        self.rank, self.world_size = transport.rank, transport.world_size
        self._transport, self.timeout_s = transport, timeout_s
        self._through_monitor, self._tells = through_monitor, tells and self.rank == 0
        self.disk_s = DISK_SHARE * timeout_s  # the longest wait for this rank's disk within what all ranks do
        self._ledger = Ledger(self.rank, self.world_size)
        self._waits = Waits(lambda: self._ledger.lost)
        self._changed = self._waits.changed
        self._agreement = Agreement(transport, self._waits, timeout_s)
        self._coordinator = coordinator
        self._keeper: KeeperThread | None = None
        self._apart = False
        self._leaving: Callable[[str], None] | None = None
        self._retire: Callable[[AttemptId], None] | None = None
        self._news = News()
        self._persisting = Persisting(
            self._ledger, self._waits, self._do, self._news.written, timeout_s=timeout_s, failed=self.broke
        )
        transport.start(self._on_message, self._on_coordinator_message if self.rank == 0 else None, self._on_error)

    # -- what is there only later -------------------------------------------------------------------------------

    def opened(self, *, apart: bool, coordinator: CoordinatorThread | None, keeper: KeeperThread | None) -> None:
        """The session has begun, on which all ranks agreed through this object.

        `apart`: whether there are directories that rank 0 does not see. `coordinator` decides, on rank 0; `keeper`
        keeps the records of the ranks that share this rank's directory, until `close`.
        """
        self._apart, self._coordinator, self._keeper = apart, coordinator, keeper

    @property
    def apart(self) -> bool:
        """Whether there are directories that rank 0 does not see."""
        return self._apart

    def recycle(self, retire: Callable[[AttemptId], None]) -> None:
        """`retire` is called with each checkpoint of this session whose manifest rank 0 removed durably. The writer
        brings it, which is opened in the session's directory. It must not wait.
        """
        self._retire = retire

    def judge_by(self, judge: Callable[[], None]) -> None:
        """`judge()` gives the verdicts that only the training thread can give, as far as they can be given by now; on
        any other thread it does nothing. Every wait begins with it, and calls it again when a verdict is wanted: what
        is waited for may need that verdict. The engine brings it, which is made of this object.
        """
        self._waits.judge_by(judge)

    def when_leaving(self, leaving: Callable[[str], None]) -> None:
        """`leaving(why)` is called as soon as this rank hears that all will leave. It must not wait. What hears the
        signal brings it, which asks through this object.
        """
        self._leaving = leaving

    def tell(self, listener: Listener) -> None:
        """From now on. The engine brings it."""
        self._news.listener = listener

    def show(self, witness: Witness) -> None:
        """From now on. The engine brings it."""
        self._news.witness = witness

    # -- what is said -------------------------------------------------------------------------------------------

    def verdict_wanted(self) -> None:
        """A shard's blocks are written, and it now waits for the training thread's verdict. Any thread."""
        self._waits.verdict_wanted()

    def keep_branch(self, text: str) -> None:
        """A branch record, if this rank keeps any. Raises OSError, InDoubt or OwnerError."""
        if self._keeper is not None:
            self._keeper.keeper.keep_branch(text)

    def post(self, message: ToCoordinator) -> None:
        self._transport.post(message)

    def agree(
        self, what: str, payload: Any, decide: Callable[[list[Any]], Any], *, timeout_s: float | None = None
    ) -> Any:
        """All ranks call it in the same order; rank 0's `decide(payloads by rank)` is returned on every rank.

        What `decide` raises is raised on all ranks, as a CommitError if nobody expected it. Raises DeadlineError naming
        the ranks waited for.
        """
        return self._agreement.agree(what, payload, decide, timeout_s)

    def broke(self, why: str) -> None:
        """Something that checkpoints need came to an end on this rank, by an error that nobody expected: no rank
        commits anything more, and all raise at one boundary, whatever `on_failure` is. Any thread.
        """
        self._transport.post({"t": "broke", "rank": self.rank, "why": why})
        with self._changed:
            self._ledger.lose(f"rank {self.rank}: {why}", at_once=False)
            self._news.lost(f"rank {self.rank}: {why}")
            self._changed.notify_all()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def staged(self, write: Write) -> None:
        """The attempt is sealed here: nothing that training does can change it any more. Persists in the background."""
        with self._changed:
            self._do(self._ledger.sealed(write))

    def began(self, attempt: AttemptId) -> None:
        with self._changed:
            self._ledger.began(attempt)
            self._news.began(attempt)

    def failed(
        self, attempt: AttemptId, error: str, write: Leftover | None, *, final: bool = False, told: bool = False
    ) -> None:
        """This rank gives it up; the coordinator aborts it for all. `final`: and all later ones. `told`: warned of."""
        with self._changed:
            self._do(self._ledger.failed(attempt, error, write, final=final, told=told))

    def written(self, attempt: AttemptId, nbytes: int) -> None:
        """Another process, which reports it itself, has made this rank's shard of so many bytes durable."""
        with self._changed:
            self._ledger.written(attempt)
            self._news.written(attempt, nbytes)
            self._changed.notify_all()

    def skipped(self, attempt: AttemptId, reason: str) -> None:
        """This rank takes no part in the attempt, which is no failure; the coordinator drops it for all."""
        with self._changed:
            self._do(self._ledger.skipped(attempt, reason))

    def take_unlike(self) -> set[str]:
        """Ranks, as text, that the coordinator has found not to have the same optimizer state."""
        with self._changed:
            found, self._ledger.unlike = self._ledger.unlike, set()
            return found

    def wait_room(self, max_in_flight: int, *, disk_s: float, decision_s: float) -> Literal["disk", "rank 0"] | None:
        """Waits until fewer than `max_in_flight` attempts are in flight; returns what it waited for in vain.

        `disk_s` seconds at most while as many shards are on their way to this rank's disk, and `decision_s` at most
        until rank 0 has decided on enough of them.
        """
        state, began = self._ledger, time.monotonic()

        def lost() -> bool:  # with a monitor that is lost nothing is on its way any more
            return self._through_monitor and state.lost is not None

        with self._changed:
            if not self._waits.until(lambda: state.on_disk_way < max_in_flight or lost(), began + disk_s):
                return "disk"
            if not self._waits.until(lambda: state.in_flight < max_in_flight or lost(), began + decision_s):
                return "rank 0"
            return None

    @property
    def in_flight(self) -> int:
        """Attempts of this rank that were begun and are not decided."""
        with self._changed:
            return self._ledger.in_flight

    @property
    def undecided_steps(self) -> list[int]:
        """Steps that are sealed here, and not decided."""
        with self._changed:
            return self._ledger.undecided_steps

    def boundary(self, count: int) -> Meeting | None:
        """Call at each boundary, counted from the session's start. What all ranks do at it, if they have agreed on it.

        Raises CommitError at the boundary at which all ranks raise.
        """
        with self._changed:
            self._do(self._ledger.boundary(count))
            if not self._ledger.may_pass(count):
                self._waits.wait_for(
                    lambda: self._ledger.may_pass(count),
                    time.monotonic() + self.timeout_s,
                    lambda: (
                        f"boundary {count}: waited {self.timeout_s:g} s for rank 0's coordinator to let it continue"
                    ),
                )
            if (reason := self._ledger.must_raise(count)) is not None:
                raise CommitError(reason)
            return self._ledger.passed(count)

    def interval(self, count: int) -> tuple[int, str] | None:
        """After `boundary(count)`: steps between checkpoints from now on, and why, if all ranks change them there."""
        with self._changed:
            return self._ledger.interval(count)

    def ask(self, *, leave: bool, why: str) -> None:
        """For one boundary at which all ranks save, or save and leave; `boundary` says when it is there. Any thread."""
        with self._changed:
            self._do(self._ledger.ask(leave=leave, why=why))

    def ended(self) -> None:
        """At the end of a job: raises CommitError if the session has stopped, though the step to raise at is not
        reached.
        """
        with self._changed:
            if (reason := self._ledger.ended()) is not None:
                raise CommitError(reason)

    def reached(self, level: str) -> int | None:
        with self._changed:
            return self._ledger.reached[level]

    @property
    def outcomes(self) -> tuple[int, int, int]:
        """Checkpoints committed, aborted and skipped since the session's start."""
        with self._changed:
            return self._ledger.commits, self._ledger.aborts, self._ledger.skips

    @property
    def drifts(self) -> int:
        """How often replicas were found to differ, and training went on."""
        with self._changed:
            return self._ledger.drifts

    def restored(self, step: int | None) -> None:
        """After a restore the step counts from there: what a later, abandoned branch had reached says nothing now."""
        with self._changed:
            self._ledger.restored(step)

    def wait(self, step: int, level: str, timeout_s: float | None) -> None:
        """Raises CommitError when that step's checkpoint was aborted, DeadlineError at the timeout (seconds)."""
        timeout = self.timeout_s if timeout_s is None else timeout_s
        state = self._ledger
        with self._changed:
            self._waits.wait_for(
                lambda: state.has_reached(step, level) or state.hopeless(step) is not None,
                time.monotonic() + timeout,
                lambda: (
                    f"step {step} was not {level} after {timeout:g} s; the newest that is: step {state.reached[level]}"
                ),
            )  # fmt: skip
            if not state.has_reached(step, level):
                raise CommitError(state.hopeless(step) or "")

    def wait_for_attempt(self, attempt: AttemptId, timeout_s: float) -> None:
        """Until that very attempt is committed: another one may have the same step. Raises as `wait`."""
        state = self._ledger
        with self._changed:
            self._waits.wait_for(
                lambda: state.is_committed(attempt) or state.is_hopeless(attempt),
                time.monotonic() + timeout_s,
                lambda: f"the checkpoint of step {attempt.step} was not committed after {timeout_s:g} s",
            )
            if not state.is_committed(attempt):
                raise CommitError(state.hopeless(attempt.step) or "")

    def saved(self, attempt: AttemptId, timeout_s: float) -> None:
        """At a job's end: that this attempt, the last, was committed, or skipped for want of room. Raises as `wait`."""
        state = self._ledger
        with self._changed:
            self._waits.wait_for(
                lambda: state.is_decided(attempt) or state.ended() is not None,
                time.monotonic() + timeout_s,
                lambda: f"close: waited {timeout_s:g} s for rank 0 to decide on step {attempt.step}",
            )
            if (reason := state.failure(attempt) or state.ended()) is not None:
                newest = state.reached["committed"]
                kept = "none is" if newest is None else f"the newest that is: step {newest}"
                raise CommitError(f"the last checkpoint is not committed ({kept}): {reason}")

    def drain(self, timeout_s: float, *, stopped: bool = False) -> None:
        """Waits until every attempt of this rank is decided; of a session that has stopped only if `stopped` says so.

        Raises DeadlineError naming the steps that are not.
        """
        with self._changed:
            self._waits.wait_for(
                lambda: self._ledger.settled if stopped else self._ledger.drained,
                time.monotonic() + timeout_s,
                lambda: f"close: waited {timeout_s:g} s for rank 0 to decide on step(s) {self._ledger.undecided_steps}",
            )

    def close(self, timeout_s: float) -> None:
        """Leaves. Rank 0 stays until all others have left or the deadline passed: the store lives in it."""
        deadline = time.monotonic() + timeout_s

        def left() -> float:
            return max(0.1, deadline - time.monotonic())

        if self._apart and self._ledger.ended() is None:
            self._end_together(timeout_s)
        self._transport.post({"t": "closed", "rank": self.rank})
        if self.rank == 0:
            with self._changed:
                if not self._waits.until_lost(lambda: not self._agreement.missing(), timeout_s):
                    missing = self._agreement.missing()
                    log.warning("close: rank(s) %s did not close within %g s", missing, timeout_s)
        self._persisting.close(left())
        self._transport.close(left())
        if self._keeper is not None:
            self._keeper.close(left())

    def _end_together(self, timeout_s: float) -> None:
        """What retention removes, it removes in every directory, and keepers do that while they are here."""

        def quiet(_: list[Any]) -> None:
            if self._coordinator is not None:
                self._coordinator.quiet(timeout_s / 2)

        try:
            self.agree("end together", None, quiet, timeout_s=timeout_s)
        except LayerwiseError as error:
            log.warning("rank %d: leftovers of retired checkpoints stay until the next start: %s", self.rank, error)

    # -- inside -------------------------------------------------------------------------------------------------

    def _do(self, actions: list[Action]) -> None:
        """REQUIRES: the lock is held, so that what is posted keeps the order of what happened."""
        for action in actions:
            if isinstance(action, Post):
                self._transport.post(action.message)
            elif isinstance(action, Retire):
                if self._retire is not None:
                    self._retire(action.attempt)
            else:
                self._persisting.put(action)

    def _on_coordinator_message(self, message: ToCoordinator) -> None:
        if message["t"] == "agree":
            with self._changed:
                self._agreement.voted(message)
                self._changed.notify_all()
            return
        if message["t"] == "closed" or message["t"] == "gone":
            with self._changed:
                self._agreement.left(message)
                self._changed.notify_all()
        self._news.told(message)
        if self._coordinator is not None:
            self._coordinator.post(message)

    def _on_message(self, message: ToRanks) -> None:
        with self._changed:
            if message["t"] == "agreed":
                self._agreement.decided(message)
            else:
                self._do(self._ledger.receive(message))
                self._news.heard(message)  # under the lock: who waits for this finds it told
            self._changed.notify_all()
        if self._keeper is not None and message["t"] in HEARS:
            self._keeper.put(message)
        if message["t"] == "hold" or message["t"] == "meet":
            if message["leave"] and self._leaving is not None:
                self._leaving(message["why"])
        if self._tells:
            warn_of(message)

    def _on_error(self, text: str) -> None:
        with self._changed:
            self._ledger.lose(f"rank {self.rank}: {text}", at_once=not self._through_monitor)
            self._news.lost(f"rank {self.rank}: {text}")
            self._changed.notify_all()
