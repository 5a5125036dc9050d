# SPDX-License-Identifier: Apache-2.0
"""The thread on rank 0 that runs a `Coordinator` and carries out its orders."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable
from typing import Protocol

from layerwise_dist.commit.coordinator import Coordinator
from layerwise_dist.commit.messages import Durable, ToCoordinator, ToRanks
from layerwise_dist.commit.orders import Announce, ComposeManifest, Output, Retired, RetireOld, WriteManifest
from layerwise_dist.errors import OwnerError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")

_TICK_S = 0.05  # how exactly deadlines are kept; a look at every one of many ranks' messages would cost as much again


class CommitterWork(Protocol):
    """What is written for the coordinator (`session.Committer`). All may raise OSError, InDoubt or OwnerError."""

    def compose(self, seq: int, step: int, reports: list[Durable]) -> str: ...
    def commit(self, seq: int, step: int, reports: list[Durable]) -> None: ...

    def retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        """Removes the manifests that retention no longer keeps; tells of each that is gone durably."""
        ...

    def collect_old(self, attempt: AttemptId) -> None:
        """What is left of it may go; ranks look after what they wrote in this session."""
        ...

    def unneeded(self) -> list[str]:
        """Bases that no checkpoint refers to any more, each named once."""
        ...

    def remove_bases(self, bases: list[str]) -> None: ...

    def close(self) -> None:
        """Lets go of the directory. Raises nothing."""
        ...


def perform(
    coordinator: Coordinator, committer: CommitterWork, send: Callable[[ToRanks], None], output: Output
) -> list[Output]:
    """Does one thing that the coordinator said. What it says to that comes next."""
    if isinstance(output, Announce):
        send(output.message)
    elif isinstance(output, WriteManifest):
        problem: OSError | OwnerError | None = None
        try:
            committer.commit(output.seq, output.step, output.reports)
        except (OSError, OwnerError) as error:
            problem = error
        return coordinator.wrote(output.seq, problem)
    elif isinstance(output, ComposeManifest):
        try:
            return coordinator.composed(output.seq, committer.compose(output.seq, output.step, output.reports), None)
        except (OSError, OwnerError) as error:
            return coordinator.composed(output.seq, "", error)
    elif isinstance(output, Retired):
        attempt = output.attempt
        send({"t": "retired", "epoch": attempt.epoch, "seq": attempt.seq, "step": attempt.step})
        try:
            committer.collect_old(attempt)
        except (OSError, OwnerError) as error:
            log.warning("leftovers of step %d stay until the next start: %s", attempt.step, error)
        _remove_bases(committer, send)
    elif isinstance(output, RetireOld):
        gone: list[AttemptId] = []
        try:
            committer.retire(gone.append)
        except (OSError, OwnerError) as error:
            log.warning("an old checkpoint could not be removed: %s", error)
        _remove_bases(committer, send)
        return coordinator.withdrawn(gone)
    return []


def _remove_bases(committer: CommitterWork, send: Callable[[ToRanks], None]) -> None:
    """Everywhere.

    One that is on other nodes only, since no checkpoint ever referred to it, stays until the next start.
    """
    try:
        if unneeded := committer.unneeded():
            send({"t": "unneeded", "bases": unneeded})
            committer.remove_bases(unneeded)
    except (OSError, OwnerError) as error:
        log.warning("frozen parameters that no checkpoint refers to stay until the next start: %s", error)


class CoordinatorThread:
    """From the constructor on, until `close`."""

    def __init__(self, coordinator: Coordinator, committer: CommitterWork, send: Callable[[ToRanks], None]) -> None:
        """`send(message)` reaches every rank, in order."""
        self._coordinator, self._committer, self._send = coordinator, committer, send
        self._inbox: queue.SimpleQueue[ToCoordinator | queue.SimpleQueue[bool] | None] = queue.SimpleQueue()
        self._thread = background.start("layerwise-coordinator", self._run, self._broke)

    def post(self, message: ToCoordinator) -> None:
        self._inbox.put(message)

    def quiet(self, timeout_s: float) -> None:
        """Waits until all that was posted is done and nothing is waited for, at most `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        settled = False
        while not settled and time.monotonic() < deadline:
            answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
            self._inbox.put(answer)
            try:
                settled = answer.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                return
            if not settled:
                time.sleep(0.005)

    def close(self, timeout_s: float) -> bool:
        """Closes the committer after all that is still to be written, on the thread that writes. Whether that was
        done in time.
        """
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        ticked = -math.inf
        while True:
            try:
                message = self._inbox.get(timeout=0.2 if not self._coordinator.idle else 5.0)
            except queue.Empty:
                pass
            else:
                if message is None:
                    break
                if isinstance(message, queue.SimpleQueue):
                    message.put(self._coordinator.settled)
                else:
                    self._do(self._coordinator.handle(message, time.monotonic()))
            if (now := time.monotonic()) - ticked >= _TICK_S:
                ticked = now
                self._do(self._coordinator.tick(now))
        self._committer.close()

    def _broke(self, why: str) -> None:
        """Nothing is decided any more, which no rank would hear of else."""
        self._send({"t": "stop", "at": self._coordinator.last_granted, "reason": f"rank 0: {why}"})
        self._committer.close()

    def _do(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._do(perform(self._coordinator, self._committer, self._send, output))
