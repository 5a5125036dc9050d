# SPDX-License-Identifier: Apache-2.0
"""Medians and percentiles, for the live view and the report alike; None if nothing was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float | None:
    """By nearest rank: the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
