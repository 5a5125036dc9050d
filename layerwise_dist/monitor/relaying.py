# SPDX-License-Identifier: Apache-2.0
"""The monitor's Transport: passes what it hears on to its training process, and carries that one's messages."""

from __future__ import annotations

import threading
from collections.abc import Callable

from layerwise_dist.commit.messages import DecidedOfTraining, SaidOfTraining, ToCoordinator, ToRanks
from layerwise_dist.commit.transports import CoordinatorHandler, Handler, Transport
from layerwise_dist.monitor.messages import Asked, Heard, Lost

Told = Heard | Asked | Lost

# About boundaries, which a monitor does not pass: only its training process may answer.
_OF_BOUNDARIES = ("grant", "hold", "meet")


def wrapped(message: ToCoordinator) -> SaidOfTraining:
    """Of a training process to that of rank 0, which decides, not the coordinator."""
    return {"t": "of training", "m": message}


def wrapped_decision(message: ToRanks) -> DecidedOfTraining:
    """Of rank 0's training process to the others."""
    return {"t": "of training", "m": message}


class RelayingTransport:
    """Another Transport, and a training process that hears all of it but what monitors agree on among themselves."""

    def __init__(self, transport: Transport, tell: Callable[[Told], None]) -> None:
        self.rank, self.world_size = transport.rank, transport.world_size
        self._transport, self._tell = transport, tell
        self._lock = threading.Lock()
        self._early: list[Told] | None = []  # for a training process that does not listen yet

    def listen(self) -> None:
        """The training process hears from now on, and what it has missed."""
        with self._lock:
            early, self._early = self._early or [], None
            for message in early:
                self._tell(message)

    def start(
        self, on_message: Handler, on_coordinator_message: CoordinatorHandler | None, on_error: Callable[[str], None]
    ) -> None:
        def heard(message: ToRanks) -> None:
            if message["t"] == "of training":
                self._pass_on({"t": "heard", "m": message["m"]})
                return
            if message["t"] not in _OF_BOUNDARIES:
                on_message(message)  # first: what the training process answers must find it done
            if message["t"] != "agreed":
                self._pass_on({"t": "heard", "m": message})

        def asked(message: ToCoordinator) -> None:
            if message["t"] == "of training":
                self._pass_on({"t": "asked", "m": message["m"]})
                return
            assert on_coordinator_message is not None
            on_coordinator_message(message)
            if message["t"] == "closed" or message["t"] == "gone":
                self._pass_on({"t": "asked", "m": message})

        def lost(why: str) -> None:
            on_error(why)
            self._pass_on({"t": "lost", "why": why})

        self._transport.start(heard, asked if on_coordinator_message is not None else None, lost)

    def post(self, message: ToCoordinator) -> None:
        self._transport.post(message)

    def announce(self, message: ToRanks) -> None:
        self._transport.announce(message)

    def close(self, timeout_s: float) -> None:
        self._transport.close(timeout_s)

    def _pass_on(self, message: Told) -> None:
        with self._lock:
            if self._early is not None:
                self._early.append(message)
            else:
                self._tell(message)
