# SPDX-License-Identifier: Apache-2.0
"""Tells one listener what became of checkpoints, from rank 0's messages."""

from __future__ import annotations

from typing import Protocol

from layerwise_dist.commit.messages import ToRanks


class Listener(Protocol):
    """Is told in the order of what happened, on any thread. It must not wait."""

    def committed(self, seq: int, step: int) -> None: ...

    def failed(self, step: int | None, reason: str) -> None:
        """`step` None: there will be no checkpoint any more."""


class News:
    """Nothing is told while `listener` is None."""

    def __init__(self) -> None:
        self.listener: Listener | None = None

    def heard(self, message: ToRanks) -> None:
        """Of rank 0."""
        if self.listener is None:
            return
        if message["t"] == "committed":
            self.listener.committed(message["seq"], message["step"])
        elif message["t"] == "aborted" and message["failure"]:
            self.listener.failed(message["step"], message["reason"])
        elif message["t"] == "stop":
            self.listener.failed(None, message["reason"])

    def lost(self, why: str) -> None:
        """Nothing is decided any more."""
        if self.listener is not None:
            self.listener.failed(None, why)
