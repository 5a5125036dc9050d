# SPDX-License-Identifier: Apache-2.0
"""What a training process and its monitor say to each other: small JSON objects in frames over one socket.

Everything is in order, and `send` waits for nobody. The socket's end is the word that the other process is gone.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from layerwise_dist.commit.transports.frames import decode, encode
from layerwise_dist.commit.transports.links import Links
from layerwise_dist.commit.transports.proof import Line

_OTHER = 0  # the key of the only connection


class Wire:
    """One end. Handlers run on a thread of its own, one at a time. The messages are in `messages.py`."""

    def __init__(self, sock: socket.socket, on_message: Callable[[Any], None], on_end: Callable[[str], None]) -> None:
        """Nothing arrives before `start`. `on_end(why)` comes once, unless this side closes first."""
        self._on_message, self._on_end = on_message, on_end
        self._links = Links({_OTHER: Line(sock)})
        self._lock = threading.Lock()
        self._outbox: list[Mapping[str, object]] = []

    def start(self) -> None:
        self._links.start(self._arrived, lambda _, why: self._on_end(why), self._on_end)

    def send(self, message: Mapping[str, object]) -> None:
        """From any thread."""
        with self._lock:
            self._outbox.append(message)
            if len(self._outbox) > 1:
                return  # the thread was asked to look
        self._links.call(self._flush)

    def close(self, timeout_s: float) -> None:
        """Sends what is unsent, then ends, within so many seconds."""
        self._links.close(timeout_s)

    def _flush(self) -> None:
        with self._lock:
            messages, self._outbox = self._outbox, []
        self._links.send(_OTHER, encode(messages))

    def _arrived(self, _: int, body: bytes) -> None:
        for message in decode(body):
            self._on_message(message)
