# SPDX-License-Identifier: Apache-2.0
"""Records the telemetry of one rank: any thread appends notes, one thread turns them into events and hands these to a
thread for each sink.

Nothing here stops or delays training. What can't be written is lost, warned of once for each reason, and counted.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import time
import weakref
from collections.abc import Sequence
from typing import Any

from layerwise_dist.commit.messages import Durable, ToRanks
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.supervision import background
from layerwise_dist.telemetry.assembling import (
    Assembler,
    Began,
    Boundary,
    Captured,
    Event,
    GivenUp,
    Note,
    Reached,
    Restored,
    ShardDurable,
    Stalled,
    Stopped,
    Written,
)
from layerwise_dist.telemetry.names import VERSION
from layerwise_dist.telemetry.sinks import Sink, SinkThread

log = logging.getLogger("layerwise_dist")

_MOST_NOTES = 8192  # that wait while the thread that takes them gets no turn; then they are lost
_PROGRESS_S = 10.0


class Telemetry:
    """From the constructor until `close`. Its notes may come from any thread; none waits for anything."""

    def __init__(self, assembler: Assembler, rank: int, sinks: Sequence[Sink], start: dict[str, Any]) -> None:
        """`start` is what the first event says. Raises OSError where the system gives no thread: then whoever opened
        the sinks closes them.
        """
        self._assembler, self._rank = assembler, rank
        self._sinks: list[SinkThread] = []
        self._notes: queue.SimpleQueue[tuple[float, Note] | None] = queue.SimpleQueue()
        self._overflow = itertools.count(1)
        self._overflowed = self._failed = 0
        self._closed = self._deaf = False  # deaf: nothing is noted any more
        self._start = start
        try:
            for sink in sinks:
                self._sinks.append(SinkThread(sink, rank))
            self._thread = background.start("layerwise-telemetry", self._run, self._broke)
        except OSError:
            for each in self._sinks:
                each.end(None)
            raise
        _live.add(self)

    @property
    def events_written(self) -> int:
        """Events that every sink has taken."""
        return min((sink.written for sink in self._sinks), default=0)

    @property
    def events_lost(self) -> int:
        """Notes that could not be taken, and events that could not be written, by each sink."""
        return self._overflowed + self._failed + sum(sink.lost for sink in self._sinks)

    # -- notes ----------------------------------------------------------------------------------------------------

    def began(self, attempt: AttemptId) -> None:
        self._put(Began(attempt))

    def captured(self, attempt: AttemptId, state_bytes: int, boundary: tuple[int, float]) -> None:
        """It was sealed at `boundary`: its step and when it ended, by `time.monotonic()`."""
        self._put(Captured(attempt, state_bytes, Boundary(*boundary)))

    def stalled(self, seq: int, parts: dict[str, float]) -> None:
        """What the newest checkpoint that was captured has cost the training thread: seconds by part."""
        self._put(Stalled(seq, parts))

    def restored(self, boundary: tuple[int, float]) -> None:
        self._put(Restored(Boundary(*boundary)))

    def written(self, attempt: AttemptId, nbytes: int) -> None:
        self._put(Written(attempt.seq, nbytes))

    def told(self, message: Durable) -> None:
        self._put(ShardDurable(message["seq"], message["rank"]))

    def heard(self, message: ToRanks) -> None:
        match message["t"]:
            case "staged" | "durable" | "committed" as level:
                self._put(Reached(message["seq"], message["step"], level))
            case "aborted":
                outcome = "skipped" if message["skipped"] else "failed"
                self._put(GivenUp(message["seq"], message["step"], outcome, message["reason"]))
            case "stop":
                self._put(Stopped(message["reason"]))

    def lost(self, why: str) -> None:
        self._put(Stopped(why))

    def _put(self, note: Note) -> None:
        if self._deaf:
            return
        if self._notes.qsize() >= _MOST_NOTES:
            self._overflowed = next(self._overflow)
            return
        self._notes.put((time.monotonic(), note))

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float) -> None:
        """Waits until what was noted is written, at most so many seconds; warns if it is not by then."""
        if self._closed:
            return
        self._closed = self._deaf = True
        _live.discard(self)
        self._notes.put(None)
        deadline = time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        for sink in self._sinks:
            sink.join(max(0.0, deadline - time.monotonic()))
        if late := [sink.name for sink in self._sinks if not sink.ended]:
            log.warning(
                "rank %d: telemetry (%s) was not written within %.3g s: what is left of it is lost",
                self._rank, ", ".join(late), timeout_s,
            )  # fmt: skip
        elif self.events_lost:
            log.warning("rank %d: telemetry: %d events were lost", self._rank, self.events_lost)

    def leave_to_parent(self) -> None:
        """In a forked child."""
        self._closed = self._deaf = True
        for sink in self._sinks:
            sink.leave_to_parent()

    # -- its thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last: Event | None = None
        try:
            self._write({"event": "start", **self._start}, time.monotonic())
            self._follow()
            now = time.monotonic()
            for event in self._assembler.end():
                self._write(event, now)
            last = self._whole({"event": "end", "lost": self._overflowed}, now)
        finally:
            for sink in self._sinks:
                sink.end(last)

    def _follow(self) -> None:
        """Until the end is noted."""
        due = time.monotonic() + _PROGRESS_S
        while True:
            try:
                noted = self._notes.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                pass
            else:
                if noted is None:
                    return
                at, note = noted
                for event in self._assembler.take(note, at):
                    self._write(event, at)
            if time.monotonic() >= due:
                due = time.monotonic() + _PROGRESS_S
                for event in self._assembler.progress():
                    self._write(event, time.monotonic())

    def _write(self, event: Event, at: float) -> None:
        """`at`: when it happened."""
        whole = self._whole(event, at)
        for sink in self._sinks:
            sink.put(whole)

    def _whole(self, event: Event, at: float) -> Event:
        when = time.time() - (time.monotonic() - at)
        return {"layerwise": VERSION, "time": round(when, 6), "event": event["event"], "rank": self._rank, **event}

    def _broke(self, why: str) -> None:
        self._deaf = True
        self._failed += 1
        log.warning("rank %d: telemetry has ended: %s; training goes on", self._rank, why)


_live: weakref.WeakSet[Telemetry] = weakref.WeakSet()


def _in_child() -> None:
    for each in list(_live):
        each.leave_to_parent()
    _live.clear()


os.register_at_fork(after_in_child=_in_child)
