# SPDX-License-Identifier: Apache-2.0
"""`save_last`: saves a job's last step, even if it is not due."""

from __future__ import annotations

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.scheduler import LayerwiseCheckpointScheduler


class LastStep:
    """What is known of a job's last step. Belongs to the training thread.

    Attributes:
        wanted: whether the last step is saved.
        closing: whether `close()` saves what it ends.
        patience_s: how long the step that is under way may wait for room, in seconds, since it is the last; None where
            it is not, or where nobody knows: `when_full` then says it.
        unsaved: whether anything was updated since an attempt was last begun, or restored. The same on all ranks: what
            became of an attempt may not be.
    """

    def __init__(self, config: LayerwiseConfig, scheduler: LayerwiseCheckpointScheduler) -> None:
        self._scheduler, self._fence_s = scheduler, config.fence_timeout_s
        self.patience_s: float | None = None
        self.wanted = config.save_last and config.every_n_steps is not None
        self.closing = self.unsaved = False

    def begins(self) -> None:
        """The last iteration of a loop over `steps()` begins."""
        self._scheduler.request()
        self.patience_s = self._fence_s

    def closes(self, patience_s: float) -> None:
        """`close()` saves what it ends, within so many seconds."""
        self._scheduler.request()
        self.closing, self.patience_s = True, min(self._fence_s, patience_s)

    def over(self) -> float | None:
        """The iteration has ended. How long its checkpoint may still wait for room."""
        patience_s, self.patience_s = self.patience_s, None
        return patience_s
