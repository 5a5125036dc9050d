# SPDX-License-Identifier: Apache-2.0
"""A `restore()` in the middle of a job: all wait at one boundary, rank 0 chooses, and all go on from what it chose."""

from __future__ import annotations

from collections.abc import Callable

from kit.commit_model.disk import ROOT
from kit.commit_model.job import Job
from kit.commit_model.rules import Rules, need
from kit.commit_model.world import World
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory, Manifest
from layerwise_dist.errors import DamageError, OwnerError

Choice = tuple[float, str, Callable[[], None]]  # a weight, a name, and what it does


class Restoring:
    """Of one job, as often as it is drawn."""

    def __init__(self, job: Job, rules: Rules, world: World) -> None:
        self._job, self._rules, self._world = job, rules, world
        self._chosen: Manifest | None = None

    def choices(self) -> list[Choice]:
        ranks = self._job.ranks
        if self._job.script.restores_at is None:
            return [(0.2, "is to restore", self._begin)]
        if not all(rank.may_restore for rank in ranks):
            return [(1.0, "does not restore: a rank is gone", self._end)]
        if not all(rank.waits_to_restore for rank in ranks):
            return []
        if self._chosen is None:
            return [(2.0, "chooses", self._choose)]
        chosen = self._chosen
        return [
            (1.0, f"restores {chosen.attempt_id}", lambda: self._restore(chosen)),
            (0.1, "fails to restore", self._end),
        ]

    def _begin(self) -> None:
        self._job.script.restores_at = max(rank.count for rank in self._job.ranks) + 1

    def _choose(self) -> None:
        """From what is there; what a restore loads is whole on every rank."""
        self._job.committer.hold(True)
        disks = self._world.disks
        try:
            inventory = CheckpointMetadataManager(disks[0], ROOT).inventory()
        except OSError:
            self._end()
            return
        found = [*inventory.lineage()[:1], *inventory.manifests.values()]
        found = [each for each in found if all(disk.there.has_manifest(each.attempt_id) for disk in disks)]
        if found:
            self._chosen = self._world.dice.choice(found)
        else:
            self._end()

    def _restore(self, chosen: Manifest) -> None:
        self._rules.restores(self._job.course, chosen)
        world, history, ranks = self._world, self._rules.history, self._job.ranks
        inventory = CheckpointMetadataManager(world.disks[0].memory, ROOT).inventory()
        branched = not inventory.is_next(chosen) or world.dice.random() < 0.5
        origin = history.origin(chosen, inventory)
        seq = ranks[0].seq
        need({rank.seq for rank in ranks} == {seq}, "ranks do not agree on the next seq")
        try:
            kept = self._follow(chosen, seq if branched else None)
        except (OSError, OwnerError, DamageError):
            for rank in ranks:  # what was loaded follows nothing
                rank.leave("restore()")
        else:
            self._job.course.goes_on_from(origin)
            self._job.script.start = chosen.step - ranks[0].count
            for rank, base in zip(ranks, history.bases[chosen.seq], strict=True):
                rank.restored(chosen.step, base if base in kept and world.dice.random() < 0.8 else None, branched)
            self._tell(chosen, inventory)
        self._end()

    def _follow(self, chosen: Manifest, branch_seq: int | None) -> list[str]:
        """The bases that stay. Raises OSError, OwnerError or DamageError."""
        text, kept = self._job.committer.follow(chosen.ref, branch_seq)
        if text is not None and branch_seq is not None:
            for keeper in (rank.keeper for rank in self._job.ranks if rank.keeper is not None):
                keeper.keep_branch(text)
            self._rules.follows(branch_seq)
        return kept

    def _tell(self, chosen: Manifest, inventory: Inventory) -> None:
        self._world.count["restore"] += 1
        self._world.count["restore of an older one"] += inventory.lineage()[:1] != [chosen]

    def _end(self) -> None:
        self._chosen = self._job.script.restores_at = None
        self._job.committer.hold(False)
