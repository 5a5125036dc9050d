# SPDX-License-Identifier: Apache-2.0
"""The stable names of events and measures, with their meaning; docs/telemetry.md has the same."""

from __future__ import annotations

from typing import Final

VERSION: Final = 1  # of the lines; one that means something else by a name here has another

# In each line.
COMMON: Final = {
    "layerwise": "version of the format, 1",
    "time": "when it happened, seconds since 1970",
    "event": "which of the events below",
    "rank": "the rank that tells it",
}

EVENTS: Final = {
    "start": "`attach()` has begun a session",
    "restore": "`restore()` has loaded a checkpoint",
    "checkpoint": "a checkpoint was decided, or given up on this rank",
    "progress": "training has passed a boundary; at most every 10 seconds",
    "stopped": "no checkpoint will be committed any more",
    "end": "the engine is closed",
}

START: Final = {
    "epoch": "number of the session in the directory",
    "world_size": "ranks",
    "host": "name of the machine",
    "pid": "number of the training process",
    "mode": "`mode` of the configuration",
    "framework": "wrapper",
    "every_n_steps": "as configured; null if checkpoints are made only when asked",
    "max_in_flight": "as configured",
    "version": "of layerwise_dist",
}

STEPS: Final = {
    "step": "steps completed",
    "lag_steps": "steps since the newest commit",
    "lag_s": "seconds of training since the newest commit",
}

# Numbers of one checkpoint that TensorBoard and Prometheus have as well.
MEASURES: Final = {
    "state_bytes": "bytes of what this rank captured",
    "shard_bytes": "bytes of this rank's shard",
    "write_s": "seconds until this rank's shard was durable",
    "gb_per_s": "shard_bytes / write_s / 10^9",
    "staged_s": "seconds until it was safe from overwriting on all ranks",
    "durable_s": "seconds until every rank's shard was durable",
    "committed_s": "seconds until its manifest was durable",
    "stall_s": "seconds that it held the training thread, in all",
    "stall_open_s": "of these: opening it and taking layers",
    "stall_seal_s": "of these: sealing it at the boundary",
    "stall_settle_s": "of these: judging what was read in place",
    "stall_fence_s": "of these: waiting before the next update",
    "lag_steps": "steps since the newest commit, when it was decided",
    "lag_s": "seconds of training since the newest commit, when it was decided",
    "in_flight": "other checkpoints that are begun and not decided",
    "pool_bytes": "size of the pool",
    "pool_used_bytes": "bytes of it in use",
    "pool_peak_bytes": "the most bytes of it that were in use",
    "disk_free_bytes": "bytes left on the disk of the directory",
}

CHECKPOINT: Final = {
    "step": "its step",
    "epoch": "number of the session that made it",
    "seq": "its number in the directory",
    "outcome": "committed, failed, skipped, or undecided when the engine closed",
    "reason": "why it failed or was skipped; else null",
    **MEASURES,
    "slowest_rank": "the rank whose shard was durable last; rank 0 tells it, in mode direct",
    "slowest_behind_s": "seconds by which the first rank was earlier",
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
