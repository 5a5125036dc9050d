"""One rank's part in commits: persists sealed shards in the background, reports them, and learns what was decided."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from layerwise_dist.commit.common_boundary import Meeting
from layerwise_dist.commit.keeper import HEARS, KeeperThread
from layerwise_dist.commit.ledger import Action, Discard, GiveUp, Ledger, Persist, Post, Retire, Write
from layerwise_dist.commit.transports import Message, Transport
from layerwise_dist.commit.votes import describe_error, rebuild_error
from layerwise_dist.errors import CommitError, DeadlineError, LayerwiseError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.supervision import background
from layerwise_dist.supervision.patience import DISK_SHARE, stuck_calls

log = logging.getLogger("layerwise_dist")


class Participant:
    """Runs this rank's `Ledger`, and what all ranks agree on.

    Thread-safe. Every wait has a deadline of `timeout_s` seconds or its own, and says for whom it waited.
    """

    def __init__(
        self, transport: Transport, *, timeout_s: float, coordinator: Callable[[Message], None] | None
    ) -> None:
        """`coordinator` takes the coordinator's messages on rank 0; it may be set later by `serve`."""
        self.rank, self.world_size = transport.rank, transport.world_size
        self._transport, self._timeout_s = transport, timeout_s
        self.disk_s = DISK_SHARE * timeout_s  # the longest wait for this rank's disk within what all ranks do
        self._ledger = Ledger(self.rank, self.world_size)
        self._changed = threading.Condition()
        self._serve = coordinator
        self._agreeing: dict[str, dict[int, Any]] = {}
        self._decisions: dict[str, Any] = {}
        self._rounds = 0
        self._closed_ranks: set[int] = set()
        self._gone: dict[int, str] = {}
        self._leaving: Callable[[str], None] | None = None
        self._retire: Callable[[AttemptId], None] | None = None
        self._keeper: KeeperThread | None = None
        self._quiet: Callable[[float], None] | None = None
        self._judge: Callable[[], None] = lambda: None
        self._verdicts_wanted = 0
        self.tells = self.rank == 0  # whether it warns of what became of all ranks' checkpoints
        self.through_monitor = False  # whose end is not that of another rank's training
        self.apart = False  # whether there are directories that rank 0 does not see
        self._work: queue.SimpleQueue[Persist | GiveUp | Discard | None] = queue.SimpleQueue()
        self._worker = background.start("layerwise-persist", self._run, self.broke)
        transport.start(self._on_message, self._on_coordinator_message if self.rank == 0 else None, self._on_error)

    def serve(self, coordinator: Callable[[Message], None], quiet: Callable[[float], None] | None = None) -> None:
        """`quiet(timeout_s)` waits until the coordinator waits for nothing."""
        self._serve, self._quiet = coordinator, quiet

    def judge_by(self, judge: Callable[[], None]) -> None:
        """`judge()` gives the verdicts that only the training thread can give, as far as they can be given by now; on
        any other thread it does nothing. Every wait begins with it, and calls it again when a verdict is wanted: what
        is waited for may need that verdict.
        """
        self._judge = judge

    def verdict_wanted(self) -> None:
        """A shard's blocks are written, and it now waits for the training thread's verdict. Any thread."""
        with self._changed:
            self._verdicts_wanted += 1
            self._changed.notify_all()

    def keep(self, keeper: KeeperThread) -> None:
        """This rank keeps the records of the ranks that share its directory; until `close`."""
        self._keeper = keeper

    def keep_branch(self, text: str) -> None:
        """A branch record, if this rank keeps any. Raises OSError, InDoubt or OwnerError."""
        if self._keeper is not None:
            self._keeper.keeper.keep_branch(text)

    def post(self, message: Message) -> None:
        self._transport.post(message)

    def recycle(self, retire: Callable[[AttemptId], None]) -> None:
        """`retire` is told of each checkpoint of this session whose manifest rank 0 removed durably.

        It must not wait.
        """
        self._retire = retire

    # -- agreement ----------------------------------------------------------------------------------------------

    def agree(
        self, what: str, payload: Any, decide: Callable[[list[Any]], Any], *, timeout_s: float | None = None
    ) -> Any:
        """All ranks call it in the same order; rank 0's `decide(payloads by rank)` is returned on every rank.

        What `decide` raises is raised on all ranks, as a CommitError if nobody expected it. Raises DeadlineError naming
        the ranks waited for.
        """
        timeout = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout
        self._rounds += 1
        key = f"{self._rounds}:{what}"
        self._transport.post({"t": "agree", "key": key, "rank": self.rank, "payload": payload})
        if self.rank == 0:
            with self._changed:
                votes = self._agreeing.setdefault(key, {})
                self._wait_for(
                    lambda: len(votes) == self.world_size or self._left() - votes.keys(), deadline,
                    lambda: (
                        f"{what}: waited {timeout:g} s for rank(s) {sorted(set(range(self.world_size)) - set(votes))}"
                    ),
                )  # fmt: skip
                del self._agreeing[key]
                gone = {rank: self._gone.get(rank, "it has left") for rank in self._left() - votes.keys()}
            try:
                if gone:
                    raise CommitError(f"{what}: " + "; ".join(f"rank {rank}: {why}" for rank, why in gone.items()))
                decision = {"value": decide([votes[rank] for rank in range(self.world_size)])}
            except Exception as error:  # the other ranks wait for a decision
                decision = {"error": describe_error(error)}
            self._transport.announce({"t": "agreed", "key": key, "decision": decision})
        with self._changed:
            self._wait_for(
                lambda: key in self._decisions, deadline, lambda: f"{what}: waited {timeout:g} s for rank 0's decision"
            )
            decision = self._decisions.pop(key)
        if "error" in decision:
            raise rebuild_error(decision["error"])
        return decision["value"]

    def _left(self) -> set[int]:
        """Ranks from which nothing more comes."""
        return self._closed_ranks | self._gone.keys()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def staged(self, write: Write) -> None:
        """The attempt is sealed here: nothing that training does can change it any more. Persists in the background."""
        with self._changed:
            self._do(self._ledger.sealed(write))

    def began(self, attempt: AttemptId) -> None:
        with self._changed:
            self._ledger.began(attempt)

    def failed(
        self, attempt: AttemptId, error: str, write: Write | None, *, final: bool = False, told: bool = False
    ) -> None:
        """This rank gives it up; the coordinator aborts it for all. `final`: and all later ones. `told`: warned of."""
        with self._changed:
            self._do(self._ledger.failed(attempt, error, write, final=final, told=told))

    def written(self, attempt: AttemptId) -> None:
        """Another process, which reports it itself, has made this rank's shard durable."""
        with self._changed:
            self._ledger.written(attempt)
            self._changed.notify_all()

    def skipped(self, attempt: AttemptId, reason: str) -> None:
        """This rank takes no part in the attempt, which is no failure; the coordinator drops it for all."""
        with self._changed:
            self._do(self._ledger.skipped(attempt, reason))

    def take_unlike(self) -> set[str]:
        """Ranks, as text, of which the coordinator has found since that not all have the same optimizer state."""
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
            return self.through_monitor and state.lost is not None

        with self._changed:
            if not self._until(lambda: state.on_disk_way < max_in_flight or lost(), began + disk_s):
                return "disk"
            if not self._until(lambda: state.in_flight < max_in_flight or lost(), began + decision_s):
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
                self._wait_for(
                    lambda: self._ledger.may_pass(count),
                    time.monotonic() + self._timeout_s,
                    lambda: (
                        f"boundary {count}: waited {self._timeout_s:g} s for the coordinator on rank 0 to say go on"
                    ),
                )
            if (reason := self._ledger.must_raise(count)) is not None:
                raise CommitError(reason)
            return self._ledger.passed(count)

    def ask(self, *, leave: bool, why: str) -> None:
        """For one boundary at which all ranks save, or save and leave; `boundary` says when it is there. Any thread."""
        with self._changed:
            self._do(self._ledger.ask(leave=leave, why=why))

    def when_leaving(self, leaving: Callable[[str], None]) -> None:
        """`leaving(why)` is called as soon as this rank hears that all will leave. It must not wait."""
        self._leaving = leaving

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

    def restored(self, step: int | None) -> None:
        """After a restore the step counts from there: what a later, abandoned branch had reached says nothing now."""
        with self._changed:
            self._ledger.restored(step)

    def wait(self, step: int, level: str, timeout_s: float | None) -> None:
        """Raises CommitError when that step's checkpoint was aborted, DeadlineError at the timeout (seconds)."""
        timeout = self._timeout_s if timeout_s is None else timeout_s
        state = self._ledger
        with self._changed:
            self._wait_for(
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
            self._wait_for(
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
            self._wait_for(
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
            self._wait_for(
                lambda: self._ledger.settled if stopped else self._ledger.drained,
                time.monotonic() + timeout_s,
                lambda: f"close: waited {timeout_s:g} s for rank 0 to decide on step(s) {self._ledger.undecided_steps}",
            )

    def close(self, timeout_s: float) -> None:
        """Leaves. Rank 0 stays until all others have left or the deadline passed: the store lives in it."""
        deadline = time.monotonic() + timeout_s
        if self.apart and self._ledger.ended() is None:
            self._end_together(timeout_s)
        self._transport.post({"t": "closed", "rank": self.rank})
        if self.rank == 0:
            with self._changed:
                here = self._changed.wait_for(
                    lambda: len(self._closed_ranks) == self.world_size or self._ledger.lost is not None, timeout_s
                )
                if not here:
                    missing = sorted(set(range(self.world_size)) - self._closed_ranks)
                    log.warning("close: rank(s) %s did not close within %g s", missing, timeout_s)
        self._work.put(None)
        self._worker.join(max(0.1, deadline - time.monotonic()))
        self._transport.close(max(0.1, deadline - time.monotonic()))
        if self._keeper is not None:
            self._keeper.close(max(0.1, deadline - time.monotonic()))

    def _end_together(self, timeout_s: float) -> None:
        """What retention removes, it removes in every directory, and keepers do that while they are here."""

        def quiet(_: list[Any]) -> None:
            if self._quiet is not None:
                self._quiet(timeout_s / 2)

        try:
            self.agree("end together", None, quiet, timeout_s=timeout_s)
        except LayerwiseError as error:
            log.warning("rank %d: leftovers of retired checkpoints stay until the next start: %s", self.rank, error)

    # -- background ---------------------------------------------------------------------------------------------

    def _do(self, actions: list[Action]) -> None:
        """REQUIRES: the lock is held, so that what is posted keeps the order of what happened."""
        for action in actions:
            if isinstance(action, Post):
                self._transport.post(action.message)
            elif isinstance(action, Retire):
                if self._retire is not None:
                    self._retire(action.attempt)
            else:
                self._work.put(action)

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            # What comes after one that failed may be to remove what it left.
            background.guarded("layerwise-persist", lambda job=job: self._take_up(job), self.broke)

    def _take_up(self, job: Persist | GiveUp | Discard) -> None:
        if isinstance(job, Persist):
            self._persist(job.write)
        elif isinstance(job, GiveUp):
            self._give_up(job)
        else:
            self._discard(job.write)

    def broke(self, why: str) -> None:
        """Something that checkpoints need came to an end on this rank, by an error that nobody expected: no rank
        commits anything more, and all raise at one boundary, whatever `on_failure` is. Any thread.
        """
        self._transport.post({"t": "broke", "rank": self.rank, "why": why})
        with self._changed:
            self._ledger.lose(f"rank {self.rank}: {why}", at_once=False)
            self._changed.notify_all()

    def _persist(self, write: Write) -> None:
        with self._changed:
            if not self._ledger.wanted(write):
                return  # aborted meanwhile; its clean-up is queued behind this
        try:
            report = write.persist(self._timeout_s)
        except (OSError, LayerwiseError) as error:
            self._give_up(GiveUp(write.attempt, str(error), write, False))
            return
        except BaseException as error:
            self._give_up(GiveUp(write.attempt, background.describe(error), write, False))
            raise
        with self._changed:
            if report is not None:
                self._do(self._ledger.persisted(write.attempt, report))
            self._changed.notify_all()

    def _give_up(self, job: GiveUp) -> None:
        if not job.told:
            log.warning("rank %d: checkpoint of step %d failed: %s", self.rank, job.attempt.step, job.error)
        if job.write is not None:
            job.write.abort()
        with self._changed:
            self._do(self._ledger.gave_up(job))
            self._changed.notify_all()

    def _discard(self, write: Write) -> None:
        try:
            write.abort()
            write.discard()
        except OSError as error:
            log.warning(
                "rank %d: leftovers of step %d stay until the next start: %s", self.rank, write.attempt.step, error
            )
        finally:
            with self._changed:
                self._ledger.discarded(write)
                self._changed.notify_all()

    def _on_coordinator_message(self, message: Message) -> None:
        if message["t"] == "agree":
            with self._changed:
                self._agreeing.setdefault(message["key"], {})[message["rank"]] = message["payload"]
                self._changed.notify_all()
            return
        if message["t"] in ("closed", "gone"):
            with self._changed:
                self._closed_ranks.add(message["rank"])
                if message["t"] == "gone":
                    self._gone[message["rank"]] = message["why"]
                self._changed.notify_all()
        if self._serve is not None:
            self._serve(message)

    def _on_message(self, message: Message) -> None:
        with self._changed:
            if message["t"] == "agreed":
                self._decisions[message["key"]] = message["decision"]
            else:
                self._do(self._ledger.receive(message))
            self._changed.notify_all()
        kind = message["t"]
        if self._keeper is not None and kind in HEARS:
            self._keeper.put(message)
        if kind in ("hold", "meet") and message["leave"] and self._leaving is not None:
            self._leaving(message["why"])
        if self.tells and kind == "aborted" and (message["failure"] or message["unlike"]):
            log.warning("checkpoint of step %d aborted: %s", message["step"], message["reason"])
        elif self.tells and kind == "meet" and message["b"] is None:
            log.warning("no boundary could be agreed on for a checkpoint: %s", message["why"])

    def _on_error(self, text: str) -> None:
        with self._changed:
            self._ledger.lose(f"rank {self.rank}: {text}", at_once=not self.through_monitor)
            self._changed.notify_all()

    def _wait_for(self, predicate: Callable[[], Any], deadline: float, message: Callable[[], str]) -> None:
        state = self._ledger
        if not self._until(lambda: predicate() or state.lost is not None, deadline):
            raise DeadlineError(f"{message()}{stuck_calls()}")
        if not predicate():
            raise CommitError(state.lost or "")

    def _until(self, predicate: Callable[[], Any], deadline: float) -> bool:
        """Whether it holds by the deadline. REQUIRES: the lock is held once; it is let go of while judging."""
        judged = -1
        while not predicate():
            if judged != self._verdicts_wanted:
                judged = self._verdicts_wanted
                self._changed.release()
                try:
                    self._judge()
                finally:
                    self._changed.acquire()
            elif not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                return bool(predicate())
        return True
