# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed engine as a framework: ZeRO's flat masters and optimizer state as named slices, its updates as events."""

from layerwise_dist.frameworks.deepspeed.adapter import DeepSpeedOptimizer
from layerwise_dist.frameworks.deepspeed.framework import DeepSpeedFramework
from layerwise_dist.frameworks.deepspeed.groups import param_groups
from layerwise_dist.frameworks.deepspeed.support import accumulating, config_block, is_engine

__all__ = [
    "DeepSpeedFramework", "DeepSpeedOptimizer", "accumulating", "config_block", "is_engine", "param_groups",
]  # fmt: skip
