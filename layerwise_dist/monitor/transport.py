# SPDX-License-Identifier: Apache-2.0
"""The Transport of a training process: its messages go through its monitor, which speaks for the rank."""

from __future__ import annotations

from collections.abc import Callable

from layerwise_dist.commit.messages import ToCoordinator, ToRanks
from layerwise_dist.commit.transports import CoordinatorHandler, Handler
from layerwise_dist.monitor.connection import MonitorLink


class MonitorTransport:
    """What this rank posts goes to the monitor: that a shard is staged or durable only the monitor says, and what the
    training processes agree on among themselves it wraps, and passes on.
    """

    def __init__(self, link: MonitorLink, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._link = link

    def start(
        self, on_message: Handler, on_coordinator_message: CoordinatorHandler | None, on_error: Callable[[str], None]
    ) -> None:
        self._link.on("heard", lambda message: on_message(message["m"]))
        if on_coordinator_message is not None:
            self._link.on("asked", lambda message: on_coordinator_message(message["m"]))
        self._link.on("lost", lambda message: on_error(message["why"]))
        self._link.on_lost(on_error)
        self._link.send({"t": "listening"})

    def post(self, message: ToCoordinator) -> None:
        if message["t"] != "staged":
            self._link.send({"t": "post", "m": message})

    def announce(self, message: ToRanks) -> None:
        self._link.send({"t": "announce", "m": message})

    def close(self, timeout_s: float) -> None:
        """The monitor was told by ``closed`` to finish."""
        self._link.leave(timeout_s)
