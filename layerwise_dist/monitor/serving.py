# SPDX-License-Identifier: Apache-2.0
"""The monitor's loop: handles its training process's messages, and its end, one after the other.

Threads: the wire's takes messages in and notices the end; a watching one passes freed buffers on, and looks at the
training process itself, since a socket may be held open by a child of it; the main one does what is said.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from layerwise_dist.commit.opening import FINISHING_SHARE
from layerwise_dist.commit.votes import describe_error
from layerwise_dist.config import load_config
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.monitor.job import MonitoredJob
from layerwise_dist.monitor.messages import (
    Gathered,
    Log,
    Open,
    Opened,
    Question,
    Staging,
    Start,
    Times,
    ToMonitor,
    ToTraining,
)
from layerwise_dist.monitor.wire import Wire
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")

_START_S = 60.0  # for the first word
_FAREWELL_S = 5.0
_LINGER_S = 0.5


class MonitorServer:
    """One rank's monitor. `run` returns when its work is done."""

    def __init__(self, sock: socket.socket, memory: int, trainer: int) -> None:
        """`memory` is the descriptor of the pool's memory file, `trainer` the training process's pid."""
        self._memory, self._trainer = memory, trainer
        self._events: queue.SimpleQueue[ToMonitor | None] = queue.SimpleQueue()  # None: the training process is gone
        self._gone: str | None = None
        self._gone_lock = threading.Lock()
        self._serving = False  # whether something may have been staged
        self._leaving = False
        self._timeout_s = _START_S
        self._session: MonitoredJob | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wire = Wire(sock, self._events.put, self._trainer_gone)
        logging.getLogger("layerwise_dist").addHandler(_ToTrainer(self._send))

    def run(self) -> None:
        # Without it the training process's end, and room in the pool, would be heard of by nobody.
        background.start("layerwise-watch", self._watch, lambda why: os._exit(1))
        self._wire.start()
        try:
            self._serve()
        except Exception as error:  # nothing of it can be relied on; what it held is decided by the other ranks
            log.error("the monitor (pid %d) failed: %r", os.getpid(), error)
            self._wire.close(_FAREWELL_S)
            raise

    # -- the main thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            message = self._next(None if self._session is not None else _START_S)
            if message is None:
                assert self._session is not None
                self._session.finish(FINISHING_SHARE * self._timeout_s, orphaned=self._gone)
                return
            if message["t"] == "post" and message["m"]["t"] == "closed":
                self._leave()
                return
            self._do(message)

    def _do(self, message: ToMonitor) -> None:
        if message["t"] == "start":
            start = message
            self._answer(start, lambda: self._start(start))
            return
        session = self._session
        assert session is not None
        match message["t"]:
            case "open":
                opening = message
                self._answer(opening, lambda: self._open(session, opening))
            case "listening":
                session.listen()
            case "post":
                session.post(message["m"])
            case "announce":
                session.announce(message["m"])
            case "boundary kind":
                session.boundary_kind(message["kind"])
            case "tag":
                session.tag(message["seq"], message["tag"])
            case "hold":
                self._answer(message, lambda: session.hold(True))
            case "release":
                session.hold(False)
            case "follow":
                wish = message
                self._answer(wish, lambda: session.follow(wish["head"], wish["branch_seq"]))
            case _:
                self._stage(session, message)

    def _stage(self, session: MonitoredJob, message: Staging | Times | Gathered) -> None:
        holder = session.holder
        if holder is None:
            raise ValueError(f"{message['t']!r} before the directory is open")
        match message["t"]:
            case "times":
                seq = message["seq"]
                self._answer(message, lambda: holder.times(seq))
            case "pool":
                holder.pool(message)
            case "layout":
                holder.layout(message)
            case "begin":
                holder.begin(message)
            case "give":
                holder.give(message)
            case "state":
                holder.state(message)
            case "sealed":
                holder.sealed(message)
            case "drop":
                holder.drop(message)
            case kind:
                raise ValueError(f"a message of the unknown kind {kind[:40]!r}")

    def _start(self, message: Start) -> None:
        config = load_config(message["config"])
        self._timeout_s = config.commit.timeout_s
        self._session = MonitoredJob(config, message["rank"], message["world_size"], self._gather, self._send)

    def _send(self, message: ToTraining) -> None:
        self._wire.send(message)

    def _gather(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        self._send({"t": "gather", "record": record})
        message = self._next(self._timeout_s)
        if message is None or message["t"] != "gathered":
            raise ValueError("the training process does not gather")
        return list(message["records"])

    def _open(self, session: MonitoredJob, message: Open) -> Opened:
        opened = session.open(message, self._trainer, self._memory, self._wake)
        with self._gone_lock:
            self._serving = True
            gone = self._gone
        if gone is not None:  # nothing was staged
            os._exit(0)
        return opened

    def _answer(self, message: Question, action: Callable[[], object]) -> None:
        try:
            self._send({"t": "answer", "id": message["id"], "value": action()})
        except (LayerwiseError, OSError) as error:
            self._send({"t": "answer", "id": message["id"], "error": describe_error(error)})

    def _leave(self) -> None:
        """The training process has nothing more to say, and waits for the end."""
        assert self._session is not None
        self._leaving = True
        _end_in(self._timeout_s + _FAREWELL_S)
        self._session.finish(self._timeout_s)
        self._send({"t": "bye"})
        self._wire.close(_FAREWELL_S)

    def _next(self, timeout_s: float | None) -> ToMonitor | None:
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"waited {timeout_s:g} s for the training process (pid {self._trainer})") from None

    # -- other threads ------------------------------------------------------------------------------------------

    def _trainer_gone(self, why: str) -> None:
        """By the wire's end, or the process's own, whichever is noticed first."""
        with self._gone_lock:
            if self._gone is not None:
                return
            self._gone = f"its training process (pid {self._trainer}) has ended"
            serving = self._serving
        if not serving:
            os._exit(0)  # nothing was staged, and somebody may wait for the directory
        _end_in(FINISHING_SHARE * self._timeout_s + _FAREWELL_S)
        if self._session is not None and not self._leaving:
            self._session.orphaned(self._gone)
        self._events.put(None)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            process = _process_of(self._trainer)
            if process is not None:
                selector.register(process, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == self._wake:
                        os.eventfd_read(self._wake)
                        if self._session is not None and self._session.holder is not None:
                            self._session.holder.give_back()
                    else:
                        selector.unregister(key.fd)
                        # What it had sent before it died is in the socket: the wire's own end comes after that.
                        time.sleep(_LINGER_S)
                        self._trainer_gone("")


class _ToTrainer(logging.Handler):
    """What is logged here is logged there, while there is somebody."""

    def __init__(self, send: Callable[[Log], None]) -> None:
        super().__init__(logging.INFO)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send({"t": "log", "level": record.levelno, "text": record.getMessage()})


def _process_of(pid: int) -> int | None:
    """A descriptor that can be read once the parent, which `pid` was, has ended; None where there are none."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if os.getppid() != pid:  # it ended before, and the number may be another's
        os.close(descriptor)
        return None
    return descriptor


def _end_in(seconds: float) -> None:
    """Ends this process, whatever it is in by then."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(1)

    background.start("layerwise-deadline", end, lambda why: os._exit(1))


def serve(descriptor: int, memory: int, trainer: int) -> None:
    """The whole life of a monitor, in this process. Signals that are meant for the job do not end it: its training
    process's end does, once its work is done.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log.setLevel(logging.INFO)
    log.propagate = False
    MonitorServer(socket.socket(fileno=descriptor), memory, trainer).run()
