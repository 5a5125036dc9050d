# SPDX-License-Identifier: Apache-2.0
"""layerwise_dist: checkpoints of distributed training, at every step, that survive any crash.

    ckpt = layerwise_dist.attach(model, optimizer, config="layerwise.json", state={"scheduler": scheduler})
    ckpt.restore()
    for step in ckpt.steps(total):
        ...
    ckpt.close()

docs/quickstart.md continues from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerwise_dist import errors, unattached
from layerwise_dist._version import __version__
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.supervision import logs

if TYPE_CHECKING:
    from layerwise_dist.commit.metadata import CheckpointMetadataManager
    from layerwise_dist.config import LayerwiseConfig
    from layerwise_dist.engine.assembly import attach
    from layerwise_dist.engine.engine import LayerwiseEngine
    from layerwise_dist.frameworks.averaging import register_comm_hook
    from layerwise_dist.frameworks.deepspeed.groups import param_groups
    from layerwise_dist.layers.graph import DependencyGraphBuilder
    from layerwise_dist.layers.optimizer import LayerwiseOptimizer
    from layerwise_dist.reading.checkpoint import Checkpoint, open_checkpoint
    from layerwise_dist.reading.loading import LoadReport, load
    from layerwise_dist.scheduler import LayerwiseCheckpointScheduler
    from layerwise_dist.storage.adapter import PCCheckAdapter
    from layerwise_dist.trainer import LayerwiseCheckpointTrainer

__all__ = [
    "Checkpoint",
    "CheckpointMetadataManager",
    "DependencyGraphBuilder",
    "LayerwiseCheckpointScheduler",
    "LayerwiseCheckpointTrainer",
    "LayerwiseConfig",
    "LayerwiseEngine",
    "LayerwiseError",
    "LayerwiseOptimizer",
    "LoadReport",
    "PCCheckAdapter",
    "__version__",
    "attach",
    "errors",
    "load",
    "open_checkpoint",
    "param_groups",
    "register_comm_hook",
]

_LAZY = {
    "attach": "engine.assembly",
    "DependencyGraphBuilder": "layers.graph",
    "LayerwiseConfig": "config",
    "LayerwiseEngine": "engine.engine",
    "param_groups": "frameworks.deepspeed.groups",
    "register_comm_hook": "frameworks.averaging",
    "Checkpoint": "reading.checkpoint",
    "load": "reading.loading",
    "LoadReport": "reading.loading",
    "open_checkpoint": "reading.checkpoint",
    "CheckpointMetadataManager": "commit.metadata",
    "LayerwiseCheckpointScheduler": "scheduler",
    "LayerwiseCheckpointTrainer": "trainer",
    "LayerwiseOptimizer": "layers.optimizer",
    "PCCheckAdapter": "storage.adapter",
}


logs.keep_words()
unattached.watch()


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for: the command line starts much faster."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """With what is imported when it is asked for."""
    return sorted({*globals(), *__all__})
