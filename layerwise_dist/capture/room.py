# SPDX-License-Identifier: Apache-2.0
"""Sizes the pool for bounce buffers, evacuation and staging."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from layerwise_dist.capture.survey import BOUNDARY_LAYER, Survey
from layerwise_dist.errors import ConfigError
from layerwise_dist.storage.gathered import GatheredExtent
from layerwise_dist.tensors.pieces import Batch

log = logging.getLogger("layerwise_dist")

_MIB = 1 << 20
_EVACUATION_SHARE = 25  # of the leased bytes, one part in so many
_MEMORY_SHARE = 4  # of the memory that is available, one part in so many is the most that staging takes by itself


def pool_bytes(
    pool_mb: int | Literal["auto"], bounce: int, survey: Survey, gathered: Mapping[int, GatheredExtent], *,
    max_in_flight: int, pooled: bool = False,
) -> int:  # fmt: skip
    """Bytes of the pool: as configured, or found for this rank's state. `bounce` bytes of it are taken by the writer.

    "auto" is the bounce buffers, and
    - for leases, room to evacuate a twenty-fifth of the leased bytes (at least as much as the bounce buffers), so that
      the fence rarely waits for the disk, at 4 % of extra memory;
    - for staging, all staged layers `max_in_flight` times over, but not more than a quarter of the memory that is
      available now, and never less than the largest layer.

    With `pooled`, what the boundary copies goes through the pool too.

    Raises ConfigError if a staged layer does not fit.
    """
    staged = _staged_bytes(survey, gathered, pooled)
    largest = max(staged, default=0)
    if pool_mb == "auto":
        leased = survey.nbytes - survey.staged_bytes
        staging = max(largest, min(max_in_flight * sum(staged), available_memory() // _MEMORY_SHARE))
        return bounce + max(bounce, leased // _EVACUATION_SHARE) + staging
    _check(pool_mb, bounce, survey, staged)
    return pool_mb * _MIB


def least_pool_bytes(
    bounce: int, survey: Survey, gathered: Mapping[int, GatheredExtent], *, pooled: bool = False
) -> int:
    """Bytes without which some layer can never be staged."""
    return bounce + max(_staged_bytes(survey, gathered, pooled), default=0)


def check_pool(pool_mb: int | Literal["auto"], bounce: int, survey: Survey, *, pooled: bool = False) -> None:
    """What `pool_bytes` will refuse for sure, as far as it can be known before the first update makes the state.

    Raises ConfigError if the tensors that a staged layer has by now do not fit.
    """
    if pool_mb != "auto":
        rest = [sum(piece.slice.nbytes for piece in survey.copied)] if pooled else []
        _check(pool_mb, bounce, survey, [batch.nbytes for batch in _staged(survey)] + rest)


def _check(pool_mb: int, bounce: int, survey: Survey, staged: list[int]) -> None:
    largest = max(staged, default=0)
    if bounce + largest > pool_mb * _MIB:
        names = [*(batch.name for batch in _staged(survey)), BOUNDARY_LAYER]
        name = names[staged.index(largest)]
        raise ConfigError(
            f"pool_mb = {pool_mb}: staging layer {name!r} takes {largest} bytes beside {bounce} bytes of bounce "
            f"buffers "
            f"(writer.queue_depth x writer.block_kb): at least {-(-(bounce + largest) // _MIB)} are needed, or 'auto'"
        )


def _staged_bytes(survey: Survey, gathered: Mapping[int, GatheredExtent], pooled: bool) -> list[int]:
    """Of each staged batch; with `pooled`, then of what the boundary copies."""
    found = [gathered[number].nbytes for number, batch in enumerate(survey.batches) if batch.staged]
    return [*found, gathered[len(survey.batches)].nbytes] if pooled else found


def _staged(survey: Survey) -> list[Batch]:
    return [batch for batch in survey.batches if batch.staged]


def available_memory() -> int:
    """Bytes that this process may still take without swapping: the machine's, or its control group's if less."""
    available = 1 << 62
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        available = min(available, max(0, int(limit[0]) - int(used[0])))
    return available


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
