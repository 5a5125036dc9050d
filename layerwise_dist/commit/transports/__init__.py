"""Transports: how ranks and the coordinator exchange small JSON messages, apart from the job's own communication."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Message = dict[str, Any]
Handler = Callable[[Message], None]

COORDINATOR = -1


class Transport(Protocol):
    """Contract: messages from one sender to one receiver arrive once and in order, or `on_error` is called.

    `post` never blocks on the network and may be called from any thread; handlers run on the transport's threads.
    """

    rank: int
    world_size: int

    def start(
        self, on_message: Handler, on_coordinator_message: Handler | None, on_error: Callable[[str], None]
    ) -> None: ...

    def post(self, destination: int, message: Message) -> None:
        """`destination` is a rank or COORDINATOR."""
        ...

    def close(self, timeout_s: float) -> None:
        """Sends what was posted, then ends. Returns within the deadline even if the other side is stuck."""
        ...
