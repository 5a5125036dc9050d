# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of restores share: a restore, and what it and attach() take beside the reading itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

from layerwise_dist.bench.failure import BenchFailed
from layerwise_dist.bench.figures import Spread
from layerwise_dist.engine.disabled import DisabledEngine
from layerwise_dist.engine.engine import LayerwiseEngine

BESIDE = ("attach()", "restore()", "raw", "the rest")  # headings of `beside`


def restored(engine: LayerwiseEngine | DisabledEngine) -> float:
    """Seconds of a restore of step 1. Raises BenchFailed if it is of another."""
    began = time.perf_counter()
    step = engine.restore()
    took = time.perf_counter() - began
    if step != 1:
        raise BenchFailed(f"restore() returned step {step}, but step 1 was saved")
    return took


def beside(attach_s: Sequence[float], restore_s: Sequence[float], raw_s: Sequence[float]) -> dict[str, Spread]:
    """Of these seconds, round by round, and of what attach() and restore() take together beside raw's."""
    rest_s = [attach + restore - raw for attach, restore, raw in zip(attach_s, restore_s, raw_s, strict=True)]
    parts = {"attach_s": attach_s, "restore_s": restore_s, "raw_s": raw_s, "rest_s": rest_s}
    return {name: Spread.of([*seconds]) for name, seconds in parts.items()}
