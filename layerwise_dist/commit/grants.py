# SPDX-License-Identifier: Apache-2.0
"""How far ranks may go: boundaries are granted ahead of them, so that all can stop at one that none has passed.

Pure, as the coordinator is; this is a part of it. Boundaries are counted from the session's start.
"""

from __future__ import annotations

import math

from layerwise_dist.commit.messages import Grant

# Boundaries that ranks may pass before the coordinator's first word.
FIRST_GRANT = 8
_GRANT_SECONDS = 2.0


class Grants:
    """`now` is seconds of any monotonic clock."""

    def __init__(self, world_size: int, now: float) -> None:
        self._at = [0.0] * world_size
        self._untold = set(range(world_size))  # whose next `at` is awaited
        self._granted = float(FIRST_GRANT) if world_size > 1 else math.inf
        self._pace: tuple[float, float] = (now, 0.0)

    @property
    def last(self) -> int:
        """The boundary that no rank can have passed; -1 if that is any."""
        return -1 if math.isinf(self._granted) else int(self._granted)

    def advance(self, rank: int, boundary: float, now: float) -> list[Grant]:
        """A rank is at this boundary, or has left (infinity). Once every rank has said that it is past half of what is
        granted, more is: the message to all.
        """
        self._at[rank] = max(self._at[rank], boundary)
        self._untold.discard(rank)
        if self._untold or math.isinf(self._granted):
            return []
        slowest = min(self._at)
        if math.isinf(slowest):
            return []
        began, first = self._pace
        rate = (slowest - first) / max(now - began, 1e-3)
        if now - began > 10:
            self._pace = (now, slowest)
        ahead = max(FIRST_GRANT, math.ceil(rate * _GRANT_SECONDS))
        self._granted = max(self._granted, slowest + ahead)
        self._untold = {rank for rank, at in enumerate(self._at) if not math.isinf(at)}
        tell = max(slowest + 1, self._granted - ahead // 2)
        return [{"t": "grant", "b": int(self._granted), "tell": int(tell)}]
