# SPDX-License-Identifier: Apache-2.0
"""Medians and percentiles, for the live view and the report alike; None if nothing was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from layerwise_dist import percentiles


def percentile(values: Sequence[float], percent: int) -> float | None:
    """As `percentiles.percentile`."""
    return percentiles.percentile(values, percent) if values else None


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
