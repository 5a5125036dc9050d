# SPDX-License-Identifier: Apache-2.0
"""Computes how a run is doing now from its events and commits, for `layerwise watch`."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from layerwise_dist.telemetry.figures import median, percentile

_WINDOW = 200  # checkpoints that rates, stalls and failures are of
_REASONS = 3
_LEAST_S = 30.0  # a disk that is watched for less says nothing about when it is full
_FAR_S = 3650 * 86400.0  # nor does a trend that long


class Commit(NamedTuple):
    """`created`: seconds since 1970. `nbytes`: of all shards."""

    step: int
    created: float
    nbytes: int
    seq: int


class Summary:
    """Takes events in the order in which they were written; `now` tells what they come to."""

    def __init__(self) -> None:
        self._checkpoints: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._positions: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._free: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._counts = dict.fromkeys(("committed", "failed", "skipped", "undecided"), 0)
        self._start: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None
        self._stopped: str | None = None

    def take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self._last = event
        if kind == "start":
            self._start, self._stopped = event, None
            self._positions.clear()
        elif kind == "restore":
            self._positions.clear()
        elif kind == "stopped":
            self._stopped = event["reason"] or "for no reason that is known"
        elif kind == "checkpoint":
            self._counts[event["outcome"]] += 1
            self._checkpoints.append(event)
            if event["disk_free_bytes"] is not None:
                self._free.append((event["time"] - (event["disk_free_age_s"] or 0.0), event["disk_free_bytes"]))
        if event.get("lag_steps") is not None and kind == "progress":
            self._positions.append((event["time"], event["step"]))
        elif kind == "checkpoint" and event["outcome"] == "committed":
            # Its own step is one that training has passed long ago.
            self._positions.append((event["time"], event["step"] + max(0, round(event["lag_steps"] or 0))))

    def now(self, now: float, commits: Sequence[Commit], free: int | None) -> dict[str, Any]:
        """`commits` of the lineage, newest first. `free`: bytes left on the disk now. What is not known is None."""
        newest = commits[0] if commits else None
        done = [each for each in self._checkpoints if each["outcome"] == "committed"]
        last = done[-1] if done else None
        at = max(self._positions, key=lambda each: each[1], default=None)
        stalls_ms = [1e3 * each["stall_s"] for each in done if each["stall_s"] is not None]
        failed = [each for each in self._checkpoints if each["outcome"] == "failed"]
        durable_s = last["durable_s"] if last is not None else None
        matching = next((each for each in commits if last is not None and each.seq == last["seq"]), None)
        began = self._start["time"] if self._start is not None else 0.0
        step = max((each for each in (at and at[1], newest and newest.step) if each is not None), default=None)
        return {
            "time": now,
            "state": self._state(),
            "last_event_age_s": now - self._last["time"] if self._last is not None else None,
            "world_size": self._start["world_size"] if self._start is not None else None,
            "step": step,
            "committed_step": newest.step if newest is not None else None,
            "committed_age_s": now - newest.created if newest is not None else None,
            "lag_steps": step - newest.step if step is not None and newest is not None else None,
            "checkpoint_bytes": newest.nbytes if newest is not None else None,
            "steps_per_s": self._steps_per_s() or _rate_of(commits),
            "checkpoints_per_h": _per_hour([each["time"] for each in done if each["time"] >= began], commits),
            "gb_per_s": matching.nbytes / durable_s / 1e9 if matching is not None and durable_s else None,
            "rank_gb_per_s": last["gb_per_s"] if last is not None else None,
            "committed_s": last["committed_s"] if last is not None else None,
            "stall_ms_p50": median(stalls_ms),
            "stall_ms_p99": percentile(stalls_ms, 99),
            "outcomes": dict(self._counts) if self._start is not None or any(self._counts.values()) else None,
            "failures": [
                {"step": each["step"], "age_s": now - each["time"], "reason": each["reason"]}
                for each in failed[-_REASONS:]
            ],
            "stopped": self._stopped,
            "disk_free_bytes": free,
            "disk_full_in_s": self._full_in(now, free),
        }  # fmt: skip

    def _state(self) -> str | None:
        """running, stopped (no more checkpoints) or ended; None without events."""
        if self._last is None:
            return None
        if self._last["event"] == "end":
            return "ended"
        return "stopped" if self._stopped is not None else "running"

    def _steps_per_s(self) -> float | None:
        if len(self._positions) < 2:
            return None
        (begin, first), (end, last) = self._positions[0], self._positions[-1]
        return (last - first) / (end - begin) if end > begin and last > first else None

    def _full_in(self, now: float, free: int | None) -> float | None:
        """Seconds until nothing is left, if it goes on as in a straight line through what was seen."""
        seen = [*self._free, *([(now, free)] if free is not None else [])]
        if free is None or len(seen) < 3 or seen[-1][0] - seen[0][0] < _LEAST_S:
            return None
        slope = statistics.linear_regression([at for at, _ in seen], [left for _, left in seen]).slope
        return free / -slope if slope < 0 and free < _FAR_S * -slope else None


def _rate_of(commits: Sequence[Commit]) -> float | None:
    """Steps a second, by the commits that are there."""
    if len(commits) < 2 or commits[0].created <= commits[-1].created:
        return None
    return max(0.0, (commits[0].step - commits[-1].step) / (commits[0].created - commits[-1].created)) or None


def _per_hour(told: list[float], commits: Sequence[Commit]) -> float | None:
    times = told or sorted(each.created for each in commits)
    return 3600 * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
