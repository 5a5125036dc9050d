# SPDX-License-Identifier: Apache-2.0
"""The end of an iteration: seals what is open, and does what all ranks do together there."""

from __future__ import annotations

from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.last_step import LastStep
from layerwise_dist.engine.meetings import Meetings
from layerwise_dist.engine.pacing import Pacing
from layerwise_dist.engine.rehearsing import Rehearsal
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.engine.trace import Tracing
from layerwise_dist.errors import BoundaryError
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.mark import BoundaryMark
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.scheduler import LayerwiseCheckpointScheduler


class BoundaryHandler:
    """What a `Boundary` calls. Belongs to the training thread."""

    def __init__(
        self, captures: Captures, meetings: Meetings, *, optimizer: OptimizerAdapter, objects: StateObjects,
        scheduler: LayerwiseCheckpointScheduler, statistics: Statistics, tracing: Tracing, last: LastStep,
        pacing: Pacing, rehearsal: Rehearsal | None,
    ) -> None:  # fmt: skip
        self._captures, self._meetings, self._pacing = captures, meetings, pacing
        self._optimizer, self._objects, self._scheduler = optimizer, objects, scheduler
        self._statistics, self._tracing, self._last = statistics, tracing, last
        self._rehearsal = rehearsal
        self._count = 0
        self._scales: list[float] = []  # of the last boundary, if it had no update

    def passed(self, mark: BoundaryMark) -> None:
        """An iteration has ended. Raises BoundaryError within an accumulation window, and as
        `Meetings.pass_boundary`.
        """
        if self._optimizer.mid_window:
            raise BoundaryError(
                "an iteration ended within an accumulation window: steps() counts windows, so all micro-batches of "
                "one belong in its body; a loop over micro-batches calls explicit() before it and end_step() at the "
                "end of its body"
            )
        self._tracing.end_if_complete()
        self._count += 1
        patience_s = self._last.over()
        self._statistics.passed(mark.step)
        due = self._scheduler.due(mark.step)
        self._last.unsaved &= not (due and mark.updated)
        compared = due and self._captures.compare_replicas()
        here = compared or self._optimizer.several or self._last.closing
        if here and self._captures.open is None and mark.updated and due:
            # Which update is an iteration's last is known here only. Each optimizer's part is then captured once.
            with self._statistics.stall("open"):
                self._captures.begin(mark.step, patience_s=patience_s)
        if self._captures.open is not None:
            self._captures.seal(mark)
        elif not mark.updated and due:
            self._scheduler.postpone()
        if self._tracing.step is not None:
            self._tracing.step.sealed()
        self._scales = self._scales_now() if not mark.updated else []
        self._meetings.pass_boundary(self._count, mark, attempted=due and mark.updated)
        self._pacing.passed(self._count, mark.step, self._statistics.captures)
        if self._rehearsal is not None:
            self._rehearsal.passed(mark)

    def excuses(self) -> bool:
        """Whether a GradScaler explains a boundary without an update: it saw an overflow and lowered its scale."""
        return any(now < before for now, before in zip(self._scales_now(), self._scales, strict=False))

    def _scales_now(self) -> list[float]:
        return [scaler.get_scale() for scaler in self._objects.scalers]
