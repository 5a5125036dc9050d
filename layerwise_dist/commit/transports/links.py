# SPDX-License-Identifier: Apache-2.0
"""TCP connections of one process, served by one thread: frames in, frames out, and the word that one has ended.

A connection is never made again: what was sent on it arrives once and in order, or it ends, and both sides hear of it.
No call waits for the network.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from layerwise_dist.commit.transports.frames import LENGTH_BYTES, OnEnd, OnFrame, take_frames
from layerwise_dist.commit.transports.proof import Line, Seals
from layerwise_dist.supervision import background
from layerwise_dist.supervision.background import Failed

_MOST_UNSENT = 256 << 20  # bytes that a peer which reads nothing may make us keep
_CHUNK = 1 << 18
_IOVECS = 64
# A peer's machine that vanished without a word is noticed after about this long; a process that is stopped is not,
# since its kernel still answers.
_SILENCE_S = 30


class Link:
    """One connection. Everything but the constructor belongs to the thread of its `Links`."""

    def __init__(self, key: int, line: Line) -> None:
        self.key, self.sock = key, line.sock
        self.seals_out = Seals(line.keys.sending) if line.keys is not None else None
        self.seals_in = Seals(line.keys.receiving) if line.keys is not None else None
        self.received = bytearray()
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.writing = False
        self.open = True


class Links:
    """`relay.Connections` over sockets."""

    def __init__(self, lines: dict[int, Line]) -> None:
        self._on_frame: OnFrame = _ignore
        self._on_end: OnEnd = _ignore
        self._on_broken: Failed = background.log_only
        self._selector = selectors.DefaultSelector()
        self._links = {key: Link(key, line) for key, line in lines.items()}
        self._calls: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ear, self._waker = socket.socketpair()
        for sock in (self._ear, self._waker):
            sock.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        for link in self._links.values():
            _prepare(link.sock)
            self._selector.register(link.sock, selectors.EVENT_READ, link)
        self._closing: float | None = None
        self.frames_in = self.frames_out = self.bytes_in = self.bytes_out = 0
        self._thread: threading.Thread | None = None
        _live.add(self)

    def leave_to_parent(self) -> None:
        """In a forked child, a worker of a data loader say: with its copies open nobody would hear of this process's
        death before the child's.
        """
        for sock in (*(link.sock for link in self._links.values()), self._ear, self._waker):
            sock.close()
        self._selector.close()

    def start(self, on_frame: OnFrame, on_end: OnEnd, on_broken: Failed) -> None:
        self._on_frame, self._on_end, self._on_broken = on_frame, on_end, on_broken
        self._thread = background.start("layerwise-messages", self._run, background.log_only)

    def call(self, action: Callable[[], None]) -> None:
        """Runs `action` on the thread, soon, in order. From any thread."""
        self._calls.append(action)
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # it is awake, or gone

    def close(self, timeout_s: float) -> None:
        """Sends what is unsent, says the end, and waits for that of the others, at most `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s

        def begin() -> None:
            self._closing = deadline
            for link in list(self._links.values()):
                self._finish(link)

        if self._thread is not None and self._thread.is_alive():
            self.call(begin)
            self._thread.join(timeout_s + 1.0)
        else:
            self._let_go()

    # -- on the thread ------------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))

    def send(self, key: int, frame: bytes) -> None:
        if (link := self._links.get(key)) is not None and link.open:
            link.unsent.append(memoryview(frame))
            size = len(frame)
            if link.seals_out is not None:
                mac = link.seals_out.next(memoryview(frame)[LENGTH_BYTES:])
                link.unsent.append(memoryview(mac))
                size += len(mac)
            link.unsent_bytes += size
            self.frames_out += 1
            self.bytes_out += size
            if not link.writing:
                self._write(link)
            if link.unsent_bytes > _MOST_UNSENT:
                self._end(link, f"it has read nothing of the last {link.unsent_bytes >> 20} MiB")

    def broadcast(self, frame: bytes, *, but: int | None = None) -> None:
        for key in list(self._links):
            if key != but:
                self.send(key, frame)

    def drop(self) -> None:
        """Ends every connection; `on_end` is not called."""
        for link in list(self._links.values()):
            self._forget(link)

    def _run(self) -> None:
        try:
            while not (self._closing is not None and (not self._links or time.monotonic() >= self._closing)):
                self._turn()
        except BaseException as error:  # whoever waits for messages, here and at the other ends, has to know
            if self._closing is None:
                self._on_broken(f"thread layerwise-messages: {background.describe(error)}")
            raise
        finally:
            self._let_go()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._timeout()):
            if key.data is None:
                self._hear()
                continue
            link: Link = key.data
            if events & selectors.EVENT_READ and link.open:
                self._read(link)
            if events & selectors.EVENT_WRITE and link.open:
                self._write(link)
        while self._calls:
            self._calls.popleft()()
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()

    def _timeout(self) -> float | None:
        if self._calls:
            return 0.0
        times = [self._later[0][0]] if self._later else []
        if self._closing is not None:
            times.append(self._closing)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _hear(self) -> None:
        try:
            while self._ear.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _read(self, link: Link) -> None:
        try:
            while True:
                data = link.sock.recv(_CHUNK)
                link.received += data
                if len(data) < _CHUNK:
                    break
        except BlockingIOError:
            data = b"?"
        except OSError as error:
            self._end(link, error.strerror or str(error))
            return
        try:
            for body in take_frames(link.received, link.seals_in):
                self.frames_in += 1
                self.bytes_in += len(body)
                self._on_frame(link.key, body)
        except ValueError as error:
            self._end(link, f"it sent something that is not a message: {error}")
            return
        if not data:
            self._end(link, "it has ended")

    def _write(self, link: Link) -> None:
        try:
            while link.unsent:
                sent = link.sock.sendmsg(list(itertools.islice(link.unsent, _IOVECS)))
                link.unsent_bytes -= sent
                while sent:
                    first = link.unsent[0]
                    if sent < len(first):
                        link.unsent[0] = first[sent:]
                        break
                    sent -= len(link.unsent.popleft())
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(link, error.strerror or str(error))
            return
        wanted = bool(link.unsent)
        if wanted != link.writing:
            link.writing = wanted
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
            self._selector.modify(link.sock, events, link)
        if self._closing is not None:
            self._finish(link)

    def _finish(self, link: Link) -> None:
        """Closing, and all is sent: says so, and waits for the other side's end, so that nothing on its way is lost."""
        if link.open and not link.unsent:
            try:
                link.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._forget(link)

    def _end(self, link: Link, why: str) -> None:
        if link.open:
            self._forget(link)
            if self._closing is None:
                self._on_end(link.key, why)

    def _forget(self, link: Link) -> None:
        link.open = False
        self._links.pop(link.key, None)
        self._selector.unregister(link.sock)
        link.sock.close()

    def _let_go(self) -> None:
        for link in list(self._links.values()):
            self._forget(link)
        self._selector.close()
        self._ear.close()
        self._waker.close()


def _ignore(key: int, what: object) -> None:
    return None


_live: weakref.WeakSet[Links] = weakref.WeakSet()


def _in_child() -> None:
    for links in list(_live):
        links.leave_to_parent()
    _live.clear()


os.register_at_fork(after_in_child=_in_child)


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    options: list[tuple[int, int, Any]] = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        options += [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, _SILENCE_S // 3)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, _SILENCE_S // 6)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENCE_S),
        ]
    for level, name, value in options:
        sock.setsockopt(level, name, value)
