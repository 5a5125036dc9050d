# SPDX-License-Identifier: Apache-2.0
"""Which ranks of this job see which files of a checkpoint: all see all in one directory, and on disks of nodes each
sees those of its own node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Sight:
    """Of one commit. A rank sees another's files only if it sees all of them: its shard, and its base if it has one.

    Attributes:
        world_size: of this job.
        saved: how many ranks the checkpoint has.
        seen: by rank of this job, the ranks of the checkpoint whose files it sees; None where all see all.
    """

    world_size: int
    saved: int
    seen: Sequence[frozenset[int]] | None = None

    def sees(self, rank: int, saved: int) -> bool:
        """Whether a rank of this job sees the files of a rank of the checkpoint."""
        return self.seen is None or saved in self.seen[rank]

    def nearest(self, rank: int) -> int:
        """The rank of the checkpoint whose files a rank of this job most likely needs anyway: where parameters are cut
        in the order of ranks, it is that. Of those that it sees, if it sees any.
        """
        guess = rank * self.saved // self.world_size
        if self.seen is None or not self.seen[rank]:
            return guess
        return min(self.seen[rank], key=lambda saved: (abs(saved - guess), saved))

    @cached_property
    def readers(self) -> Sequence[int]:
        """For each rank of the checkpoint, who reads its headers for all. REQUIRES: somebody sees them."""
        if self.seen is None:
            return [saved % self.world_size for saved in range(self.saved)]
        load = [0] * self.world_size
        found = []
        for saved in range(self.saved):
            among = [rank for rank in range(self.world_size) if saved in self.seen[rank]]
            reader = min(among, key=lambda rank: (load[rank], rank))
            load[reader] += 1
            found.append(reader)
        return found

    def read_by(self, rank: int) -> list[int]:
        """The ranks of the checkpoint whose headers a rank of this job reads for all, in order."""
        return [saved for saved, reader in enumerate(self.readers) if reader == rank]
