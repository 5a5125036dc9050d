# SPDX-License-Identifier: Apache-2.0
"""Closes an engine: seals or discards what is open, awaits decisions, and releases everything."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.coordinator_thread import CoordinatorThread
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.participant import Participant
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine import at_exit
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.hooks import Hooks
from layerwise_dist.engine.last_step import LastStep
from layerwise_dist.engine.notices import Notices
from layerwise_dist.engine.preemption import FAREWELL_S, Preemption
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.engine.trace import Tracing
from layerwise_dist.engine.training_thread import TrainingThread
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.boundary import Boundary
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.storage.protocols import ShardWriterAdapter
from layerwise_dist.supervision.patience import stuck_calls

log = logging.getLogger("layerwise_dist")

_LAST_S = 1.0  # for blocks that are being written when nothing else is waited for any more


class Closing:
    """Belongs to the training thread, or to any other once that has ended. `closed`: whether it has begun."""

    def __init__(
        self, config: LayerwiseConfig, captures: Captures, boundary: Boundary, *, hooks: Hooks, framework: Framework,
        optimizer: OptimizerAdapter, objects: StateObjects, surveyor: Surveyor, attempts: Attempts,
        frozen: FrozenBases, adapter: ShardWriterAdapter, manager: CheckpointMetadataManager, participant: Participant,
        coordinator: CoordinatorThread | None, preemption: Preemption | None, tracing: Tracing,
        last: LastStep, thread: TrainingThread, notices: Notices, statistics: Statistics,
    ) -> None:  # fmt: skip
        self._config, self._captures, self._boundary, self._hooks = config, captures, boundary, hooks
        self._framework, self._optimizer, self._objects, self._surveyor = framework, optimizer, objects, surveyor
        self._attempts, self._frozen, self._adapter, self._manager = attempts, frozen, adapter, manager
        self._participant, self._coordinator, self._preemption = participant, coordinator, preemption
        self._tracing, self._last, self._thread = tracing, last, thread
        self._notices, self._statistics = notices, statistics
        self.closed = False

    def end(self, *, orderly: bool, limit_s: float = math.inf) -> None:
        """`LayerwiseEngine.close` within `limit_s` seconds. Not `orderly`: as with an exception on its way; raises
        nothing then.
        """
        if self.closed:
            return
        self.closed = True
        at_exit.closed(self)
        deadline = time.monotonic() + min(limit_s, self.patience_s(orderly=orderly))

        def left() -> float:
            return max(0.1, deadline - time.monotonic())

        problem: LayerwiseError | None = None
        try:
            self._thread.take_over()
            try:
                # Where in an iteration the process's exit was asked for is not known: only what had ended is whole.
                self._close_boundary(seal=orderly and not at_exit.begun(), left=left)
            except LayerwiseError as error:
                problem = error  # of the iteration that was open; those before it are waited for all the same
            last = self._attempts.newest if self._captures.open is None else self._attempts.before
            self._captures.give_up("the job ended before this step did")
            self._tracing.end_if_complete(left())
            self._participant.drain(left())
            self._participant.ended()
            if last is not None:
                self._participant.saved(last, left())
        except LayerwiseError as error:
            problem = problem or error
            self._captures.abandon(f"the job ended before it was judged: {error}")
        finally:
            self._let_go(left)
        if problem is not None:
            if orderly:
                raise problem
            log.warning("rank %d: close: %s", self._framework.rank, problem)

    def patience_s(self, *, orderly: bool) -> float:
        """How long the end may wait, in seconds: where all are leaving, almost until the process is ended, since what
        is sealed is the last that there will be.
        """
        timeout = self._config.commit.timeout_s
        if self._preemption is not None and self._preemption.begun:
            return min(timeout, max(0.1, self._preemption.remaining_s - FAREWELL_S / 2))
        return timeout if orderly else min(10.0, timeout)

    def _close_boundary(self, *, seal: bool, left: Callable[[], float]) -> None:
        """Seals the iteration that is open; with `save_last` also saves it, or else the last one, if that is not saved
        yet. A loop whose ends are told by `end_step()` cannot say which is its last: what is saved is the job as it is
        now.
        """
        can = not (self._attempts.ended or self._optimizer.mid_window)
        last = seal and self._last.wanted and self._last.unsaved and can
        if last:
            self._last.closes(left())
        leaving = self._preemption is not None and self._preemption.begun
        if self._boundary.close(seal=seal) or not last or leaving:
            return
        self._captures.compare_replicas()
        step = self._boundary.completed
        self._captures.begin(step, patience_s=min(self._config.fence_timeout_s, left()))
        mark = self._boundary.call()
        if mark is not None and self._captures.open is not None:
            self._captures.seal(mark)

    def _let_go(self, left: Callable[[], float]) -> None:
        """Of the model at once; of threads and the directory within what is `left()`, in seconds."""
        self._hooks.remove()
        self._tracing.detach()
        self._objects.detach()
        self._attempts.close_pages()
        self._framework.detach()
        self._surveyor.forget()
        self._participant.close(left())
        closed = [
            self._coordinator is None or self._coordinator.close(left()),
            self._attempts.close(left()),
            self._frozen.close(left()),
            self._adapter.close(max(_LAST_S, left())),
        ]
        self._captures.let_go()
        self._notices.close(left())
        self._statistics.close(left())
        if not all(closed):
            log.warning(
                "rank %d: close: the disk is busy%s; this process no longer waits for it, and keeps what it uses",
                self._framework.rank, stuck_calls(),
            )  # fmt: skip
        self._manager.env.let_go()
        if self._preemption is not None:
            self._preemption.close()
