# SPDX-License-Identifier: Apache-2.0
"""Which keys all ranks must set alike. `attach()` compares them before anything is made (engine/same_config.py).

A key is named as in messages: `keep_last`, `writer.queue_depth`.
"""

from __future__ import annotations

from pydantic import BaseModel

from layerwise_dist.config.model import LayerwiseConfig

MEETING = frozenset({"enabled", "mode", "commit.transport"})
"""How ranks find each other: where these differ, some of them wait for ranks that never come."""

SAME = MEETING | {
    # Which steps are saved, and what becomes of them.
    "every_n_steps", "interval.max_overhead", "interval.mtbf_s", "interval.min_steps", "interval.max_steps",
    "save_last", "keep_last", "keep_every_n_steps", "keep_tags", "max_in_flight", "when_full", "fence_timeout_s",
    # What is saved, and how the ranks update and compare it.
    "update", "replicas", "replica_drift", "hash", "file_mode",
    # How they decide together, and how they leave.
    "commit.timeout_s", "commit.on_failure", "commit.raise_after", "preemption.enabled", "preemption.grace_s",
}  # fmt: skip
"""Where one rank differs, steps are skipped, committed late, or kept by a rule that half of the job does not know."""

OWN = frozenset({
    # Nodes may have disks and memory of their own, and a rank may hold more than another.
    "dir", "pool_mb", "capture", "audit", "writer.backend", "writer.queue_depth", "writer.block_kb", "writer.recycle",
    "writer.huge_pages", "writer.direct_io", "reader.direct_io",
    # What one process tells its node, or whoever started it.
    "telemetry.events", "telemetry.tensorboard", "telemetry.prometheus_port", "telemetry.prometheus_host",
    "preemption.exit_code",
})  # fmt: skip
"""Each rank acts on its own value, and the checkpoint is the same."""


def values(config: BaseModel) -> dict[str, object]:
    """Every key with its value."""
    found: dict[str, object] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found |= {f"{name}.{key}": inner for key, inner in values(value).items()}
        else:
            found[name] = value
    return found


def common(config: LayerwiseConfig) -> dict[str, str]:
    """What must be the same on all ranks, each value as text."""
    return {key: repr(value) for key, value in values(config).items() if key in SAME}
