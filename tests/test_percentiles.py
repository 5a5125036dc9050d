# SPDX-License-Identifier: Apache-2.0
"""Percentiles mean the same wherever they are shown: stats(), watch, report, bench and doctor."""

from __future__ import annotations

import types
from typing import Any

import pytest

from layerwise_dist.bench.commit import _real_row
from layerwise_dist.doctor.findings import of_flushes
from layerwise_dist.doctor.speed import Flushes
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.percentiles import percentile
from layerwise_dist.telemetry import figures

pytestmark = pytest.mark.quick

SECONDS = [n / 1e3 for n in range(100, 0, -1)]  # 1 to 100 ms


def test_nearest_rank_is_exact_for_every_number_of_values() -> None:
    for count in range(1, 1001):
        values = [float(n) for n in range(count, 0, -1)]
        for percent in (1, 50, 99, 100):
            found = percentile(values, percent)
            assert 100 * found >= percent * count > 100 * (found - 1), (count, percent)
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 99)
    assert figures.percentile([], 99) is None


def stats(seconds: list[float]) -> dict[str, float | int]:
    statistics = Statistics()
    statistics._per_checkpoint = seconds
    frozen: Any = types.SimpleNamespace(bytes_written=0, nbytes=0, written=0)
    return statistics.report(
        0,
        0,
        0,
        None,
        frozen,
        newest=None,
        in_flight=0,
        drifts=0,
        audit_s=0.0,
        every_n_steps=1,
        interval_changes=0,
        reads=(0, 0),
    )


def test_stats_watch_report_bench_and_doctor_find_the_same() -> None:
    said = stats(SECONDS)
    assert (said["stall_ms_p50"], said["stall_ms_p99"]) == (pytest.approx(50.5), pytest.approx(99))
    assert (stats([])["stall_ms_p50"], stats([])["stall_ms_p99"]) == (0.0, 0.0)
    assert (figures.median(SECONDS), figures.percentile(SECONDS, 99)) == (0.0505, 0.099)
    found = of_flushes(Flushes(SECONDS, SECONDS), None, None).figures
    assert (found["p50"], found["p99"], found["commit_p50"]) == (0.0505, 0.099, 0.0505)
    assert _real_row(8, [{"checkpoint_s": SECONDS, "all": 1.0}])["committed_p99_s"] == 0.099
