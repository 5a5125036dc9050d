# SPDX-License-Identifier: Apache-2.0
"""The one rule for percentiles; medians are those of the standard library."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(values: Sequence[float], percent: int) -> float:
    """By nearest rank: the smallest value that at least so many percent of the values do not exceed.

    `percent` is from 1 to 100. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no percentile of nothing")
    return sorted(values)[-(-percent * len(values) // 100) - 1]
