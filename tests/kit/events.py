# SPDX-License-Identifier: Apache-2.0
"""Events as a job would have told them, without the job."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerwise_dist.telemetry.names import FIELDS

BEGAN = 1_700_000_000.0


def event(kind: str, at: float, rank: int = 0, **fields: Any) -> dict[str, Any]:
    """`at`: seconds since the job began. What is not given is null."""
    unknown = set(fields) - set(FIELDS[kind])
    assert not unknown, unknown
    head = {"layerwise": 1, "time": BEGAN + at, "event": kind, "rank": rank}
    return {**head, **dict.fromkeys(FIELDS[kind]), **fields}


def checkpoint(step: int, at: float, rank: int = 0, outcome: str = "committed", **fields: Any) -> dict[str, Any]:
    measured: dict[str, Any] = {
        "state_bytes": 10**9, "shard_bytes": 10**9, "write_s": 1.0, "gb_per_s": 1.0, "staged_s": 0.1, "durable_s": 1.1,
        "committed_s": 1.2, "stall_s": 0.004, "stall_open_s": 0.001, "stall_seal_s": 0.001, "stall_settle_s": 0.0,
        "stall_fence_s": 0.002, "lag_steps": 0, "lag_s": 0.0, "in_flight": 0,
    }  # fmt: skip
    more = measured if outcome == "committed" else {}
    return event(
        "checkpoint", at, rank, **{"step": step, "epoch": 1, "seq": step, "outcome": outcome, **more, **fields}
    )


def start(at: float = 0.0, rank: int = 0, **fields: Any) -> dict[str, Any]:
    return event("start", at, rank, **{"epoch": 1, "world_size": 2, "mode": "direct", "framework": "ddp", **fields})


def write(path: Path, events: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in events))
