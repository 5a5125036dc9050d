# SPDX-License-Identifier: Apache-2.0
"""The stable names of events and measures, with their meaning; docs/tables/telemetry.md lists the same."""

from __future__ import annotations

from typing import Final

VERSION: Final = 1  # of the line format; it changes if any name here changes its meaning

# In each line.
COMMON: Final = {
    "layerwise": "version of the format, 1",
    "time": "when it happened, seconds since 1970",
    "event": "which of the events below",
    "rank": "the rank that wrote it",
}

PARTS: Final = ("open", "seal", "settle", "fence")  # of a stall

EVENTS: Final = {
    "start": "`attach()` has begun a session",
    "restore": "`restore()` has loaded a checkpoint",
    "checkpoint": "the outcome of a checkpoint is known, or this rank gave up on it",
    "progress": "training has passed a boundary; at most every 10 seconds",
    "stopped": "no more checkpoints will be committed",
    "end": "the engine is closed",
}

START: Final = {
    "epoch": "number of this session in the directory",
    "world_size": "ranks",
    "host": "host name",
    "pid": "process id of the training process",
    "mode": "`mode` of the configuration",
    "framework": "the wrapper",
    "every_n_steps": "as configured; null if checkpoints are made only when asked",
    "max_in_flight": "as configured",
    "version": "version of layerwise_dist",
}

STEPS: Final = {
    "step": "steps completed",
    "lag_steps": "steps since the newest commit",
    "lag_s": "seconds of training since the newest commit",
}

# Numbers of one checkpoint that TensorBoard and Prometheus also get.
MEASURES: Final = {
    "state_bytes": "bytes that this rank captured",
    "shard_bytes": "bytes of this rank's shard",
    "write_s": "seconds until this rank's shard was durable",
    "gb_per_s": "shard_bytes / write_s / 10^9",
    "staged_s": "seconds until it was safe from overwriting on all ranks",
    "durable_s": "seconds until every rank's shard was durable",
    "committed_s": "seconds until its manifest was durable",
    "stall_s": "total seconds that it blocked the training thread",
    "stall_open_s": "part of stall_s: opening it and capturing layers",
    "stall_seal_s": "part of stall_s: sealing it at the boundary",
    "stall_settle_s": "part of stall_s: checking what was read in place",
    "stall_fence_s": "part of stall_s: waiting before the next update",
    "lag_steps": "steps since the newest commit, when the outcome was known",
    "lag_s": "seconds of training since the newest commit, when the outcome was known",
    "in_flight": "other checkpoints in flight",
    "pool_bytes": "size of the pool",
    "pool_used_bytes": "bytes of the pool in use",
    "pool_peak_bytes": "most bytes of the pool in use so far",
    "disk_free_bytes": "bytes free on the disk of the directory, as it last said",
    "disk_free_age_s": "seconds since it said so: they grow while it does not answer",
}

CHECKPOINT: Final = {
    "step": "its step",
    "epoch": "number of the session that made it",
    "seq": "its number in the directory",
    "outcome": "committed, failed, skipped, or undecided when the engine closed",
    "reason": "why it failed or was skipped; else null",
    **MEASURES,
    "slowest_rank": "the rank whose shard was durable last; on rank 0 only, in mode direct",
    "slowest_behind_s": "seconds between the first durable shard and that one",
}

END: Final = {
    "events": "events written before this one, by this rank",
    "lost": "events that could not be written",
}

FIELDS: Final = {
    "start": START,
    "restore": {"step": STEPS["step"]},
    "checkpoint": CHECKPOINT,
    "progress": STEPS,
    "stopped": {"reason": "why"},
    "end": END,
}

OUTCOMES: Final = ("committed", "failed", "skipped", "undecided")
