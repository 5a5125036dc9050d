# SPDX-License-Identifier: Apache-2.0
"""The commit with one of its rules broken, in as many ways as it has rules; each is to be found by the model.

A mutant is a subclass that stands for the class of the engine which it derives from, wherever that is named.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from layerwise_dist.commit.common_boundary import CommonBoundary, Hold
from layerwise_dist.commit.coordinator import Coordinator, Output, Retired
from layerwise_dist.commit.inventory import Inventory
from layerwise_dist.commit.keeper import Keeper
from layerwise_dist.commit.ledger import Action, Discard, Ledger
from layerwise_dist.commit.metadata import Branch, CheckpointMetadataManager, InDoubt, Manifest, Span
from layerwise_dist.commit.opening import Place, StartPlan
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.session import Committer
from layerwise_dist.commit.transports import Message
from layerwise_dist.errors import OwnerError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId


@dataclass(frozen=True)
class BrokenRule:
    """`found_as` is what the model then says, as a regular expression; `seed` begins the runs that are tried.

    Any seed does: one of a run that finds it spares those before. Where the model has changed, others follow on it.
    """

    mutant: type
    found_as: str
    seed: int

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In every module of the engine and of the model."""
        mutant = self.mutant
        original = next(kind for kind in mutant.__mro__ if kind.__module__.startswith("layerwise_dist."))
        members = {name for kind in mutant.__mro__ if issubclass(kind, original) for name in vars(kind)}
        for name in (name for name in members if not name.startswith("__")):
            assert hasattr(original, name), f"{mutant.__name__} overrides {name}, which {original.__name__} has not"
        for place, module in list(sys.modules.items()):
            if place.startswith(("layerwise_dist.", "kit.commit_model.")) and place != __name__:
                for name in [name for name, value in vars(module).items() if value is original]:
                    monkeypatch.setattr(module, name, mutant)


RULES: dict[str, BrokenRule] = {}


def breaks(rule: str, found_as: str, seed: int = 1) -> Callable[[type], type]:
    """The class breaks that rule."""

    def register(mutant: type) -> type:
        RULES[rule] = BrokenRule(mutant, found_as, seed)
        return mutant

    return register


# -- the coordinator --------------------------------------------------------------------------------------------------


@breaks("a manifest needs every rank's shard", found_as="shard is not durable")
class CommitsWithoutOneRank(Coordinator):
    def _has_all_reports(self, attempt: Any) -> bool:
        return len(attempt.reports) >= max(1, self._world_size - 1)

    def _reported(self, attempt: Any) -> tuple[int, int, list[Message]]:
        _, some = max(attempt.reports.items())
        for rank in range(self._world_size):
            attempt.reports.setdefault(rank, {**some, "rank": rank, "file": filenames.shard_file(rank)})
        return super()._reported(attempt)


@breaks("a newer commit aborts older attempts, those that begin later too", found_as="committed after")
class CommitsOlderAttemptsLater(Coordinator):
    def _is_superseded(self, attempt: Any) -> bool:
        return False


@breaks("what all monitors hold is not given up when a training process dies", found_as="had been staged by all")
class GivesUpWhatMonitorsHold(Coordinator):
    def _lose(self, rank: int, why: str, *, orphaned: bool) -> None:
        super()._lose(rank, why, orphaned=orphaned)
        for attempt in list(self._open.values()) if orphaned else ():
            self._abort(attempt, f"rank(s) {rank} ended before they staged it", failure=True)


@breaks(
    "what all monitors hold is not given up because another attempt fails after that",
    found_as="had been staged by all",
    seed=101,
)
class CountsFailuresOfOrphans(Coordinator):
    def _abort(self, *args: Any, **how: Any) -> None:
        orphaned, self._orphaned = self._orphaned, set()
        super()._abort(*args, **how)
        self._orphaned = orphaned


@breaks("an attempt ends at its deadline", found_as="is not decided after")
class WaitsForEver(Coordinator):
    def tick(self, now: float) -> list[Output]:
        deadline, self._timeout_s = self._timeout_s, math.inf
        out = super().tick(now)
        self._timeout_s = deadline
        return out


@breaks("a failed manifest is not announced", found_as="its manifest is not durable")
class AnnouncesWhatFailed(Coordinator):
    def wrote(self, seq: int, problem: OSError | OwnerError | None) -> list[Output]:
        return super().wrote(seq, problem if isinstance(problem, InDoubt | OwnerError) else None)


@breaks("what is in doubt is not aborted", found_as="is aborted, and its manifest is there")
class AbortsWhatIsInDoubt(Coordinator):
    def wrote(self, seq: int, problem: OSError | OwnerError | None) -> list[Output]:
        return super().wrote(seq, OSError(str(problem)) if isinstance(problem, InDoubt) else problem)


@breaks(
    "a session in doubt commits no more", found_as="committed after|not whole|lineage|base .* goes, and the manifest"
)
class CommitsBehindADoubt(Coordinator):
    def _finish(self, reason: str) -> None:
        self._stop(reason)


@breaks("rank 0's manifest is the first", found_as="before rank 0 has written")
class PublishesBeforeRank0(Coordinator):
    def _ask_keepers(self, attempt: Any, what: str, more: Message) -> None:
        super()._ask_keepers(attempt, what, more)
        if what == "prepare":
            self._say({"t": "publish", "seq": attempt.seq, "step": attempt.step})


@breaks("committed is said when every node has the manifest", found_as="its manifest is not durable")
class AsksNobodyToPublish(Coordinator):
    def _ask_keepers(self, attempt: Any, what: str, more: Message) -> None:
        if what == "publish":
            self._committed(attempt)
        else:
            super()._ask_keepers(attempt, what, more)


@breaks("a shard stays while any node keeps the manifest", found_as="goes, and the manifest is in place")
class RetiresWhatKeepersHave(Coordinator):
    def withdrawn(self, attempts: list[AttemptId]) -> list[Output]:
        self._out += map(Retired, attempts)
        return self._taken()


# -- a rank -----------------------------------------------------------------------------------------------------------


@breaks(
    "what is in doubt is not deleted before the decision is read", found_as="goes, and the manifest is in place . there"
)
class DiscardsAtAStop(Ledger):
    def receive(self, message: Message) -> list[Action]:
        discarded = map(Discard, self._undecided.values()) if message["t"] == "stop" else ()
        return [*super().receive(message), *discarded]


@breaks(
    "what is durable everywhere is not deleted before the decision is read",
    found_as="goes, and the manifest is|is not durable",
)
class DiscardsWhatIsDurable(Ledger):
    def receive(self, message: Message) -> list[Action]:
        write = self._undecided.get(message["seq"]) if message["t"] == "durable" else None
        return [*super().receive(message), *([Discard(write)] if write is not None else [])]


@breaks("a stop names one boundary", found_as="raise at different boundaries")
class RaisesAtOnce(Ledger):
    def must_raise(self, count: int) -> str | None:
        return self.stop[1] if self.stop is not None else super().must_raise(count)


# -- meetings ---------------------------------------------------------------------------------------------------------


@breaks("ranks meet where none has been", found_as="meets")
class MeetsAtTheNearest(CommonBoundary):
    def held(self, message: Message) -> list[Message]:
        current = self._open
        said = super().held(message)
        return [{**each, "b": min(current.held.values())} for each in said if current is not None]


@breaks("a boundary that the ranks do not agree on is dropped", found_as="has held for", seed=62)
class NeverGivesUp(CommonBoundary):
    def tick(self, now: float) -> list[Message]:
        return []


@breaks("there is no meeting with a rank that left", found_as="has held for|meets")
class WaitsForWhoLeft(NeverGivesUp):
    def end(self, why: str) -> list[Message]:
        self._impossible = self._impossible or why
        return []


@breaks("a rank that was told to hold does not go on", found_as="meets")
class GoesOnThoughToldToHold(Hold):
    def hold(self, message: Message) -> list[Message]:
        limit = self._limit
        answer = super().hold(message)
        self._limit = limit
        return answer


@breaks("a rank that asked does not go on", found_as="meets")
class GoesOnThoughItAsked(GoesOnThoughToldToHold):
    def ask(self, *, leave: bool, why: str) -> list[Message]:
        limit = self._limit
        said = super().ask(leave=leave, why=why)
        self._limit = limit
        return said


# -- the records of a directory ---------------------------------------------------------------------------------------


@breaks("a shard stays until its manifest is gone for good", found_as="not gone for good")
class WithdrawsWithoutAFlush(CheckpointMetadataManager):
    def withdraw(self, attempt: AttemptId, *, anyway: bool = False) -> None:
        self._unlink(self.manifest_path(attempt))


@breaks("a removal that is in doubt is not done", found_as="not gone for good")
class TakesADoubtForARemoval(CheckpointMetadataManager):
    def withdraw(self, attempt: AttemptId, *, anyway: bool = False) -> None:
        try:
            super().withdraw(attempt, anyway=anyway)
        except InDoubt:
            pass


@breaks("committed is said when the manifest is durable", found_as="not durable|announced|not whole")
class RenamesWithoutAFlush(CheckpointMetadataManager):
    def _into_place(self, folder: str, temporary: str, final: str) -> None:
        self.env.rename(f"{folder}/{temporary}", f"{folder}/{final}")


@breaks("a start removes no base that a manifest refers to", found_as="base .* goes, and the manifest")
class CollectsEveryBase(CheckpointMetadataManager):
    def collect_leftovers(self, inventory: Inventory, kept: Iterable[AttemptId] = ()) -> None:
        super().collect_leftovers(inventory, list(kept))
        for base in inventory.bases:
            self.remove_base(base)


@breaks("a roll back is durable before it is followed", found_as="is followed, and in place 0 not")
class WritesNoBranchRecord(CheckpointMetadataManager):
    def write_branch(self, branch: Branch) -> None:
        pass


@breaks(
    "what a start reads is durable in every place before it collects",
    found_as="not gone for good|not whole|newest record",
)
class FlushesNothingThatItReads(CheckpointMetadataManager):
    def flush_records(self, inventory: Inventory) -> list[AttemptId]:
        return []


@breaks("a branch descends from what it left, and from nothing that came later", found_as="the lineage is")
class DescendsFromEverything(Inventory):
    def spans_after(self, parent: Manifest | None) -> list[Span]:
        return [Span(first=0, last=max(self.manifests))] if parent is not None else []


# -- the other nodes' records -----------------------------------------------------------------------------------------


@breaks("a node that failed has not done what it was asked for", found_as="not durable|not gone for good")
class SaysThatAllIsDone(Keeper):
    def _tried(self, message: Any) -> str | None:
        super()._tried(message)
        return None


@breaks(
    "a roll back is durable on every node before it is followed",
    found_as="is followed, and in place [1-9] not",
    seed=8,
)
class KeepsNoBranchRecord(Keeper):
    def keep_branch(self, text: str) -> None:
        pass


@breaks("the newest branch record stays on every node", found_as="goes, the newest in place [1-9]", seed=8)
class RemovesEveryBranchOfOtherNodes(CheckpointMetadataManager):
    def remove_old_branches(self) -> None:
        for name in self.env.list_dir(self.root):
            if (seq := filenames.parse_branch(name)) is not None:
                self.remove_branch(seq)


# -- who writes there -------------------------------------------------------------------------------------------------


@breaks(
    "an old epoch commits nothing",
    found_as="old epoch commits|committed after|goes, and the manifest|is not durable|comes back",
)
class ChecksNoEpoch(Owner):
    def check(self) -> None:
        pass


@breaks("what is committed elsewhere is no leftover", found_as="goes, and the manifest is|not whole|the lineage is")
class CollectsWhatIsCommittedElsewhere(Place):
    def settle(self, plan: StartPlan, texts: dict[str, str]) -> list[str]:
        return super().settle(replace(plan, kept=[], lacking=[]), texts)


@breaks("what is committed elsewhere is brought here", found_as="not whole|the lineage is")
class BringsNothing(Place):
    def settle(self, plan: StartPlan, texts: dict[str, str]) -> list[str]:
        return super().settle(replace(plan, lacking=[]), texts)


# -- rank 0's committer -----------------------------------------------------------------------------------------------


@breaks("keep_last newer commits are durable before one goes", found_as="not whole")
class KeepsOneLess(Committer):
    def __init__(self, *args: Any, keep_last: int, **settings: Any) -> None:
        super().__init__(*args, keep_last=max(1, keep_last - 1), **settings)


@breaks(
    "what a restore has chosen stays until the lineage goes on from it",
    found_as="is gone, and a restore has chosen it",
    seed=345,
)
class HoldsNothing(Committer):
    def hold(self, held: bool) -> None:
        pass


@breaks("the newest branch record stays, so that damage brings no other branch back", found_as="comes back")
class RemovesEveryOldBranchRecord(Committer):
    def _retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        super()._retire(withdrawn)
        assert self._known is not None
        for seq in [seq for seq in self._known.branches if seq < max(self._known.manifests, default=0)]:
            self._manager.remove_branch(seq)
            del self._known.branches[seq]


@breaks("a base stays as long as a manifest refers to it", found_as="base .* goes, and the manifest")
class SeesNoReferences(Committer):
    def _referring(self, known: Inventory) -> list[Manifest]:
        return []


@breaks(
    "a base that attempts on their way may refer to stays",
    found_as="rank .'s base is not durable|not all of its bases",
)
class RemovesBasesOfAttempts(Committer):
    def unneeded(self) -> list[str]:
        head = self._head
        if head is not None:
            self._head = head.model_copy(update={"seq": 1 << 40})
        try:
            return super().unneeded()
        finally:
            self._head = head


@breaks(
    "a base stays until the manifest that refers to it is gone for good",
    found_as="base .* goes, and the manifest .* not gone for good",
)
class ForgetsWhatMayComeBack(Committer):
    def _retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        try:
            super()._retire(withdrawn)
        except InDoubt:
            self._returning.popitem()  # the one whose removal could not be flushed
            raise


@breaks("a base stays while any node keeps the manifest", found_as="base .* goes, and the manifest")
class ForgetsWhatKeepersHave(Committer):
    def _retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        def forgotten(attempt: AttemptId) -> None:
            withdrawn(attempt)
            del self._returning[attempt]

        super()._retire(forgotten)
