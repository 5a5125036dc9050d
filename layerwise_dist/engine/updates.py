# SPDX-License-Identifier: Apache-2.0
"""An optimizer's update: fences what it will overwrite, and captures what it leaves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.capture.survey import Survey
from layerwise_dist.commit.participant import Participant
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.last_step import LastStep
from layerwise_dist.engine.rehearsing import Rehearsal
from layerwise_dist.engine.replicas import Replicas
from layerwise_dist.engine.restores import Restores
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.engine.trace import Tracing
from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.optimizers import OptimizerAdapter, UpdateEvents
from layerwise_dist.loop.boundary import Boundary
from layerwise_dist.scheduler import LayerwiseCheckpointScheduler


@dataclass(slots=True)
class Update:
    """One update of an optimizer. `again`: an earlier one of this iteration has opened the attempt already. `layers`:
    the only ones that it can change, or None.
    """

    again: bool
    layers: Collection[str] | None = None
    fenced: bool = False  # all of it
    asked: bool = False  # whether the attempt can be opened before the update is over
    found: Survey | None = None  # what there was then, if all of it was where the last attempt had it
    early: bool = False  # it was, or could not be
    drained: bool = False


class UpdateHandler(UpdateEvents):
    """What an optimizer's adapter tells of its updates. Belongs to the training thread."""

    def __init__(
        self, config: LayerwiseConfig, captures: Captures, boundary: Boundary, *, attempts: Attempts,
        restores: Restores, optimizer: OptimizerAdapter, scheduler: LayerwiseCheckpointScheduler, replicas: Replicas,
        frozen: FrozenBases, participant: Participant, statistics: Statistics, tracing: Tracing, last: LastStep,
        rehearsal: Rehearsal | None,
    ) -> None:  # fmt: skip
        self._config, self._captures, self._boundary = config, captures, boundary
        self._attempts, self._restores, self._optimizer, self._scheduler = attempts, restores, optimizer, scheduler
        self._replicas, self._frozen, self._participant = replicas, frozen, participant
        self._statistics, self._tracing, self._last = statistics, tracing, last
        self._rehearsal = rehearsal
        self._update: Update | None = None

    def update_starting(self, *, in_closure: bool = False, layers: Collection[str] | None = None) -> None:
        """An update begins. Raises BoundaryError or DamageError where what there is must not be trained on, and
        UnsupportedError where it is captured in a CUDA graph.
        """
        _refuse_graph()
        self._boundary.update_starting(in_closure=in_closure)
        if not in_closure:
            self._restores.check_ready()
            if self._rehearsal is not None:
                self._rehearsal.updating()
            with self._statistics.stall("fence"):
                self._frozen.before_update(lambda: self._optimizer.trained)
            self._update = Update(self._captures.open is not None, layers)

    def before_closure(self, layers: Collection[str] | None = None) -> None:
        """Fences what is sealed, though the closure has yet to run."""
        with self._statistics.stall("fence"):
            self._captures.fence(layers)

    def wants_layers(self) -> bool:
        """Whether the update that comes had better go layer by layer: it is saved, or what is read in place is in its
        way.
        """
        return self.wanted() or not all(capture.settled for capture in self._captures.sealed)

    def wanted(self) -> bool:
        """Whether what the running update leaves is to be saved."""
        return self._scheduler.due(self._boundary.completed + 1)

    def overwriting(self, layers: Collection[str] | None = None) -> None:
        """What is leased of these layers, or of all, is written or copied away; else its attempt ends."""
        update, captures = self._update, self._captures
        assert update is not None, "update_starting() comes first"
        if update.fenced:
            return
        update.fenced = layers is None
        layers = update.layers if layers is None else layers
        if self._tracing.step is not None:
            self._tracing.step.overwriting(layers)
        if not captures.sealed and not update.again:
            return  # as nearly always in an update that goes unit by unit
        with self._statistics.stall("fence"):
            captures.fence(layers)
            if update.again and not update.drained and captures.open is not None:
                update.drained = captures.guarded(captures.open, captures.open.drain)

    def updated(self, layers: Collection[str]) -> None:
        """These layers change no more in this update: what is complete of a due checkpoint is captured at once."""
        update, captures = self._update, self._captures
        assert update is not None, "update_starting() comes first"
        if self._tracing.step is not None:
            self._tracing.step.updated(layers)
        if update.again or self._optimizer.several or not layers or not self._replicas.agreed:
            return
        with self._statistics.stall("open"):
            if not update.asked:
                update.asked = True
                captures.heed_replicas()
                step = self._boundary.completed + 1
                update.found = self._attempts.steady() if self._scheduler.due(step) else None
                if update.found is not None and captures.in_place and self._may_wait_for_room:
                    update.early = True
                    captures.begin_early(step, update.found)
            if captures.open is not None:
                captures.take(self._scheduler.updated(layers))

    def update_done(self, *, applied: bool) -> None:
        """Opens an attempt, if one is due, or captures again what an earlier update of this iteration had opened."""
        update, self._update = self._update, None
        captures = self._captures
        assert update is not None, "update_starting() comes first"
        if not update.fenced:
            with self._statistics.stall("fence"):
                captures.fence(update.layers)
        self._statistics.update_over()
        if self._tracing.step is not None:
            self._tracing.step.update_done()
        if not applied:
            self._boundary.update_skipped()
            return
        captures.updates += 1
        self._last.unsaved = True
        self._boundary.update_done()
        step = self._boundary.completed + 1
        with self._statistics.stall("open"):
            if update.again:
                if captures.open is not None and update.drained:
                    captures.guarded(captures.open, captures.open.take_all)
                return
            if captures.open is None and not update.early and self._may_begin and self._scheduler.due(step):
                captures.begin(step, patience_s=self._last.patience_s, expected=update.found)
            elif captures.open is not None:
                captures.take(self._scheduler.flush())

    @property
    def _may_wait_for_room(self) -> bool:
        """Whether an attempt may be opened before its update is over. In a backward other ranks may wait for this one,
        and room for their verdicts: then only if there is room at once.
        """
        alone = self._config.update != "in_backward" or self._participant.world_size == 1
        return alone or self._participant.in_flight < self._config.max_in_flight

    @property
    def _may_begin(self) -> bool:
        """Whether an update that is due opens its checkpoint; else the boundary does."""
        return self._replicas.agreed and not self._optimizer.several


def _refuse_graph() -> None:
    """A replay runs no Python: neither the fence before what it overwrites, nor the capture of what it leaves."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "optimizer.step() is being captured in a CUDA graph: its replays can't be seen, so checkpoints would be "
            "torn. Capture forward and backward only (torch.cuda.make_graphed_callables, or torch.compile of the "
            "model), and call optimizer.step() in each iteration"
        )
