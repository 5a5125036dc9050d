# SPDX-License-Identifier: Apache-2.0
"""`save_last`: saves a job's last step, even if it is not due."""

from __future__ import annotations

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.scheduler import LayerwiseCheckpointScheduler


class LastStep:
    """What is known of a job's last step. Belongs to the training thread.

    Attributes:
        wanted: whether the last step is saved.
        here: whether this iteration is the last of a loop over `steps()`.
        closing: whether `close()` saves what it ends.
        unsaved: whether anything was updated since an attempt was last begun, or restored. The same on all ranks: what
            became of an attempt may not be.
    """

    def __init__(self, config: LayerwiseConfig, scheduler: LayerwiseCheckpointScheduler) -> None:
        self._scheduler = scheduler
        self.wanted = config.save_last and config.every_n_steps is not None
        self.here = self.closing = self.unsaved = False

    def begins(self) -> None:
        """The last iteration of a loop over `steps()` begins."""
        self._scheduler.request()
        self.here = True
