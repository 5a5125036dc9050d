# SPDX-License-Identifier: Apache-2.0
"""What all jobs of a run have in common: time, chance, and the nodes with a disk each."""

from __future__ import annotations

import random
from collections import Counter, deque

from kit.commit_model.disk import Disk, Witness

# Seconds: an attempt's deadline; the slowest message; the longest jump in time.
TIMEOUT, DELAY, TICK = 10.0, 1.0, 2.0


class World:
    """Everything in it that is open is drawn from the seed. `now` is seconds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.now = 0.0
        self.world_size = self.dice.choice([1, 2, 2, 3, 4])
        self.keep_last = self.dice.choice([1, 1, 2, 3])
        self.places = self._divide()
        self.disks: list[Disk] = []  # by place, from `furnish` on
        self.count: Counter[str] = Counter()
        self.trace: deque[str] = deque(maxlen=60)

    def furnish(self, witness: Witness) -> None:
        """With disks, of which the witness is told everything."""
        self.disks = [Disk(place, witness) for place in range(len(self.places))]

    def _divide(self) -> list[list[int]]:
        """Most often all ranks share one directory; else each node has its own."""
        ranks = list(range(self.world_size))
        if self.dice.random() < 0.6 or self.world_size == 1:
            return [ranks]
        cuts = sorted(self.dice.sample(range(1, self.world_size), self.dice.randrange(1, self.world_size)))
        return [ranks[a:b] for a, b in zip([0, *cuts], [*cuts, self.world_size], strict=True)]

    def disk_of(self, rank: int) -> Disk:
        return next(self.disks[number] for number, place in enumerate(self.places) if rank in place)

    def unlock(self) -> None:
        for disk in self.disks:
            disk.locks.clear()
