"""Messages inside one process: for a job of one process, and for several ranks as threads of one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from layerwise_dist.commit.transports import Handler, Message
from layerwise_dist.supervision import background

_COORDINATOR = -1


class LocalHub:
    """The queues that `world_size` LocalTransports share. Messages are handed over as they are: never change one."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.queues: dict[int, queue.SimpleQueue[Message | None]] = {
            place: queue.SimpleQueue() for place in (_COORDINATOR, *range(world_size))
        }


class LocalTransport:
    """The Transport of one rank of a LocalHub."""

    def __init__(self, hub: LocalHub, rank: int) -> None:
        self.rank, self.world_size = rank, hub.world_size
        self._hub = hub
        self._threads: list[threading.Thread] = []
        self._on_error: Callable[[str], None] = background.log_only

    def start(
        self, on_message: Handler, on_coordinator_message: Handler | None, on_error: Callable[[str], None]
    ) -> None:
        self._on_error = on_error
        self._spawn(self.rank, on_message)
        if on_coordinator_message is not None:
            self._spawn(_COORDINATOR, on_coordinator_message)

    def post(self, message: Message) -> None:
        self._hub.queues[_COORDINATOR].put(message)

    def announce(self, message: Message) -> None:
        for rank in range(self.world_size):
            self._hub.queues[rank].put(message)

    def close(self, timeout_s: float) -> None:
        self._hub.queues[self.rank].put(None)
        if len(self._threads) > 1:
            self._hub.queues[_COORDINATOR].put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _spawn(self, place: int, handler: Handler) -> None:
        def run() -> None:
            while (message := self._hub.queues[place].get()) is not None:
                handler(message)

        self._threads.append(background.start(f"layerwise-receive-{place}", run, self._on_error))
