# SPDX-License-Identifier: Apache-2.0
"""A monitor that is slow, or does one thing wrong, as a test wants it: odd_monitor.py NAME SOCKET MEMORY PID."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from layerwise_dist.commit.coordinator import Coordinator
from layerwise_dist.monitor import serving
from layerwise_dist.monitor.__main__ import main
from layerwise_dist.monitor.holding import StagedShards
from layerwise_dist.monitor.job import MonitoredJob
from layerwise_dist.monitor.serving import MonitorServer
from layerwise_dist.storage.adapter import ShardWrite


def slow() -> None:
    """No mutation: a shard takes its time between its staging and its flush."""
    persist = ShardWrite.persist

    def persist_later(self: ShardWrite, timeout_s: float) -> Any:
        time.sleep(1.0)
        return persist(self, timeout_s)

    ShardWrite.persist = persist_later


def held() -> None:
    """No mutation: a shard is not flushed before there is a file `go` beside the directory."""
    persist = ShardWrite.persist

    def persist_later(self: ShardWrite, timeout_s: float) -> Any:
        go, deadline = Path(self.folder).parent.parent / "go", time.monotonic() + 60
        while not go.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return persist(self, timeout_s)

    ShardWrite.persist = persist_later


def early() -> None:
    """Acknowledges an attempt when it begins, before anything of it is here."""
    begin = StagedShards.begin

    def begin_and_acknowledge(self: StagedShards, message: Any) -> None:
        begin(self, message)
        attempt = self._coming[message["seq"]].write.attempt
        rank, world_size = self._participant.rank, self._participant.world_size
        self._participant.post(
            {"t": "staged", "rank": rank, "world_size": world_size, "seq": attempt.seq, "attempt": attempt.text,
             "step": attempt.step}
        )  # fmt: skip

    StagedShards.begin = begin_and_acknowledge


def first() -> None:
    """The coordinator takes one rank's acknowledgement for everybody's."""
    handle = Coordinator.handle

    def handle_for_all(self: Coordinator, message: Any, now: float) -> list[Any]:
        if message["t"] != "staged":
            return handle(self, message, now)
        ranks = range(message["world_size"])
        return [output for rank in ranks for output in handle(self, {**message, "rank": rank}, now)]

    Coordinator.handle = handle_for_all


def hasty() -> None:
    """Ends with its training process, whatever it holds. Slow, so that it holds something."""
    slow()
    gone = MonitorServer._trainer_gone

    def leave(self: MonitorServer, why: str) -> None:
        os._exit(0)
        gone(self, why)

    MonitorServer._trainer_gone = leave


def immortal() -> None:
    """Never notices that its training process is gone."""
    MonitorServer._trainer_gone = lambda self, why: None
    serving._end_in = lambda seconds: None


def lenient() -> None:
    """Keeps what was not sealed, instead of giving it up for all ranks."""
    finish = MonitoredJob.finish

    def finish_quietly(self: MonitoredJob, timeout_s: float, *, orphaned: str | None = None) -> None:
        finish(self, timeout_s)

    MonitoredJob.finish = finish_quietly


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    main()
