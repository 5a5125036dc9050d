# SPDX-License-Identifier: Apache-2.0
"""Tells one listener what became of checkpoints, and one witness each step of the way, from messages."""

from __future__ import annotations

import logging
from typing import Protocol

from layerwise_dist.commit.messages import Durable, ToCoordinator, ToRanks
from layerwise_dist.storage.filenames import AttemptId

log = logging.getLogger("layerwise_dist")


class Listener(Protocol):
    """Is told in the order of what happened, on any thread. It must not wait."""

    def committed(self, seq: int, step: int) -> None: ...

    def failed(self, step: int | None, reason: str) -> None:
        """`step` None: there will be no checkpoint any more."""


class Witness(Protocol):
    """Sees each step of each attempt, on any thread and with a lock held. It must not wait."""

    def began(self, attempt: AttemptId) -> None:
        """This rank captures it."""

    def written(self, attempt: AttemptId, nbytes: int) -> None:
        """This rank's shard, of so many bytes, is durable."""

    def heard(self, message: ToRanks) -> None:
        """Rank 0 said this to all ranks."""

    def told(self, message: Durable) -> None:
        """A rank's shard is durable. On rank 0 only, where it decides in this process."""

    def lost(self, why: str) -> None:
        """Nothing is decided any more."""


class News:
    """Nothing is told while `listener` and `witness` are None."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.witness: Witness | None = None

    def began(self, attempt: AttemptId) -> None:
        if self.witness is not None:
            self.witness.began(attempt)

    def written(self, attempt: AttemptId, nbytes: int) -> None:
        if self.witness is not None:
            self.witness.written(attempt, nbytes)

    def told(self, message: ToCoordinator) -> None:
        """To rank 0, by a rank."""
        if self.witness is not None and message["t"] == "durable":
            self.witness.told(message)

    def heard(self, message: ToRanks) -> None:
        """Of rank 0."""
        if self.witness is not None:
            self.witness.heard(message)
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
        if self.witness is not None:
            self.witness.lost(why)
        if self.listener is not None:
            self.listener.failed(None, why)


def warn_of(message: ToRanks) -> None:
    """Warns of what became of all ranks' checkpoints."""
    if message["t"] == "aborted" and (message["failure"] or message["unlike"]):
        log.warning("checkpoint of step %d aborted: %s", message["step"], message["reason"])
    elif message["t"] == "drifted" and message["first"]:
        log.warning("%s. Training goes on (replica_drift = 'warn'); stats() counts what follows", message["reason"])
    elif message["t"] == "meet" and message["b"] is None:
        log.warning("no boundary could be agreed on for a checkpoint: %s", message["why"])
