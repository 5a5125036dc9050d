"""The monitor's loop: messages of its training process, and that process's end, one after the other.

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
from layerwise_dist.commit.transports import Message
from layerwise_dist.commit.votes import describe_error
from layerwise_dist.config import load_config
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.monitor.job import MonitoredJob
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
        self._events: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: the training process is gone
        self._gone: str | None = None
        self._gone_lock = threading.Lock()
        self._serving = False  # whether something may have been staged
        self._leaving = False
        self._timeout_s = _START_S
        self._session: MonitoredJob | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wire = Wire(sock, self._events.put, self._trainer_gone)
        logging.getLogger("layerwise_dist").addHandler(_ToTrainer(self._wire.send))

    def run(self) -> None:
        # Without it the training process's end, and room in the pool, would be heard of by nobody.
        background.start("layerwise-watch", self._watch, lambda why: os._exit(1))
        self._wire.start()
        try:
            self._serve()
        except Exception as error:  # nothing of it can be relied on; what it held is decided by the other ranks
            log.error("the monitor (pid %d) ends by an error: %r", os.getpid(), error)
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

    def _do(self, message: Message) -> None:
        kind, session = message["t"], self._session
        if kind == "start":
            self._answer(message, lambda: self._start(message))
            return
        assert session is not None
        if kind == "open":
            self._answer(message, lambda: self._open(session, message))
        elif kind == "listening":
            session.listen()
        elif kind == "post":
            session.post(message["m"])
        elif kind == "announce":
            session.announce(message["m"])
        elif kind == "boundary kind":
            session.boundary_kind(message["kind"])
        elif kind == "tag":
            session.tag(message["seq"], message["tag"])
        elif kind == "hold":
            self._answer(message, lambda: session.hold(True))
        elif kind == "release":
            session.hold(False)
        elif kind == "follow":
            self._answer(message, lambda: session.follow(message["head"], message["branch_seq"]))
        else:
            self._stage(session, message)

    def _stage(self, session: MonitoredJob, message: Message) -> None:
        holder, kind = session.holder, message["t"]
        if holder is None:
            raise ValueError(f"{kind!r} before the directory is open")
        if kind == "times":
            self._answer(message, lambda: holder.times(message["seq"]))
            return
        takers: dict[str, Callable[[Message], None]] = {
            "pool": holder.pool, "layout": holder.layout, "begin": holder.begin, "give": holder.give,
            "state": holder.state, "sealed": holder.sealed, "drop": holder.drop,
        }  # fmt: skip
        if kind not in takers:
            raise ValueError(f"a message of the unknown kind {kind[:40]!r}")
        takers[kind](message)

    def _start(self, message: Message) -> None:
        config = load_config(message["config"])
        self._timeout_s = config.commit.timeout_s
        self._session = MonitoredJob(config, message["rank"], message["world_size"], self._gather, self._wire.send)

    def _gather(self, record: Any) -> list[Any]:
        self._wire.send({"t": "gather", "record": record})
        message = self._next(self._timeout_s)
        if message is None or message["t"] != "gathered":
            raise ValueError("the training process does not gather")
        return list(message["records"])

    def _open(self, session: MonitoredJob, message: Message) -> Message:
        opened = session.open(message, self._trainer, self._memory, self._wake)
        with self._gone_lock:
            self._serving = True
            gone = self._gone
        if gone is not None:  # nothing was staged
            os._exit(0)
        return opened

    def _answer(self, message: Message, action: Callable[[], Any]) -> None:
        try:
            answer = {"value": action()}
        except (LayerwiseError, OSError) as error:
            answer = {"error": describe_error(error)}
        self._wire.send({"t": "answer", "id": message["id"], **answer})

    def _leave(self) -> None:
        """The training process has nothing more to say, and waits for the end."""
        assert self._session is not None
        self._leaving = True
        _end_in(self._timeout_s + _FAREWELL_S)
        self._session.finish(self._timeout_s)
        self._wire.send({"t": "bye"})
        self._wire.close(_FAREWELL_S)

    def _next(self, timeout_s: float | None) -> Message | None:
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
                        # What it had sent before it died is in the socket: the wire's own end comes behind that.
                        time.sleep(_LINGER_S)
                        self._trainer_gone("")


class _ToTrainer(logging.Handler):
    """What is logged here is logged there, while there is somebody."""

    def __init__(self, send: Callable[[Message], None]) -> None:
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
