# SPDX-License-Identifier: Apache-2.0
"""Messages inside one process: for a job of one process, and for several ranks as threads of one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from layerwise_dist.commit.messages import ToCoordinator, ToRanks
from layerwise_dist.commit.transports import CoordinatorHandler, Handler
from layerwise_dist.supervision import background


class LocalHub:
    """The queues that `world_size` LocalTransports share. Messages are handed over as they are: never change one."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.to_coordinator: queue.SimpleQueue[ToCoordinator | None] = queue.SimpleQueue()
        self.to_rank: list[queue.SimpleQueue[ToRanks | None]] = [queue.SimpleQueue() for _ in range(world_size)]


class LocalTransport:
    """The Transport of one rank of a LocalHub."""

    def __init__(self, hub: LocalHub, rank: int) -> None:
        self.rank, self.world_size = rank, hub.world_size
        self._hub = hub
        self._threads: list[threading.Thread] = []
        self._on_error: Callable[[str], None] = background.log_only

    def start(
        self, on_message: Handler, on_coordinator_message: CoordinatorHandler | None, on_error: Callable[[str], None]
    ) -> None:
        self._on_error = on_error
        hub = self._hub

        def receive() -> None:
            while (message := hub.to_rank[self.rank].get()) is not None:
                on_message(message)

        self._spawn(str(self.rank), receive)
        if on_coordinator_message is not None:
            coordinate = on_coordinator_message

            def receive_for_coordinator() -> None:
                while (message := hub.to_coordinator.get()) is not None:
                    coordinate(message)

            self._spawn("coordinator", receive_for_coordinator)

    def post(self, message: ToCoordinator) -> None:
        self._hub.to_coordinator.put(message)

    def announce(self, message: ToRanks) -> None:
        for inbox in self._hub.to_rank:
            inbox.put(message)

    def close(self, timeout_s: float) -> None:
        self._hub.to_rank[self.rank].put(None)
        if len(self._threads) > 1:
            self._hub.to_coordinator.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _spawn(self, place: str, run: Callable[[], None]) -> None:
        self._threads.append(background.start(f"layerwise-receive-{place}", run, self._on_error))
