"""Counters of one rank: what was written, and how long the training thread was held up for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_KEPT = 10_000  # stalls of this many checkpoints are remembered for the percentiles


class Statistics:
    """Belongs to the training thread. Times in seconds unless a name says ms."""

    def __init__(self) -> None:
        self._writes: list[Any] = []
        self._done_written = self._done_copied = 0
        self._captures = 0
        self._state_bytes = 0
        self._stalls: dict[str, float] = {}
        self._per_checkpoint: list[float] = []
        self._pending = 0.0
        self._since = time.monotonic()

    @contextmanager
    def stall(self, where: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self._stalls[where] = self._stalls.get(where, 0.0) + took
            self._pending += took
            if where == "fence" and self._captures:
                # The fence of the next update is the last that this checkpoint can cost.
                self._per_checkpoint.append(self._pending)
                self._pending = 0.0
                del self._per_checkpoint[:-_KEPT]

    def captured(self, write: Any, nbytes: int) -> None:
        self._captures += 1
        self._state_bytes = nbytes
        self._writes.append(write)
        if len(self._writes) > 8:
            old = self._writes.pop(0)
            self._done_written += old.bytes_written
            self._done_copied += old.bytes_copied

    def report(self, committed: int, aborted: int, skipped: int) -> dict[str, float | int]:
        ordered = sorted(self._per_checkpoint)

        def percentile(share: float) -> float:
            return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

        return {
            "captures": self._captures,
            "checkpoints_committed": committed,
            "checkpoints_aborted": aborted,
            "checkpoints_skipped": skipped,
            "state_bytes": self._state_bytes,
            "bytes_written": self._done_written + sum(write.bytes_written for write in self._writes),
            "bytes_copied": self._done_copied + sum(write.bytes_copied for write in self._writes),
            "stall_s": sum(self._stalls.values()),
            **{f"stall_{where}_s": seconds for where, seconds in self._stalls.items()},
            "stall_ms_p50": percentile(0.50),
            "stall_ms_p99": percentile(0.99),
            "elapsed_s": time.monotonic() - self._since,
        }
