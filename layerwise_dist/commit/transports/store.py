"""Messages between processes over a message store of the session's own, on rank 0, reached by TCP.

The lowest rank of each node keeps one connection to rank 0 and passes on what the other ranks of its node have to say,
many messages in one frame; what rank 0 announces it hands down as it came. So rank 0 has one connection for each node,
and one for each other rank of its own. `rendezvous.meet` makes the connections.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from layerwise_dist.commit.transports import Handler, Message
from layerwise_dist.commit.transports.links import Links, decode, encode, framed
from layerwise_dist.commit.transports.rendezvous import ABOVE, Met

# How long a node's messages are gathered before they go up together.
_GATHER_S = 0.001


class StoreTransport:
    """The Transport of one rank. Everything behind `post` and `announce` happens on the thread of its `Links`."""

    def __init__(self, rank: int, world_size: int, met: Met) -> None:
        self.rank, self.world_size = rank, world_size
        self._met = met
        self._links = Links(met.sockets, self._arrived, self._ended)
        self._lock = threading.Lock()
        self._outbox: list[tuple[bool, Message]] = []  # whether it is an announcement
        self._up: list[Message] = []
        self._gathering = self._leaving = False
        self._leads = bool(met.serves)
        self._below = {rank for ranks in met.serves.values() for rank in ranks}  # that have not closed
        self._all_closed = threading.Event()
        self._note_closed(rank)
        self._on_message: Handler = _ignore
        self._on_coordinator: Handler = _ignore
        self._on_error: Callable[[str], None] = _ignore

    def start(
        self, on_message: Handler, on_coordinator_message: Handler | None, on_error: Callable[[str], None]
    ) -> None:
        self._on_message, self._on_error = on_message, on_error
        if on_coordinator_message is not None:
            self._on_coordinator = on_coordinator_message
        self._links.start()

    def post(self, message: Message) -> None:
        if message["t"] == "closed":
            self._leaving = True  # the other end may be gone before this one closes
        self._put(False, message)

    def announce(self, message: Message) -> None:
        self._put(True, message)

    def close(self, timeout_s: float) -> None:
        """A node's lowest rank stays until the others of its node have posted ``closed``: they speak through it."""
        deadline = time.monotonic() + timeout_s
        if self.rank != 0:
            self._all_closed.wait(timeout_s)
            self._links.call(self._pass_on)
        self._links.close(max(0.1, deadline - time.monotonic()))

    # -- inside -------------------------------------------------------------------------------------------------

    def _put(self, announcement: bool, message: Message) -> None:
        with self._lock:
            self._outbox.append((announcement, message))
            if len(self._outbox) > 1:
                return  # the thread was asked to look
        self._links.call(self._send)

    def _send(self) -> None:
        with self._lock:
            taken, self._outbox = self._outbox, []
        if posted := [message for announcement, message in taken if not announcement]:
            self._to_coordinator(posted)
        if announced := [message for announcement, message in taken if announcement]:
            self._links.broadcast(encode(announced))
            for message in announced:
                self._on_message(message)

    def _to_coordinator(self, messages: list[Message]) -> None:
        if self.rank == 0:
            for message in messages:
                self._on_coordinator(message)
        elif not self._leads:
            self._links.send(ABOVE, encode(messages))
        else:
            self._up += messages
            if not self._gathering:
                self._gathering = True
                self._links.later(_GATHER_S, self._pass_on)

    def _pass_on(self) -> None:
        self._gathering = False
        messages, self._up = self._up, []
        if messages:
            self._links.send(ABOVE, encode(messages))

    def _arrived(self, key: int, body: bytes) -> None:
        messages = decode(body)
        if key == ABOVE:
            if self._leads:
                self._links.broadcast(framed(body), but=ABOVE)
            for message in messages:
                self._on_message(message)
            return
        for message in messages:
            if message["t"] in ("closed", "gone"):
                self._note_closed(message["rank"])
        self._to_coordinator(messages)

    def _note_closed(self, rank: int) -> None:
        self._below.discard(rank)
        if not self._below:
            self._all_closed.set()

    def _ended(self, key: int, why: str) -> None:
        if key == ABOVE:
            self._links.drop()
            if not self._leaving:
                self._on_error(f"the connection to {self._met.above} is gone: {why}")
        else:
            gone = [rank for rank in self._met.serves[key] if rank in self._below]
            for rank in gone:
                self._note_closed(rank)
            self._to_coordinator(
                [{"t": "gone", "rank": rank, "why": f"its connection is gone: {why}"} for rank in gone]
            )


def _ignore(_: object) -> None:
    return None
