# SPDX-License-Identifier: Apache-2.0
"""A rank's monitor, seen from its training process: started, asked, listened to, and ended."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, overload

from layerwise_dist.commit.transports.rendezvous import Gather
from layerwise_dist.commit.votes import rebuild_error
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import CommitError, DeadlineError, LayerwiseError
from layerwise_dist.monitor.gathering import Gathering
from layerwise_dist.monitor.messages import (
    Answer,
    Asked,
    GatherRecord,
    Heard,
    Log,
    Lost,
    Question,
    Refusal,
    Returned,
    Start,
    ToMonitor,
    ToTraining,
    Written,
)
from layerwise_dist.monitor.process import MonitorProcess
from layerwise_dist.monitor.wire import Wire

log = logging.getLogger("layerwise_dist")

_FAREWELL_S = 5.0
_START_S = 60.0  # at least, for a new process that imports: it has little to do with how long a commit may take


_Inbox = queue.SimpleQueue[Answer | Refusal | GatherRecord | None]  # None: the monitor is gone


class MonitorLink:
    """From `start_monitor` until `close`. Thread-safe but for `close`; handlers run on the wire's thread."""

    def __init__(self, rank: int, process: MonitorProcess) -> None:
        self.rank, self.process = rank, process
        self.lost: str | None = None  # why nothing more comes
        self._numbers = itertools.count()
        self._answers: dict[int, _Inbox] = {}
        self._asked: _Inbox | None = None  # what the monitor asks for while a question is open
        self._handlers: dict[str, Callable[[Any], None]] = {
            "log": self._relog, "answer": self._answered, "gather": self._gather,
        }  # fmt: skip
        self._on_lost: list[Callable[[str], None]] = []
        self._lock = threading.Lock()
        self._bye = threading.Event()
        self._handlers["bye"] = lambda _: self._bye.set()
        self.wire = Wire(process.socket, self._take, self._ended)
        self.wire.start()

    def send(self, message: ToMonitor) -> None:
        self.wire.send(message)

    @overload
    def on(self, kind: Literal["heard"], handler: Callable[[Heard], None]) -> None: ...
    @overload
    def on(self, kind: Literal["asked"], handler: Callable[[Asked], None]) -> None: ...
    @overload
    def on(self, kind: Literal["lost"], handler: Callable[[Lost], None]) -> None: ...
    @overload
    def on(self, kind: Literal["returned"], handler: Callable[[Returned], None]) -> None: ...
    @overload
    def on(self, kind: Literal["written"], handler: Callable[[Written], None]) -> None: ...
    def on(self, kind: str, handler: Callable[[Any], None]) -> None:
        """`handler` takes the messages of that kind. REQUIRES: none of it can have come."""
        self._handlers[kind] = handler

    def on_lost(self, handler: Callable[[str], None]) -> None:
        """`handler(why)` is called once the monitor is gone, at once if it is."""
        with self._lock:
            self._on_lost.append(handler)
            lost = self.lost
        if lost is not None:
            handler(lost)

    def ask(self, what: str, message: Question, timeout_s: float, gather: Gather | None = None) -> Any:
        """The answer, for which it waits at most `timeout_s` seconds; meanwhile gathers for the monitor.

        Raises what the monitor raised, CommitError if it is gone, DeadlineError.
        """
        number, inbox = next(self._numbers), _Inbox()
        with self._lock:
            self._answers[number] = inbox
            if gather is not None:
                self._asked = inbox
        message["id"] = number
        self.send(message)
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                if self.lost is not None:
                    raise CommitError(f"{what}: {self.lost}")
                try:
                    found = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise DeadlineError(
                        f"{what}: waited {timeout_s:g} s for rank {self.rank}'s monitor (pid {self.process.pid})"
                    ) from None
                if found is None:
                    continue
                if found["t"] == "gather":
                    assert gather is not None
                    self.send({"t": "gathered", "records": gather(found["record"])})
                elif "error" in found:
                    raise rebuild_error(found["error"])
                else:
                    return found["value"]
        finally:
            with self._lock:
                del self._answers[number]
                self._asked = None

    def leave(self, timeout_s: float) -> None:
        """Waits until the monitor has done all that it was asked for, at most so many seconds."""
        deadline = time.monotonic() + timeout_s
        while not self._bye.wait(0.05) and self.lost is None and time.monotonic() < deadline:
            pass

    def close(self) -> None:
        """Lets go of the monitor: of one that has not said that it is done, as if this process had died."""
        self.wire.close(1.0)
        self.process.close(_FAREWELL_S if self._bye.is_set() else 1.0)

    # -- inside -------------------------------------------------------------------------------------------------

    def _take(self, message: ToTraining) -> None:
        handler = self._handlers.get(message["t"])
        if handler is None:
            raise ValueError(f"a message of the unknown kind {message['t'][:40]!r}")
        handler(message)

    def _answered(self, message: Answer | Refusal) -> None:
        with self._lock:
            inbox = self._answers.get(message["id"])
        if inbox is not None:  # else nobody waits any more
            inbox.put(message)

    def _gather(self, message: GatherRecord) -> None:
        with self._lock:
            inbox = self._asked
        if inbox is not None:
            inbox.put(message)

    def _relog(self, message: Log) -> None:
        log.log(message["level"], "%s", message["text"])

    def _ended(self, why: str) -> None:
        if self._bye.is_set():
            return
        how = self.process.ended(1.0) or why
        lost = f"its monitor (pid {self.process.pid}) is gone: {how}"
        with self._lock:
            self.lost = lost
            waiting, handlers = list(self._answers.values()), list(self._on_lost)
        for inbox in waiting:
            inbox.put(None)
        for handler in handlers:
            handler(lost)


def start_monitor(config: LayerwiseConfig, rank: int, world_size: int, gather: Gather | None) -> MonitorLink:
    """Collective. The monitors of all ranks run and have met; `gather` is None for one rank.

    Raises CommitError on all ranks, naming the one whose monitor could not be started or reached.
    """
    timeout_s = config.commit.timeout_s
    gathering = Gathering(rank, gather) if gather is not None else None
    link: MonitorLink | None = None
    try:
        link = MonitorLink(rank, MonitorProcess())
        settings = {**config.model_dump(mode="json"), "dir": config.path}
        start: Start = {"t": "start", "config": settings, "rank": rank, "world_size": world_size}
        link.ask("start the monitor", start, max(timeout_s, _START_S), gathering)
    except (LayerwiseError, OSError) as error:
        if gathering is not None:
            gathering.give_up(f"its monitor did not start: {error}")
        if link is not None:
            link.close()
        if isinstance(error, LayerwiseError):
            raise
        raise CommitError(f"rank {rank}: its monitor did not start: {error}") from error
    return link
