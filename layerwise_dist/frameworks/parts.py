# SPDX-License-Identifier: Apache-2.0
"""Which parts of a checkpoint a restore takes: all, or what DeepSpeed's `load_checkpoint()` was asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parts:
    """Attributes:
    module_only: parameters, buffers and extra states, and nothing else.
    optimizer: the optimizer's state and hyper-parameters too; never with `module_only`.
    scheduler: the LR scheduler's too; never with `module_only`.
    strict: the names in model and checkpoint are the same. Otherwise what the checkpoint lacks stays as it is, and
        what the model lacks is left.
    """

    module_only: bool = False
    optimizer: bool = True
    scheduler: bool = True
    strict: bool = True

    @property
    def takes_optimizer(self) -> bool:
        return self.optimizer and not self.module_only


WHOLE = Parts()
