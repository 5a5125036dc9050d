# SPDX-License-Identifier: Apache-2.0
"""A tree of ranks with rank 0 at the top: what they say is passed up, what rank 0 announces is handed down.

A rank with others below it gathers what they say for a moment, and sends it up in one frame. What comes down it hands
on as it came. So what rank 0 has to do for a message does not grow with the number of ranks that speak through others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from layerwise_dist.commit.messages import Cut, Message, ToCoordinator, ToRanks
from layerwise_dist.commit.transports import CoordinatorHandler, Handler
from layerwise_dist.commit.transports.frames import OnEnd, OnFrame, decode, encode, framed
from layerwise_dist.supervision.background import Failed

ABOVE = -1  # the key of the connection toward rank 0; those below have their rank
# How long what comes from below is gathered before it goes up together.
_GATHER_S = 0.001
_T = TypeVar("_T")
_FAREWELL_S = 5.0  # for the last frames and the other sides' end; nobody is kept longer by a side that is stuck


class Connections(Protocol):
    """What a relay needs: frames to and from the ranks beside it in the tree, by one thread.

    `send`, `broadcast`, `later` and `drop` belong to that thread; `call` brings anything else there, in order.
    """

    def start(self, on_frame: OnFrame, on_end: OnEnd, on_broken: Failed) -> None:
        """`on_frame(key, body)` for each frame, `on_end(key, why)` when nothing more comes; on the thread.

        `on_broken(why)` when the thread itself can't go on, as its last call; it may still `send`.
        """
        ...

    def call(self, action: Callable[[], None]) -> None: ...
    def later(self, seconds: float, action: Callable[[], None]) -> None: ...
    def send(self, key: int, frame: bytes) -> None: ...
    def broadcast(self, frame: bytes, *, but: int | None = None) -> None: ...

    def drop(self) -> None:
        """Ends all connections; `on_end` is not called."""
        ...

    def close(self, timeout_s: float) -> None:
        """Sends what is unsent, then ends; not longer than `timeout_s` seconds."""
        ...


class RelayTransport:
    """The Transport of one rank of the tree.

    What follows on `post` and `announce` happens on the connections' thread.
    """

    def __init__(
        self, rank: int, world_size: int, connections: Connections, serves: dict[int, list[int]], above: str
    ) -> None:
        """`serves` says which ranks speak through each of those right below; `above` names the one above."""
        self.rank, self.world_size = rank, world_size
        self._connections, self._serves, self._above = connections, serves, above
        self._lock = threading.Lock()
        self._announced: list[ToRanks] = []
        self._posted: list[ToCoordinator] = []
        self._up: list[ToCoordinator] = []
        self._cut: dict[int, str] = {}  # what the process at the other end said that ended its thread
        self._gathering = self._leaving = False
        self._below = {rank for ranks in serves.values() for rank in ranks}  # that have not closed
        self._all_closed = threading.Event()
        self._note_closed(rank)
        self._on_message: Handler = _ignore
        self._on_coordinator: CoordinatorHandler = _ignore
        self._on_error: Callable[[str], None] = _ignore

    def start(
        self, on_message: Handler, on_coordinator_message: CoordinatorHandler | None, on_error: Callable[[str], None]
    ) -> None:
        self._on_message, self._on_error = on_message, on_error
        if on_coordinator_message is not None:
            self._on_coordinator = on_coordinator_message
        self._connections.start(self._arrived, self._ended, self._broken)

    def post(self, message: ToCoordinator) -> None:
        if message["t"] == "closed":
            self._leaving = True  # the other end may be gone before this one closes
        self._put(self._posted, message)

    def announce(self, message: ToRanks) -> None:
        self._put(self._announced, message)

    def close(self, timeout_s: float) -> None:
        """Stays until all ranks that speak through this one have posted ``closed``."""
        deadline = time.monotonic() + timeout_s
        if self.rank != 0:
            self._all_closed.wait(timeout_s)
            self._connections.call(self._pass_on)
        self._connections.close(max(0.1, min(_FAREWELL_S, deadline - time.monotonic())))

    # -- inside -------------------------------------------------------------------------------------------------

    def _put(self, outbox: list[_T], message: _T) -> None:
        with self._lock:
            outbox.append(message)
            if len(self._posted) + len(self._announced) > 1:
                return  # the thread was asked to look
        self._connections.call(self._send)

    def _send(self) -> None:
        with self._lock:
            posted, announced = self._posted[:], self._announced[:]
            self._posted.clear()
            self._announced.clear()
        if posted:
            self._to_coordinator(posted)
        if announced:
            self._connections.broadcast(encode(announced))
            for message in announced:
                self._on_message(message)

    def _to_coordinator(self, messages: list[ToCoordinator]) -> None:
        if self.rank == 0:
            for message in messages:
                self._on_coordinator(message)
        elif not self._serves:
            self._connections.send(ABOVE, encode(messages))
        else:
            self._up += messages
            if not self._gathering:
                self._gathering = True
                self._connections.later(_GATHER_S, self._pass_on)

    def _pass_on(self) -> None:
        self._gathering = False
        messages, self._up = self._up, []
        if messages:
            self._connections.send(ABOVE, encode(messages))

    def _arrived(self, key: int, body: bytes) -> None:
        messages: list[Message] = decode(body)
        if messages and messages[0]["t"] == "cut":
            self._cut[key] = messages[0]["why"]
            return
        if key == ABOVE:
            if self._serves:
                self._connections.broadcast(framed(body), but=ABOVE)
            for announced in cast(list[ToRanks], messages):
                self._on_message(announced)
            return
        said = cast(list[ToCoordinator], messages)
        for message in said:
            if message["t"] == "closed" or message["t"] == "gone":
                self._note_closed(message["rank"])
        self._to_coordinator(said)

    def _note_closed(self, rank: int) -> None:
        self._below.discard(rank)
        if not self._below:
            self._all_closed.set()

    def _ended(self, key: int, why: str) -> None:
        why = self._cut.get(key, why)
        if key == ABOVE:
            self._say_cut(f"the connection to {self._above} is gone: {why}")
            self._connections.drop()
            if not self._leaving:
                self._on_error(f"the connection to {self._above} is gone: {why}")
        else:
            gone = [rank for rank in self._serves[key] if rank in self._below]
            for rank in gone:
                self._note_closed(rank)
            self._to_coordinator(
                [{"t": "gone", "rank": rank, "why": f"its connection is gone: {why}"} for rank in gone]
            )

    def _broken(self, why: str) -> None:
        try:
            self._say_cut(f"rank {self.rank}: {why}")
        finally:
            self._on_error(why)

    def _say_cut(self, why: str) -> None:
        """The last that this rank says to those beside it, who would otherwise hear of an end without a reason."""
        last: Cut = {"t": "cut", "why": why}
        self._connections.broadcast(encode([last]))


def _ignore(_: object) -> None:
    return None
