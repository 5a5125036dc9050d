# SPDX-License-Identifier: Apache-2.0
"""The parts of an engine, made and joined for one rank. Each knows those made before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.capture.sealed import Sealer
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.coordinator_thread import CoordinatorThread
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import SessionInfo
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import CommitRequests
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine import at_exit
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.boundaries import BoundaryHandler
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.closing import Closing
from layerwise_dist.engine.holdings import Holdings
from layerwise_dist.engine.hooks import Hooks
from layerwise_dist.engine.last_step import LastStep
from layerwise_dist.engine.lent import Loan, lend
from layerwise_dist.engine.meetings import Meetings
from layerwise_dist.engine.notices import Notices
from layerwise_dist.engine.pacing import Pacing
from layerwise_dist.engine.preemption import Preemption
from layerwise_dist.engine.rehearsing import Rehearsal
from layerwise_dist.engine.replicas import Replicas
from layerwise_dist.engine.restores import Restores
from layerwise_dist.engine.saves import Saves
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.engine.trace import Tracing
from layerwise_dist.engine.training_thread import TrainingThread
from layerwise_dist.engine.updates import UpdateHandler
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.boundary import Boundary
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.restore.restorer import Restorer
from layerwise_dist.scheduler import BLOCKS_A_BATCH, LayerwiseCheckpointScheduler
from layerwise_dist.storage.protocols import ShardWriterAdapter
from layerwise_dist.telemetry.opening import open_telemetry

log = logging.getLogger("layerwise_dist")


class Workings:
    """Of one engine, from the constructor until `closing.end()`.

    Events come in from the optimizer's adapter (`UpdateHandler`), the model (`Hooks`) and the loop (`boundary`);
    everything after a seal runs in the background.
    """

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, config: LayerwiseConfig, objects: StateObjects, *,
        adapter: ShardWriterAdapter, manager: CheckpointMetadataManager, info: SessionInfo, participant: Participant,
        committer: CommitRequests | None, coordinator: CoordinatorThread | None, fresh: bool,
        preemption: Preemption | None, replicas: Replicas, loan: Loan | None = None,
        rehearsal: Rehearsal | None = None, boards: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """With `loan`, `framework`, `optimizer` and `objects` are of it. `boards`: as `telemetry.boards` opens them.

        Raises what the branch record of `fresh` raises, and leaves nothing hooked then.
        """
        self.config, self.framework, self.optimizer, self.objects = config, framework, optimizer, objects
        self.adapter, self.manager, self.info = adapter, manager, info
        self.participant, self.committer, self.preemption = participant, committer, preemption
        self.statistics, self.tracing = Statistics(), Tracing()
        thread = TrainingThread()
        scheduler = LayerwiseCheckpointScheduler(
            every_n_steps=None if config.every_n_steps == "auto" else config.every_n_steps,
            batch_bytes=BLOCKS_A_BATCH * config.writer.block_kb << 10,
        )
        self.pacing = Pacing(config, participant, scheduler)
        last = self.last = LastStep(config, scheduler)
        self.surveyor = Surveyor(framework, optimizer, config.captured_by, scheduler.arrange, bases=not adapter.pooled)
        self.attempts = Attempts(
            config, framework.rank, self.surveyor, scheduler, adapter, participant,
            epoch=info.epoch, first_seq=info.first_seq,
        )  # fmt: skip
        self.frozen = FrozenBases(adapter, always=config.audit == "always", timeout_s=config.fence_timeout_s)
        sealer = Sealer(framework, optimizer, objects)
        restorer = Restorer(
            framework, optimizer, manager=manager, adapter=adapter, participant=participant,
            objects=objects,
        )  # fmt: skip
        self.captures = Captures(
            self.attempts, participant, committer=committer, optimizer=optimizer, surveyor=self.surveyor,
            scheduler=scheduler, replicas=replicas, frozen=self.frozen, sealer=sealer, statistics=self.statistics,
            tracing=self.tracing, last=last, pacing=self.pacing, thread=thread,
            updates=0 if loan is None else loan.updates,
        )  # fmt: skip
        participant.judge_by(self.captures.settle)
        self.notices = Notices(config.path, info.epoch)
        participant.tell(self.notices)
        meetings = Meetings(
            self.captures, self.attempts, participant, preemption, self.statistics, patience_s=config.fence_timeout_s,
            # Where all leave, a boundary ends what is made below; and that ends the boundary.
            end=lambda limit_s: self.closing.end(orderly=False, limit_s=limit_s),
        )  # fmt: skip
        if loan is not None:
            self.boundary = loan.boundary
        else:
            handler = BoundaryHandler(
                self.captures, meetings, optimizer=optimizer, objects=objects, scheduler=scheduler,
                statistics=self.statistics, tracing=self.tracing, last=last, pacing=self.pacing, rehearsal=rehearsal,
            )  # fmt: skip
            self.boundary = Boundary(
                handler.passed, objects.taps, log=log, excuse=handler.excuses, several=optimizer.several,
                by_call=config.every_n_steps is None, on_last=last.begins if last.wanted else None,
            )  # fmt: skip
        self.restores = Restores(
            config, restorer, self.captures, self.boundary, attempts=self.attempts, manager=manager,
            participant=participant, committer=committer, optimizer=optimizer, surveyor=self.surveyor,
            replicas=replicas, frozen=self.frozen, sealer=sealer, statistics=self.statistics, last=last,
            pacing=self.pacing, empty=info.empty, fresh=fresh,
        )  # fmt: skip
        updates = UpdateHandler(
            config, self.captures, self.boundary, attempts=self.attempts, restores=self.restores, optimizer=optimizer,
            scheduler=scheduler, replicas=replicas, frozen=self.frozen, participant=participant,
            statistics=self.statistics, tracing=self.tracing, last=last, rehearsal=rehearsal,
        )  # fmt: skip
        hooks = Hooks(framework, optimizer, updates, self.captures, self.boundary, thread, rehearsal)
        self.closing = Closing(
            config, self.captures, self.boundary, hooks=hooks, framework=framework, optimizer=optimizer,
            objects=objects, surveyor=self.surveyor, attempts=self.attempts, frozen=self.frozen, adapter=adapter,
            manager=manager, participant=participant, coordinator=coordinator, preemption=preemption,
            tracing=self.tracing, last=last, thread=thread, notices=self.notices, statistics=self.statistics,
        )  # fmt: skip
        self.saves = Saves(
            self.captures, self.boundary, attempts=self.attempts, participant=participant, committer=committer,
            optimizer=optimizer, meetings=meetings, restores=self.restores, closing=self.closing,
            timeout_s=config.commit.timeout_s,
        )  # fmt: skip

        def pool() -> tuple[int, int, int] | None:
            buffers = adapter.buffers
            return None if buffers is None else (buffers.capacity, buffers.in_use, buffers.peak)

        self.telemetry = self.statistics.telemetry = open_telemetry(
            config, boards, rank=framework.rank, world_size=participant.world_size, framework=framework.name,
            epoch=info.epoch, passed=lambda: self.statistics.newest, pool=pool,
        )  # fmt: skip
        if self.telemetry is not None:
            participant.show(self.telemetry)
        try:
            if rehearsal is not None:
                rehearsal.begin(framework, optimizer, objects, self.captures, participant)
            hooks.register()
            if fresh and not info.empty:
                self.restores.follow(None, new_branch=True)
        except BaseException:
            hooks.remove()
            self.boundary.close(seal=False)
            self.statistics.close(1.0)
            raise
        holdings = Holdings(framework, optimizer, objects.loaders) if loan is None else None
        at_exit.opened(self.closing, holdings, config.path)

    def lend(self) -> Loan:
        """For one checkpoint in another directory."""
        return lend(self.framework, self.optimizer, self.objects, self.boundary, self.captures.updates)
