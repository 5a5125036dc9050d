# SPDX-License-Identifier: Apache-2.0
"""A warning for a ds_config with a ``layerwise_checkpoint`` block that nothing reads: DeepSpeed takes it in silence.

It can be seen where this package is imported after DeepSpeed at all, at an engine's first forward. Imports neither.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from typing import Any

log = logging.getLogger("layerwise_dist")
_WATCHED = "_layerwise_watched"
_attached: weakref.WeakSet[Any] = weakref.WeakSet()


def watch() -> None:
    """From now on engines are looked at that DeepSpeed makes, if it is imported."""
    kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    if kind is None or hasattr(kind.__init__, _WATCHED):
        return
    make = kind.__init__

    @functools.wraps(make)
    def watched(engine: Any, *args: Any, **kwargs: Any) -> None:
        make(engine, *args, **kwargs)
        block = getattr(getattr(engine, "_config", None), "_param_dict", {}).get("layerwise_checkpoint")
        if isinstance(block, dict) and block.get("enabled", True):
            _look_at_first_forward(engine)

    setattr(watched, _WATCHED, True)
    kind.__init__ = watched


def attached(engine: Any) -> None:
    """Its block is read, or need not be."""
    _attached.add(engine)


def _look_at_first_forward(engine: Any) -> None:
    def look(module: Any, args: Any) -> None:
        hook.remove()
        if module not in _attached:
            log.warning(
                "ds_config has a layerwise_checkpoint block, and this DeepSpeed engine is checkpointed by nobody: "
                "DeepSpeed does not know the block. Write `import layerwise_dist.deepspeed as deepspeed` in place of "
                "`import deepspeed`, or call layerwise_dist.attach(engine) after deepspeed.initialize()"
            )

    hook = engine.register_forward_pre_hook(look)
