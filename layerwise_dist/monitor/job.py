# SPDX-License-Identifier: Apache-2.0
"""The monitor's work for its rank, from the start of a session to its end: directory, writer, coordinator."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from layerwise_dist import _native
from layerwise_dist.commit.messages import ToCoordinator, ToRanks
from layerwise_dist.commit.metadata import ParentRef
from layerwise_dist.commit.opening import PATIENCE_SHARE, SessionInfo
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import BoundaryKind
from layerwise_dist.commit.session import Committer
from layerwise_dist.commit.start import Rules, Session, start_session, start_writer
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.commit.transports.rendezvous import Gather
from layerwise_dist.commit.transports.store import open_store
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import LayerwiseError, UnsupportedError
from layerwise_dist.monitor.holding import StagedShards
from layerwise_dist.monitor.messages import Open, Opened, ToTraining
from layerwise_dist.monitor.relaying import RelayingTransport, wrapped, wrapped_decision
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.writer import open_writer
from layerwise_dist.supervision.patience import stuck_calls

log = logging.getLogger("layerwise_dist")


class MonitoredJob:
    """Belongs to the monitor's main thread, but for `orphaned`.

    Attributes:
        holder: takes what is staged; None before `open`.
    """

    def __init__(
        self, config: LayerwiseConfig, rank: int, world_size: int, gather: Gather, tell: Callable[[ToTraining], None]
    ) -> None:
        """Collective, with the monitors of the other ranks. Raises CommitError."""
        self._config, self._rank, self._tell = config, rank, tell
        inner = (
            open_store(rank, world_size, gather, config.commit.timeout_s)
            if world_size > 1
            else LocalTransport(LocalHub(1), 0)
        )
        self._transport = RelayingTransport(inner, tell)
        # What became of checkpoints the training process tells.
        self._participant = Participant(self._transport, timeout_s=config.commit.timeout_s, tells=False)
        self._adapter: PCCheckAdapter | None = None
        self._session: Session | None = None
        self.holder: StagedShards | None = None

    # -- the start ----------------------------------------------------------------------------------------------

    def listen(self) -> None:
        self._transport.listen()

    def open(self, message: Open, trainer: int, memory: int, wake: int) -> Opened:
        """All monitors together: the directory is this session's. What the training process must know of it.

        Raises as `open_session`, and UnsupportedError where not all ranks see one directory; on every rank alike.
        """
        config, participant = self._config, self._participant
        env = _native.PosixEnv()
        session = start_session(
            env, config.path, self._transport, participant, Rules.of(config, message["framework"], message["software"]),
            file_mode=config.file_bits, dir_mode=config.dir_bits,
            who=f"the monitor (pid {os.getpid()}) of pid {trainer} on {socket.gethostname()}", fresh=message["fresh"],
            patience_s=PATIENCE_SHARE * config.commit.timeout_s, monitored=True, check=self._check_shared,
        )  # fmt: skip
        self._session = session

        def begin() -> PCCheckAdapter:
            adapter = open_writer(env, config, self._rank, participant.world_size, participant.broke)
            adapter.allocate_staging_buffer(size_mb=adapter.bounce_bytes / 2**20)  # what is staged lies elsewhere
            return adapter

        adapter = self._adapter = start_writer(participant, begin)
        self.holder = StagedShards(adapter, participant, session.info.epoch, memory, wake, self._tell)
        return {
            "info": asdict(session.info), "direct": adapter.direct, "memory_align": adapter.memory_align,
        }  # fmt: skip

    def _check_shared(self, info: SessionInfo) -> None:
        if not info.shared:
            raise UnsupportedError(
                f"mode = 'monitor': {self._config.path} is not one directory but {len(info.places)} (of ranks "
                f"{str(info.places)[:80]}): all ranks must see one; use mode 'direct' with disks of nodes"
            )

    # -- what the training process says -------------------------------------------------------------------------

    def post(self, message: ToCoordinator) -> None:
        """Of the training process to the coordinator, or to rank 0's."""
        if message["t"] == "failed" and self.holder is not None:
            self.holder.failed(message)
        elif message["t"] == "agree":
            self._transport.post(wrapped(message))
        else:
            self._transport.post(message)

    def announce(self, message: ToRanks) -> None:
        self._transport.announce(wrapped_decision(message))

    @property
    def _committer(self) -> Committer | None:
        return self._session.committer if self._session is not None else None

    def boundary_kind(self, kind: BoundaryKind) -> None:
        if self._committer is not None:
            self._committer.boundary_kind = kind

    def tag(self, seq: int, tag: str) -> None:
        if self._committer is not None:
            self._committer.tag(seq, tag)

    def hold(self, held: bool) -> None:
        if self._committer is not None:
            self._committer.hold(held)

    def follow(self, head: dict[str, Any] | None, branch_seq: int | None) -> tuple[str | None, list[str]]:
        """Raises OSError, InDoubt, OwnerError or DamageError."""
        assert self._committer is not None
        return self._committer.follow(ParentRef.model_validate(head) if head is not None else None, branch_seq)

    # -- the end ------------------------------------------------------------------------------------------------

    def orphaned(self, why: str) -> None:
        """The training process is gone: whoever waits for the directory is told that it will be free."""
        if self._session is not None and self._session.owner is not None:
            try:
                self._session.owner.end()
            except OSError as error:
                log.warning("%s", error)

    def finish(self, timeout_s: float, *, orphaned: str | None = None) -> None:
        """Makes durable what is held, waits for rank 0's decisions, and leaves; rank 0 last.

        `orphaned` is why the training process will say no more: what it had not sealed is discarded for all ranks.
        """
        deadline = time.monotonic() + timeout_s
        if orphaned is not None:
            self._transport.post({"t": "orphaned", "rank": self._rank, "why": orphaned})
            if self.holder is not None:
                self.holder.give_up(orphaned)
        try:
            self._participant.drain(timeout_s, stopped=True)
        except LayerwiseError as error:
            log.warning("rank %d: the monitor exits without a decision: %s", self._rank, error)
        self._participant.close(max(0.1, deadline - time.monotonic()))
        coordinator = self._session.coordinator if self._session is not None else None
        closed = coordinator is None or coordinator.close(max(0.1, deadline - time.monotonic()))
        if self._adapter is not None:
            closed = self._adapter.close(max(0.1, deadline - time.monotonic())) and closed
        if not closed:
            log.warning("rank %d: the monitor exits with the disk busy%s", self._rank, stuck_calls())
