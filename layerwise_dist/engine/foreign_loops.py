# SPDX-License-Identifier: Apache-2.0
"""Running loops of other packages: attaching within one is too late.

Such a loop has counted by then where it begins, in local variables that nobody can change: parameters would be those of
step N, and the data those of step 0.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import NamedTuple

from layerwise_dist.errors import BoundaryError


class _Loop(NamedTuple):
    """`module`, `function`: of the loop. `before`: functions that it calls before it knows where it begins."""

    module: str
    function: str
    before: frozenset[str]
    host: str
    way: str


_LOOPS = (
    _Loop(
        "transformers.trainer", "_inner_training_loop", frozenset({"_init_training_state", "_prepare_for_training"}),
        "Trainer.train()", "layerwise_dist.integrations.transformers.attach(trainer, dir=...) before trainer.train()",
    ),
    _Loop(
        "lightning.pytorch.loops.fit_loop", "run", frozenset({"setup_data"}), "Trainer.fit()",
        "Trainer(callbacks=[LayerwiseCheckpoint(dir=...)]) with that of layerwise_dist.integrations.lightning",
    ),
)  # fmt: skip


def check_not_within() -> None:
    """Raises BoundaryError if the caller runs within such a loop (in one of its callbacks, say)."""
    loops = [loop for loop in _LOOPS if loop.module in sys.modules]
    frame: FrameType | None = sys._getframe(1) if loops else None
    inner: set[str] = set()
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
        for loop in loops:
            if name == loop.function and module == loop.module and not loop.before & inner:
                raise BoundaryError(
                    f"attach() within {loop.host}, which has already started: the epoch and the position in the "
                    f"data are decided by now, so a resume would train on other data than the interrupted run. Call "
                    f"{loop.way}"
                )
        inner.add(name)
        frame = frame.f_back
