# SPDX-License-Identifier: Apache-2.0
"""Where events go, and the thread that takes them there: one for each, so that one that hangs holds up no other."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import Protocol

from layerwise_dist.errors import shown
from layerwise_dist.supervision import background
from layerwise_dist.telemetry.assembling import Event

log = logging.getLogger("layerwise_dist")

_MOST_EVENTS = 1024  # that wait for a sink which does not answer, about 1 kB each; then they are lost
_MOST_WARNINGS = 100


class Sink(Protocol):
    """A file or a package's client. It belongs to its thread, but for `leave_to_parent`."""

    name: str

    def write(self, event: Event) -> None: ...

    def close(self) -> None: ...

    def leave_to_parent(self) -> None:
        """In a forked child, which must not keep what the parent has open."""


class SinkThread:
    """Writes to one sink, in order. `put` and `end` belong to one thread, which waits for nothing in them.

    Attributes:
        written: events that the sink took.
        broken: the thread has ended by a failure of its own.
    """

    def __init__(self, sink: Sink, rank: int) -> None:
        """Raises OSError where the system gives no thread."""
        self.name, self._sink, self._rank = sink.name, sink, rank
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.written = self._failed = 0  # counted by its thread
        self._dropped = 0  # counted by the one that puts
        self.broken = False
        self._warned: set[str] = set()
        self._thread = background.start(f"layerwise-sink-{sink.name}", self._run, self._broke)

    @property
    def lost(self) -> int:
        return self._failed + self._dropped + (self._events.qsize() if self.broken else 0)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def put(self, event: Event) -> None:
        if not self.broken and self._events.qsize() < _MOST_EVENTS:
            self._events.put(event)
            return
        if not self._dropped and not self.broken:
            log.warning(
                "rank %d: telemetry (%s): %d events wait for it: newer ones are lost until it goes on; training and "
                "other telemetry go on, stats()['telemetry_lost'] counts what is lost",
                self._rank, self.name, _MOST_EVENTS,
            )  # fmt: skip
        self._dropped += 1

    def end(self, last: Event | None) -> None:
        """Once, after all that was put: writes `last`, closes the sink, and ends. `last`, of kind "end", gets the
        counts of this sink; its "lost" is of what no sink has heard of.
        """
        if self.broken:
            return
        if last is not None:
            self._events.put(last)
        self._events.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def leave_to_parent(self) -> None:
        """In a forked child."""
        self._sink.leave_to_parent()

    # -- its thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                self._write(event)
        finally:
            self._tried(self._sink.close)

    def _write(self, event: Event) -> None:
        if event["event"] == "end":
            event = {**event, "events": self.written, "lost": event["lost"] + self.lost}
        if self._tried(lambda: self._sink.write(event)):
            self.written += 1
        else:
            self._failed += 1

    def _tried(self, action: Callable[[], None]) -> bool:
        try:
            action()
            return True
        except Exception as error:  # of a package too: training goes on
            why = shown(background.describe(error), 500)
            if why not in self._warned:
                self._warned = {*list(self._warned)[:_MOST_WARNINGS], why}
                log.warning(
                    "rank %d: telemetry (%s): %s; training goes on, stats()['telemetry_lost'] counts what is lost",
                    self._rank, self.name, why,
                )  # fmt: skip
            return False

    def _broke(self, why: str) -> None:
        self.broken = True
        self._failed += 1  # the one that it was at
        log.warning("rank %d: telemetry (%s) has ended: %s; training goes on", self._rank, self.name, why)
