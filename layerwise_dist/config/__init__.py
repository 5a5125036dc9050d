# SPDX-License-Identifier: Apache-2.0
"""What users set: one model for the ds_config block, a JSON file and keyword arguments (docs/configuration.md)."""

from layerwise_dist.config.model import BLOCK, LayerwiseConfig, load_config
from layerwise_dist.config.parts import CommitConfig, IntervalConfig, PreemptionConfig, TelemetryConfig, WriterConfig

__all__ = [
    "BLOCK", "CommitConfig", "IntervalConfig", "LayerwiseConfig", "PreemptionConfig", "TelemetryConfig", "WriterConfig",
    "load_config",
]  # fmt: skip
