# SPDX-License-Identifier: Apache-2.0
"""The best evaluation of a run: tags its checkpoint, and loads its weights at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from layerwise_dist.errors import ConfigError
from layerwise_dist.integrations.trainer_progress import Best

BEST = "best"


class BestMetric:
    """Which of a Trainer's evaluations is the best."""

    def __init__(self, trainer: Any, name: str, greater: bool | None) -> None:
        """`name` with or without "eval_"; `greater`: whether greater is better, if that was said."""
        self._trainer = trainer
        self.name = name if name.startswith("eval_") else f"eval_{name}"
        if greater is None:
            greater = trainer.args.greater_is_better
        self.greater = not self.name.endswith("loss") if greater is None else greater

    def value(self, metrics: Mapping[str, Any]) -> float | None:
        """Rank 0's, on all ranks; None of another one of several sets of data. Raises ConfigError."""
        if self.name not in metrics:
            if isinstance(self._trainer.eval_dataset, dict):
                return None
            raise ConfigError(f"best_metric: an evaluation gives {sorted(metrics)}, but not {self.name!r}")
        value = torch.tensor(float(metrics[self.name]), dtype=torch.float64, device=self._trainer.args.device)
        if dist.is_initialized():
            dist.broadcast(value, 0)
        return value.item()

    def better(self, value: float, than: Best | None) -> bool:
        if than is None:
            return value == value  # no NaN
        return value > than["value"] if self.greater else value < than["value"]
