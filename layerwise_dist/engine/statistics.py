# SPDX-License-Identifier: Apache-2.0
"""Counters of one rank: what was written, and how long training was stalled for it."""

from __future__ import annotations

import statistics
import time
from collections import deque

from layerwise_dist import _native
from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.capture.lease import Capture
from layerwise_dist.percentiles import percentile
from layerwise_dist.storage.protocols import ShardWrite
from layerwise_dist.telemetry.names import PARTS
from layerwise_dist.telemetry.recorder import Telemetry

_KEPT = 10_000  # stalls of this many checkpoints are remembered for the percentiles
_RECENT = 8  # captures whose writers may still count
_COUNTED = ("writes", "bytes_written", "bytes_copied", "bytes_evacuated", "bytes_sealed")


class Statistics:
    """Belongs to the training thread. Times in seconds unless a name says ms.

    Attributes:
        newest: step and end, by `time.monotonic()`, of the last boundary. Any thread may read it.
        telemetry: hears of each checkpoint; None if nobody wants to.
    """

    telemetry: Telemetry | None = None

    def __init__(self) -> None:
        self._recent: list[tuple[ShardWrite, int, int]] = []
        self._past = dict.fromkeys(_COUNTED, 0)
        self.captures = 0  # checkpoints sealed
        self._state_bytes = self._captured_bytes = 0
        self._stalls = dict.fromkeys(PARTS, 0.0)
        self._per_checkpoint: list[float] = []
        self._pending = dict.fromkeys(PARTS, 0.0)
        self._unpaid = 0  # seq of the newest capture
        self._paid = 0  # captures whose cost is known
        self._since = time.monotonic()
        # (step, when it ended): the newest boundary; checkpoints on their way, oldest first; what a restart would find.
        self.newest = self._safe = 0, self._since
        self._sealed: deque[tuple[int, float]] = deque(maxlen=_KEPT)

    def stall(self, where: str) -> _Stall:
        """A context manager: the time within it counts as "open", "seal", "settle" or "fence"."""
        return _Stall(self, where)

    def held_up(self, where: str, seconds: float) -> None:
        self._stalls[where] += seconds
        self._pending[where] += seconds

    def update_over(self) -> None:
        """The fence of the next update is the last that a checkpoint can cost."""
        if self.captures > self._paid:
            self._paid = self.captures
            self._per_checkpoint.append(sum(self._pending.values()))
            del self._per_checkpoint[:-_KEPT]
            if self.telemetry is not None:
                self.telemetry.stalled(self._unpaid, self._pending)
        self._pending = dict.fromkeys(PARTS, 0.0)

    def passed(self, step: int) -> None:
        """The boundary of `step` is here."""
        self.newest = step, time.monotonic()

    def restored(self, step: int) -> None:
        """Everything is as at the boundary of `step`."""
        self.newest = self._safe = step, time.monotonic()
        self._sealed.clear()
        if self.telemetry is not None:
            self.telemetry.restored(self.newest)

    def captured(self, capture: Capture, nbytes: int) -> None:
        """It was sealed, of a state of `nbytes` bytes."""
        self.captures += 1
        self._state_bytes = nbytes
        self._captured_bytes += nbytes
        self._sealed.append(self.newest)
        self._unpaid = capture.write.attempt.seq
        if self.telemetry is not None:
            self.telemetry.captured(capture.write.attempt, nbytes, self.newest)
        self._recent.append((capture.write, capture.bytes_staged, capture.bytes_sealed))
        if len(self._recent) > _RECENT:
            for name, count in _bytes_of(*self._recent.pop(0)).items():
                self._past[name] += count

    def close(self, timeout_s: float) -> None:
        """No update comes that could still cost anything; telemetry ends within so many seconds."""
        self.update_over()
        if self.telemetry is not None:
            self.telemetry.close(timeout_s)

    def report(
        self, committed: int, aborted: int, skipped: int, pool: _native.BufferPool | None, frozen: FrozenBases, *,
        newest: int | None, in_flight: int, drifts: int, audit_s: float, every_n_steps: int, interval_changes: int,
        reads: tuple[int, int],
    ) -> dict[str, float | int]:  # fmt: skip
        """`pool` is None before the first checkpoint; `newest` is the newest committed step; `reads` are bytes that
        restores have read, and those of them that came out of the page cache.
        """
        while newest is not None and self._sealed and self._sealed[0][0] <= newest:
            self._safe = self._sealed.popleft()
        stalls = self._per_checkpoint or [0.0]
        recent = [_bytes_of(*each) for each in self._recent]
        totals = {name: past + sum(each[name] for each in recent) for name, past in self._past.items()}

        totals["bytes_written"] += frozen.bytes_written
        return {
            "captures": self.captures,
            "every_n_steps": every_n_steps,
            "interval_changes": interval_changes,
            "checkpoints_committed": committed,
            "checkpoints_aborted": aborted,
            "checkpoints_skipped": skipped,
            "in_flight": in_flight,
            "replica_drifts": drifts,
            "lag_steps": self.newest[0] - self._safe[0],
            "lag_s": self.newest[1] - self._safe[1],
            "state_bytes": self._state_bytes,
            "base_bytes": frozen.nbytes,
            "bases_written": frozen.written,
            **totals,
            "copied_share": totals["bytes_copied"] / max(1, self._captured_bytes),
            "pool_bytes": pool.capacity if pool is not None else 0,
            "pool_peak_bytes": pool.peak if pool is not None else 0,
            "bytes_read": reads[0],
            "bytes_read_cached": reads[1],
            "stall_s": sum(self._stalls.values()),
            **{f"stall_{where}_s": seconds for where, seconds in self._stalls.items()},
            "stall_audit_s": audit_s,
            "stall_ms_p50": 1e3 * statistics.median(stalls),
            "stall_ms_p99": 1e3 * percentile(stalls, 99),
            "telemetry_events": self.telemetry.events_written if self.telemetry is not None else 0,
            "telemetry_lost": self.telemetry.events_lost if self.telemetry is not None else 0,
            "elapsed_s": time.monotonic() - self._since,
        }


class _Stall:
    """Entered for each layer of each step: a generator would cost three times as much."""

    __slots__ = ("_began", "_statistics", "_where")

    def __init__(self, statistics: Statistics, where: str) -> None:
        self._statistics, self._where = statistics, where

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._statistics.held_up(self._where, time.perf_counter() - self._began)


def _bytes_of(write: ShardWrite, staged: int, sealed: int) -> dict[str, int]:
    """What one capture wrote and copied so far; `bytes_sealed`, the boundary's copies, is not in `bytes_copied`."""
    return {
        "writes": write.writes,
        "bytes_written": write.bytes_written,
        "bytes_copied": write.bytes_copied - write.state_bytes + staged,
        "bytes_evacuated": write.bytes_evacuated,
        "bytes_sealed": sealed + write.state_bytes,
    }
