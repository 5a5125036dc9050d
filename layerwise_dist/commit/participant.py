"""One rank's part in commits: persists sealed shards in the background, reports them, and learns what was decided."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from layerwise_dist import errors
from layerwise_dist.commit.coordinator import FIRST_GRANT
from layerwise_dist.commit.transports import COORDINATOR, Message, Transport
from layerwise_dist.errors import CommitError, DeadlineError, LayerwiseError
from layerwise_dist.storage.adapter import ShardReport
from layerwise_dist.storage.layout import AttemptId

log = logging.getLogger("layerwise_dist")

LEVELS = ("staged", "durable", "committed")


class Write(Protocol):
    """What a participant needs of `storage.adapter.ShardWrite`."""

    attempt: AttemptId

    def persist(self, timeout_s: float) -> ShardReport: ...
    def abort(self) -> None: ...
    def discard(self) -> None: ...


class Participant:
    """Thread-safe. Every wait has a deadline of `timeout_s` seconds or its own, and says for whom it waited."""

    def __init__(
        self, transport: Transport, *, timeout_s: float, coordinator: Callable[[Message], None] | None
    ) -> None:
        """`coordinator` takes the coordinator's messages on rank 0; it may be set later by `serve`."""
        self.rank, self.world_size = transport.rank, transport.world_size
        self._transport, self._timeout_s = transport, timeout_s
        self._changed = threading.Condition()
        self._serve = coordinator
        self._agreeing: dict[str, dict[int, Any]] = {}
        self._decisions: dict[str, Any] = {}
        self._rounds = 0
        self._reached: dict[str, int | None] = dict.fromkeys(LEVELS)
        self._aborted: dict[int, str] = {}
        self._committed_seq = 0
        self._aborted_seqs: set[int] = set()
        self._writes: dict[int, Write] = {}
        self._local: set[int] = set()
        self._granted = float(FIRST_GRANT) if self.world_size > 1 else math.inf
        self._stop: tuple[float, str] | None = None
        self._lost: str | None = None
        self._closed_ranks: set[int] = set()
        self.commits = self.aborts = self.skips = 0
        self._retire: Callable[[AttemptId], None] | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, name="layerwise-persist", daemon=True)
        self._worker.start()
        transport.start(self._on_message, self._on_coordinator_message if self.rank == 0 else None, self._on_error)

    def serve(self, coordinator: Callable[[Message], None]) -> None:
        self._serve = coordinator

    def recycle(self, retire: Callable[[AttemptId], None]) -> None:
        """`retire` is told of each checkpoint of this session whose manifest rank 0 removed durably. It must not wait."""
        self._retire = retire

    # -- agreement ----------------------------------------------------------------------------------------------

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """All ranks call it in the same order; rank 0's `decide(payloads by rank)` is returned on every rank.

        A LayerwiseError raised by `decide` is raised on all ranks. Raises DeadlineError naming the ranks waited for.
        """
        timeout = self._timeout_s
        deadline = time.monotonic() + timeout
        self._rounds += 1
        key = f"{self._rounds}:{what}"
        self._transport.post(COORDINATOR, {"t": "agree", "key": key, "rank": self.rank, "payload": payload})
        if self.rank == 0:
            with self._changed:
                votes = self._agreeing.setdefault(key, {})
                self._wait_for(
                    lambda: len(votes) == self.world_size, deadline,
                    lambda: f"{what}: waited {timeout:g} s for rank(s) {sorted(set(range(self.world_size)) - set(votes))}",
                )  # fmt: skip
                del self._agreeing[key]
            try:
                decision = {"value": decide([votes[rank] for rank in range(self.world_size)])}
            except (LayerwiseError, OSError) as error:
                decision = {"error": describe_error(error)}
            for rank in range(self.world_size):
                self._transport.post(rank, {"t": "agreed", "key": key, "decision": decision})
        with self._changed:
            self._wait_for(
                lambda: key in self._decisions, deadline, lambda: f"{what}: waited {timeout:g} s for rank 0's decision"
            )
            decision = self._decisions.pop(key)
        if "error" in decision:
            raise rebuild_error(decision["error"])
        return decision["value"]

    # -- checkpoints --------------------------------------------------------------------------------------------

    def staged(self, step: int, write: Write) -> None:
        """The attempt is sealed here: nothing that training does can change it any more. Persists in the background."""
        with self._changed:
            if write.attempt.seq in self._aborted_seqs:  # rank 0 decided before this rank had sealed it
                self._work.put(lambda: self._discard(write))
                return
            self._writes[write.attempt.seq] = write
        self._transport.post(COORDINATOR, self._message("staged", write.attempt))
        self._work.put(lambda: self._persist(write))

    def began(self, attempt: AttemptId) -> None:
        with self._changed:
            self._local.add(attempt.seq)

    def failed(self, attempt: AttemptId, error: str, write: Write | None, *, final: bool = False) -> None:
        """This rank gives the attempt up; the coordinator aborts it for all. `final`: and every later one, for good."""
        with self._changed:
            self._local.add(attempt.seq)
            if write is not None and attempt.seq in self._aborted_seqs:
                self._work.put(lambda: self._discard(write))
                return
            if write is not None:
                self._writes[attempt.seq] = write
        self._work.put(lambda: self._give_up(attempt, error, write, final))

    def skipped(self, attempt: AttemptId, reason: str) -> None:
        """This rank takes no part in the attempt, which is no failure; the coordinator drops it for all."""
        message = self._message("skipped", attempt)
        message["reason"] = reason
        self._transport.post(COORDINATOR, message)

    def wait_room(self, max_in_flight: int, timeout_s: float) -> bool:
        """Whether fewer than `max_in_flight` shards are on their way to this rank's disk, waiting for the disk only."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._local) < max_in_flight, timeout_s)

    def boundary(self, count: int) -> None:
        """Call at each boundary, counted from the session's start. Raises CommitError at the step all ranks raise at."""
        self._transport.post(COORDINATOR, {"t": "at", "rank": self.rank, "b": count})
        self.check(count)

    def check(self, count: int) -> None:
        with self._changed:
            if self._lost is None and self._stop is None and count >= self._granted:
                self._wait_for(
                    lambda: self._granted > count or self._stop is not None or self._lost is not None,
                    time.monotonic() + self._timeout_s,
                    lambda: (
                        f"boundary {count}: waited {self._timeout_s:g} s for the coordinator on rank 0 to say go on"
                    ),
                )
            if self._stop is not None and count >= self._stop[0]:
                raise CommitError(self._stop[1])
            if self._lost is not None:
                raise CommitError(self._lost)

    def ended(self) -> None:
        """At the end of a job: raises CommitError if the session has stopped, though the step to raise at is not reached."""
        with self._changed:
            if self._stop is not None or self._lost is not None:
                raise CommitError(self._stop[1] if self._stop else self._lost)

    def reached(self, level: str) -> int | None:
        with self._changed:
            return self._reached[level]

    def restored(self, step: int | None) -> None:
        """After a restore the step counts from there: what a later, abandoned branch had reached says nothing now."""
        with self._changed:
            self._reached = dict.fromkeys(LEVELS, step)
            self._aborted.clear()

    def wait(self, step: int, level: str, timeout_s: float | None) -> None:
        """Raises CommitError when that step's checkpoint was aborted, DeadlineError at the timeout (seconds)."""
        timeout = self._timeout_s if timeout_s is None else timeout_s

        def done() -> bool:
            reached = self._reached[level]
            given_up = step in self._aborted or self._stop is not None or self._lost is not None
            return given_up or (reached is not None and reached >= step)

        with self._changed:
            self._wait_for(
                done, time.monotonic() + timeout,
                lambda: f"step {step} was not {level} after {timeout:g} s; the newest that is: step {self._reached[level]}",
            )  # fmt: skip
            reached = self._reached[level]
            if reached is not None and reached >= step:
                return
            raise CommitError(self._aborted.get(step) or (self._stop[1] if self._stop else None) or self._lost or "")

    def wait_for_attempt(self, attempt: AttemptId, timeout_s: float) -> None:
        """Until that very attempt is committed: another one may have the same step. Raises as `wait`."""

        def decided() -> bool:
            aborted = attempt.seq in self._aborted_seqs
            return self._committed_seq >= attempt.seq or aborted or self._stop is not None or self._lost is not None

        with self._changed:
            self._wait_for(
                decided, time.monotonic() + timeout_s,
                lambda: f"the checkpoint of step {attempt.step} was not committed after {timeout_s:g} s",
            )  # fmt: skip
            if attempt.seq in self._aborted_seqs or self._committed_seq < attempt.seq:
                reason = self._stop[1] if self._stop else self._lost or ""
                raise CommitError(self._aborted.get(attempt.step) or reason)

    def drain(self, timeout_s: float) -> None:
        """Waits until every attempt of this rank is decided. Raises DeadlineError naming the steps that are not."""
        with self._changed:
            self._wait_for(
                lambda: not self._local and (not self._writes or self._stop is not None) or self._lost is not None,
                time.monotonic() + timeout_s,
                lambda: (
                    f"close: waited {timeout_s:g} s for rank 0 to decide on "
                    f"step(s) {sorted(write.attempt.step for write in self._writes.values())}"
                ),
            )

    def close(self, timeout_s: float) -> None:
        """Leaves. Rank 0 stays until all others have left or the deadline passed: the store lives in it."""
        deadline = time.monotonic() + timeout_s
        self._transport.post(COORDINATOR, {"t": "closed", "rank": self.rank})
        if self.rank == 0:
            with self._changed:
                here = self._changed.wait_for(
                    lambda: len(self._closed_ranks) == self.world_size or self._lost is not None, timeout_s
                )
                if not here:
                    missing = sorted(set(range(self.world_size)) - self._closed_ranks)
                    log.warning("close: rank(s) %s did not close within %g s", missing, timeout_s)
        self._work.put(None)
        self._worker.join(max(0.1, deadline - time.monotonic()))
        self._transport.close(max(0.1, min(5.0, deadline - time.monotonic())))

    # -- background ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            job()

    def _persist(self, write: Write) -> None:
        attempt = write.attempt
        with self._changed:
            if attempt.seq not in self._writes:
                return  # aborted meanwhile; its clean-up is queued behind this
        try:
            report = write.persist(self._timeout_s)
        except (OSError, LayerwiseError) as error:
            self._give_up(attempt, str(error), write)
            return
        message = self._message("durable", attempt)
        message.update(
            file=report.file,
            nbytes=report.nbytes,
            header_bytes=report.header_bytes,
            header_hash=f"{report.header_hash:016x}",
        )
        self._finish_locally(attempt)
        self._transport.post(COORDINATOR, message)

    def _give_up(self, attempt: AttemptId, error: str, write: Write | None, final: bool = False) -> None:
        log.warning("rank %d: checkpoint of step %d failed: %s", self.rank, attempt.step, error)
        if write is not None:
            write.abort()
        self._finish_locally(attempt)
        message = self._message("failed", attempt)
        message.update(error=error[:2000], final=final)
        self._transport.post(COORDINATOR, message)

    def _finish_locally(self, attempt: AttemptId) -> None:
        with self._changed:
            self._local.discard(attempt.seq)
            self._changed.notify_all()

    def _discard(self, write: Write) -> None:
        write.abort()
        try:
            write.discard()
        except OSError as error:
            log.warning(
                "rank %d: leftovers of step %d stay until the next start: %s", self.rank, write.attempt.step, error
            )
        self._finish_locally(write.attempt)

    def _message(self, kind: str, attempt: AttemptId) -> Message:
        return {
            "t": kind, "rank": self.rank, "world_size": self.world_size,
            "seq": attempt.seq, "attempt": attempt.text, "step": attempt.step,
        }  # fmt: skip

    def _on_coordinator_message(self, message: Message) -> None:
        if message["t"] == "agree":
            with self._changed:
                self._agreeing.setdefault(message["key"], {})[message["rank"]] = message["payload"]
                self._changed.notify_all()
            return
        if message["t"] == "closed":
            with self._changed:
                self._closed_ranks.add(message["rank"])
                self._changed.notify_all()
        if self._serve is not None:
            self._serve(message)

    def _on_message(self, message: Message) -> None:
        with self._changed:
            self._apply(message)
            self._changed.notify_all()

    def _apply(self, message: Message) -> None:
        kind = message["t"]
        if kind == "agreed":
            self._decisions[message["key"]] = message["decision"]
        elif kind == "grant":
            self._granted = max(self._granted, message["b"])
        elif kind == "stop":
            self._stop = (message["at"], f"checkpointing has stopped on all ranks: {message['reason']}")
        elif kind in LEVELS:
            for level in LEVELS[: LEVELS.index(kind) + 1]:
                self._reached[level] = max(message["step"], self._reached[level] or 0)
            if kind == "committed":
                self.commits += 1
                self._committed_seq = max(self._committed_seq, message["seq"])
                self._writes.pop(message["seq"], None)
        elif kind == "aborted":
            write = self._writes.pop(message["seq"], None)
            if message["skipped"]:
                self.skips += 1
            else:
                self.aborts += 1
            self._aborted_seqs = {seq for seq in self._aborted_seqs if seq > message["seq"] - 1024} | {message["seq"]}
            self._aborted[message["step"]] = (
                f"the checkpoint of step {message['step']} was aborted: {message['reason']}"
            )
            if len(self._aborted) > 64:
                del self._aborted[min(self._aborted)]
            if write is not None:
                self._work.put(lambda: self._discard(write))
            if self.rank == 0 and message["failure"]:
                log.warning("checkpoint of step %d aborted: %s", message["step"], message["reason"])

        elif kind == "retired" and self._retire is not None:
            self._retire(AttemptId(message["epoch"], message["seq"], message["step"]))

    def _on_error(self, text: str) -> None:
        with self._changed:
            self._lost = f"rank {self.rank}: {text}"
            self._changed.notify_all()

    def _wait_for(self, predicate: Callable[[], bool], deadline: float, message: Callable[[], str]) -> None:
        if not self._changed.wait_for(lambda: predicate() or self._lost is not None, deadline - time.monotonic()):
            raise DeadlineError(message())
        if not predicate():
            raise CommitError(self._lost or "")


def describe_error(error: Exception) -> dict[str, Any]:
    """An error as a message can carry it; `rebuild_error` makes it again on another rank."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, errors.StateError):
        described |= {"path": error.path, "message": str(error).removeprefix(f"{error.path}: ")}
    elif isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        described |= {"errno": error.errno, "message": f"{error.strerror}{where}"}
    return described


def rebuild_error(described: dict[str, Any]) -> Exception:
    kind = getattr(errors, described["type"], None)
    message = described["message"]
    if kind is errors.StateError:
        return errors.StateError(described["path"], message)
    if isinstance(kind, type) and issubclass(kind, LayerwiseError):
        return kind(message)
    if "errno" in described:
        return OSError(described["errno"], message)  # Python picks PermissionError and the like by the number
    return CommitError(f"{described['type']}: {message}")
