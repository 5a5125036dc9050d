# SPDX-License-Identifier: Apache-2.0
"""What must hold, checked at the moment at which it could break."""

from __future__ import annotations

from collections.abc import Sequence

from kit.commit_model.disk import ROOT, Contents
from kit.commit_model.history import Course, History
from kit.commit_model.world import DELAY, TICK, TIMEOUT, World
from layerwise_dist.commit.common_boundary import Meeting
from layerwise_dist.commit.metadata import Branch, CheckpointMetadataManager, Inventory, Manifest
from layerwise_dist.commit.transports import Message
from layerwise_dist.storage.filenames import AttemptId


class Broken(AssertionError):
    """A rule does not hold."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


class Rules:
    """Is told what the disks are about to do, what the coordinator announces, and what ranks do together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.history = History()
        self.epoch = 0  # of the newest session
        self._course = Course(0, [], set())  # of the newest job

    def begins(self, course: Course) -> None:
        """A job has started."""
        self._course = course

    def is_newest(self, course: Course) -> bool:
        """Whether no other job has taken the directory over since, which removes what it likes."""
        return course.epoch == self.epoch

    # -- what the disks are about to do

    def operation_fails(self, kind: str) -> None:
        self._world.count[f"fault {kind}"] += 1

    def manifest_appears(self, place: int, manifest: Manifest) -> None:
        """A manifest is about to be renamed into place."""
        attempt, appeared = manifest.attempt_id, self.history.appeared
        if attempt.seq in appeared and (place or appeared[attempt.seq] == attempt):
            # Another node's copy, or one that comes back from there.
            need(appeared[attempt.seq] == attempt, f"{attempt}: {appeared[attempt.seq]} has that seq")
            committed = any(disk.durable().has_manifest(attempt) for disk in self._world.disks)
            need(committed, f"{attempt}: published, not committed")
            return
        need(place == 0, f"{attempt} is published before rank 0 has written it")
        bases = [shard.base.attempt for shard in manifest.shards if shard.base is not None]
        assert len(bases) == self._world.world_size
        for rank, base in enumerate(bases):
            disk = self._world.disk_of(rank).durable()
            need(disk.has_shard(attempt, rank), f"{attempt}: a manifest, and rank {rank}'s shard is not durable")
            need(disk.has_base(base, rank), f"{attempt}: a manifest, and rank {rank}'s base is not durable")
        need(attempt.epoch == self.epoch, f"{attempt}: an old epoch commits, the newest is {self.epoch}")
        need(attempt.seq not in appeared, f"{attempt}: a second record of that seq: {appeared.get(attempt.seq)}")
        newer = max(appeared, default=0)
        need(attempt.seq > newer, f"{attempt}: committed after seq {newer}")
        self.history.add_commit(self._course, attempt, bases)

    def branch_appears(self, place: int, seq: int, branch: Branch) -> None:
        if seq in self.history.appeared:
            need(self.history.appeared[seq] is None, f"a second record of seq {seq}")
            return
        need(place == 0, f"branch record {seq} is kept before rank 0 has written it")
        self.history.add_branch(seq)

    def branch_goes(self, place: int, seq: int) -> None:
        """A branch record is about to be removed. The newest tells of which branch newer commits are that are damaged.

        In place 0 a start finds what comes of it; the others' start gets it from there, and finds nothing amiss.
        """
        newest = max(self._world.disks[place].durable().branches, default=0)
        need(place == 0 or seq < newest, f"branch record {seq} goes, the newest in place {place}")

    def shard_goes(self, attempt: AttemptId | None, name: str) -> None:
        """A rank's durable shard is about to be removed, or written over."""
        need(attempt is not None, f"{name} lies in no attempt's folder")
        assert attempt is not None
        self._is_no_checkpoint(attempt, f"{attempt}: {name} goes, and the manifest is")

    def base_goes(self, base: str) -> None:
        """A file of frozen parameters is about to be removed."""
        self._world.count["base goes"] += 1
        for seq, bases in self.history.bases.items():
            if base in bases:
                attempt = self.history.attempt(seq)
                self._is_no_checkpoint(attempt, f"base {base} goes, and the manifest {attempt} is")

    def _is_no_checkpoint(self, attempt: AttemptId, but: str) -> None:
        for disk in self._world.disks:
            for what, contents in (("there", disk.there), ("not gone for good", disk.durable())):
                need(not contents.has_manifest(attempt), f"{but} in place {disk.place} {what}")

    # -- what the coordinator says, and does

    def announced(self, course: Course, message: Message) -> None:
        kind = message["t"]
        if kind == "committed":
            attempt = AttemptId(course.epoch, message["seq"], message["step"])
            durable = all(disk.durable().has_manifest(attempt) for disk in self._world.disks)
            # What a job that was taken over had committed in time may be retired by now.
            need(durable or not self.is_newest(course), f"{attempt} is announced, and its manifest is not durable")
            self.history.promise(message["seq"])
        elif kind == "aborted":
            self._aborted(course, AttemptId(course.epoch, message["seq"], message["step"]), message["reason"])
        elif kind == "staged":
            course.staged.add(message["seq"])

    def _aborted(self, course: Course, attempt: AttemptId, reason: str) -> None:
        self._world.count["abort"] += 1
        for what in ("superseded", "left without", "waited", "keeps the manifests", "ended before"):
            self._world.count[what] += what in reason
        there = any(disk.there.has_manifest(attempt) for disk in self._world.disks)
        need(not there, f"{attempt} is aborted, and its manifest is there")
        given_up = "ended before" in reason and attempt.seq in course.staged
        need(not given_up, f"{attempt} is given up, and had been staged by all")

    def retained(self, course: Course) -> None:
        """What retention leaves: only what was announced counts."""
        if self.is_newest(course):
            known = [seq for seq in course.chain if seq <= self.history.promised]
            self._intact(known, [disk.there for disk in self._world.disks], everywhere=True)
            self._intact(known, [disk.durable() for disk in self._world.disks], everywhere=True)

    # -- what ranks do together

    def raises(self, course: Course, rank: int, boundary: int) -> None:
        course.raised[rank] = boundary
        need(len(set(course.raised.values())) == 1, f"ranks raise at different boundaries: {course.raised}")

    def passes(self, course: Course, rank: int, boundary: int, meeting: Meeting | None) -> None:
        """What a rank was told to do at this boundary, every other one is too; it may also be told to leave alone."""
        if meeting is None or meeting.common:
            what = None if meeting is None else meeting.leave
            said = course.meetings.setdefault(boundary, what)
            need(said == what, f"boundary {boundary}: rank {rank} meets {what}, another {said}")

    def holds_for(self, rank: int, late: float) -> None:
        """Seconds since it promised not to pass a boundary before it hears where all meet."""
        need(late <= TIMEOUT / 2 + 3 * DELAY + 2 * TICK, f"rank {rank} has held for {late:g} s")

    def undecided_for(self, rank: int, step: int, late: float) -> None:
        """Seconds since it staged that step; with several places the keepers have as long again."""
        limit = (1 + (len(self._world.places) > 1)) * TIMEOUT + 3 * DELAY + 2 * TICK
        need(late <= limit, f"rank {rank}: step {step} is not decided after {late:g} s")

    def restores(self, course: Course, chosen: Manifest) -> None:
        """What a restore has chosen is about to be followed."""
        attempt, disks = chosen.attempt_id, self._world.disks
        whole = all(disk.there.has_manifest(attempt) for disk in disks) and self._has_all_files(chosen)
        need(whole or not self.is_newest(course), f"{attempt} is gone, and a restore has chosen it")

    def follows(self, seq: int) -> None:
        """All ranks go on from what this branch record says: whatever nodes are left, none says otherwise."""
        for disk in self._world.disks:
            need(seq in disk.durable().branches, f"branch {seq} is followed, and in place {disk.place} not durable")
        self.history.promise(seq)

    # -- what the directories hold

    def check(self, *, everywhere: bool = False) -> None:
        """One lineage that goes on from what was announced, with all that it must keep; `everywhere`: in each place."""
        inventories = self._inventories()
        for inventory in inventories:
            need(not inventory.damaged, f"damaged: {inventory.damaged}")
        newest, promised = _newest(inventories), self.history.promised
        need(newest >= promised, f"the newest record is {newest}, {promised} was announced")
        if newest:
            need(newest in self.history.chains, f"record {newest} was never written")
            there = [disk.there for disk in self._world.disks]
            self._intact(self.history.chains[newest], there, everywhere=everywhere)
        for place, inventory in enumerate(inventories):
            if everywhere and newest:
                self._right_lineage(inventory, self.history.descents[newest])
            for manifest in inventory.manifests.values():
                self._whole(manifest, place)

    def newest_record(self) -> int:
        """The highest seq of a record in any place; 0 if there is none."""
        return _newest(self._inventories())

    def _inventories(self) -> list[Inventory]:
        found = []
        for disk in self._world.disks:
            try:
                found.append(CheckpointMetadataManager(disk.memory, ROOT).inventory())
            except FileNotFoundError:
                found.append(Inventory({}, {}, {}, []))
        return found

    def _right_lineage(self, inventory: Inventory, mine: set[int]) -> None:
        """What retention took may come back if its flush failed: there can be holes, but nothing from elsewhere."""
        lineage = [manifest.seq for manifest in inventory.lineage()]
        need(set(lineage) <= mine, f"the lineage is {lineage}, of {sorted(mine)}")
        first = max((seq for seq in mine if seq in inventory.manifests), default=None)
        need(lineage[:1] == ([] if first is None else [first]), f"the lineage is {lineage}, of {sorted(mine)}")
        self._damage_brings_nothing_back(inventory, mine)

    def _damage_brings_nothing_back(self, inventory: Inventory, mine: set[int]) -> None:
        """However many of the newest manifests are damaged: what is left of the lineage is of it, or none is named."""
        manifests, damaged = dict(inventory.manifests), dict[str, str]()
        for seq in sorted(manifests, reverse=True):
            damaged[manifests.pop(seq).attempt_id.folder] = "damaged"
            left = Inventory(manifests, inventory.branches, damaged, inventory.unfinished)
            lineage = [manifest.seq for manifest in left.lineage()]
            need(set(lineage) <= mine, f"with damage from {seq} on, {lineage} comes back, not of {sorted(mine)}")
            named = lineage or left.lineage_damage() or left.lost
            need(bool(named) or not mine, f"with damage from {seq} on there is nothing")

    def _whole(self, manifest: Manifest, place: int) -> None:
        attempt = manifest.attempt_id
        there = f"{attempt} has a manifest in place {place}, and not all of its"
        need(self._has_all_shards(attempt, [disk.there for disk in self._world.disks]), f"{there} shards")
        need(self._has_all_bases(manifest.seq), f"{there} bases")

    def _intact(self, chain: list[int], contents: Sequence[Contents], *, everywhere: bool) -> None:
        """The newest of these commits are whole, with a manifest in each place or in any."""
        for seq in chain[-self._world.keep_last :]:
            attempt = self.history.attempt(seq)
            found = [each.has_manifest(attempt) for each in contents]
            kept = (all if everywhere else any)(found) and self._has_all_shards(attempt, contents)
            need(kept, f"{attempt} is among the {self._world.keep_last} newest, and not whole")

    def _has_all_files(self, manifest: Manifest) -> bool:
        there = [disk.there for disk in self._world.disks]
        return self._has_all_shards(manifest.attempt_id, there) and self._has_all_bases(manifest.seq)

    def _has_all_shards(self, attempt: AttemptId, contents: Sequence[Contents]) -> bool:
        places = enumerate(self._world.places)
        return all(contents[place].has_shard(attempt, rank) for place, ranks in places for rank in ranks)

    def _has_all_bases(self, seq: int) -> bool:
        bases = enumerate(self.history.bases[seq])
        return all(self._world.disk_of(rank).there.has_base(base, rank) for rank, base in bases)


def _newest(inventories: Sequence[Inventory]) -> int:
    return max((seq for each in inventories for seq in [*each.manifests, *each.branches]), default=0)
