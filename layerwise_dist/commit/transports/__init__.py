# SPDX-License-Identifier: Apache-2.0
"""Transports: how ranks and the coordinator exchange small JSON messages, apart from the job's own communication."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from layerwise_dist.commit.messages import Message, ToCoordinator, ToRanks

__all__ = ["CoordinatorHandler", "Handler", "Message", "Transport"]

Handler = Callable[[ToRanks], None]
CoordinatorHandler = Callable[[ToCoordinator], None]


class Transport(Protocol):
    """Contract: what one rank posts reaches the coordinator once and in order, what rank 0 announces reaches every rank
    once and in order, or `on_error` is called on the rank for which that no longer holds; it then hears nothing more.
    ``{"t": "closed", "rank": ...}`` is the last that a rank posts: what ends after it is no error.

    The coordinator hears of a rank that is known to be gone without having posted ``closed``:
    ``{"t": "gone", "rank": ..., "why": ...}``. Not every transport knows, and none knows of a process that is stopped.

    `post` and `announce` never wait for the network and may be called from any thread; handlers run on a thread of the
    transport's, one at a time.
    """

    rank: int
    world_size: int

    def start(
        self, on_message: Handler, on_coordinator_message: CoordinatorHandler | None, on_error: Callable[[str], None]
    ) -> None: ...

    def post(self, message: ToCoordinator) -> None:
        """To the coordinator, on rank 0."""
        ...

    def announce(self, message: ToRanks) -> None:
        """To every rank, this one included. Rank 0 only."""
        ...

    def close(self, timeout_s: float) -> None:
        """Sends what was posted, then ends. Returns within the deadline even if the other side is stuck."""
        ...
