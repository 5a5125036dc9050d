# SPDX-License-Identifier: Apache-2.0
"""What has been written, and what must be left of it: by this the rules are checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerwise_dist.commit.inventory import Inventory
from layerwise_dist.commit.records import Manifest
from layerwise_dist.storage.filenames import AttemptId


@dataclass
class Course:
    """What one job goes on from, and what it has said and done since."""

    epoch: int
    chain: list[int]  # seqs of the commits that it has to keep, as far as retention lets it, oldest first
    descent: set[int]  # seqs of all commits that its next one descends from
    staged: set[int] = field(default_factory=set)  # seqs of attempts, by all ranks
    raised: dict[int, int] = field(default_factory=dict)  # rank: the boundary at which it raised
    meetings: dict[int, bool | None] = field(default_factory=dict)  # by boundary: whether they leave; None: no meeting

    def goes_on_from(self, origin: Origin) -> None:
        self.chain, self.descent = list(origin.chain), origin.descent


@dataclass(frozen=True)
class Origin:
    """A commit that a job or a branch goes on from (nothing, if both are empty): what must stay while nothing follows,
    and all that it descends from, itself too.
    """

    chain: list[int]
    descent: set[int]


class History:
    """Every record that was ever about to be renamed into place, by seq."""

    def __init__(self) -> None:
        self.appeared: dict[int, AttemptId | None] = {}  # None: a branch record
        self.chains: dict[int, list[int]] = {}  # what must be there if this record is the newest
        self.descents: dict[int, set[int]] = {}  # every commit that this record descends from, and itself
        self.bases: dict[int, list[str]] = {}  # what the manifest of that seq refers to, by rank
        self.promised = 0  # the newest record that was announced
        self._next_branch = Origin([], set())

    def attempt(self, seq: int) -> AttemptId:
        """Of a commit."""
        attempt = self.appeared[seq]
        assert attempt is not None
        return attempt

    def origin(self, chosen: Manifest | None, inventory: Inventory) -> Origin:
        """To go on from `chosen`; a branch record that is written next does."""
        self._next_branch = Origin([], set())
        if chosen is not None:
            there = [seq for seq in self.chains[chosen.seq] if seq in inventory.manifests]
            self._next_branch = Origin(there, self.descents[chosen.seq])
        return self._next_branch

    def add_commit(self, course: Course, attempt: AttemptId, bases: list[str]) -> None:
        self.appeared[attempt.seq] = attempt
        self.bases[attempt.seq] = bases
        self.chains[attempt.seq] = [*course.chain, attempt.seq]
        self.descents[attempt.seq] = course.descent = course.descent | {attempt.seq}

    def add_branch(self, seq: int) -> None:
        self.appeared[seq] = None
        self.chains[seq] = list(self._next_branch.chain)
        self.descents[seq] = self._next_branch.descent

    def promise(self, seq: int) -> None:
        """It was said to be durable."""
        self.promised = max(self.promised, seq)

    def forget_above(self, newest: int) -> None:
        """What was not announced, and is lost: its seq is free."""
        for seq in [seq for seq in self.appeared if seq > newest]:
            del self.appeared[seq]
            self.bases.pop(seq, None)
