"""The commit's own decisions under anything that can happen to them, and proof that each broken rule would be found.

`tests/kit/commit_model.py` is the model. A failure prints its seed: `walk(SEED, 1)` makes that run again.
"""

from __future__ import annotations

import inspect
import logging
import random
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from kit.commit_model import Broken, walk

from layerwise_dist.commit.common_boundary import CommonBoundary, Hold
from layerwise_dist.commit.coordinator import Coordinator
from layerwise_dist.commit.ledger import Ledger
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import Place
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.session import Committer


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # thousands of failures, all on purpose
    yield
    logging.disable(logging.NOTSET)


def test_no_history_of_crashes_losses_and_failures_breaks_a_rule_of_the_commit(long: bool) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    seen = walk(seed, 1_000_000 if long else 24_000)
    print(dict(sorted(seen.items())))
    for what, least in {
        "commit": 80, "abort": 200, "superseded": 3, "waited": 5, "lost": 20, "power": 30, "branch": 5, "wake": 10,
        "left without": 5, "base goes": 100, "meeting": 20, "left: together": 5,
        "orphan": 20, "ended before": 5, "restore": 10, "restore of an older one": 1,
                "commit: InDoubt": 1, "commit: OSError": 1, "commit: OwnerError": 3, "left: checkpointing": 5,
    }.items():  # fmt: skip
        assert seen[what] >= least, f"{what}: {seen[what]} times: the model does not test what it says"


@dataclass(frozen=True)
class Mutation:
    """A method of the engine with some of its text replaced, so that one rule of the commit does not hold."""

    owner: type
    method: str
    replaced: dict[str, str]
    finds: str
    together_with: Mutation | None = None

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.together_with is not None:
            self.together_with.apply(monkeypatch)
        source = textwrap.dedent(inspect.getsource(inspect.getattr_static(self.owner, self.method)))
        for old, new in self.replaced.items():
            assert source.count(old) == 1, f"{old!r} in {self.method}: {source.count(old)} times"
            source = source.replace(old, new)
        made: dict[str, Any] = {}
        exec(compile(source, f"<mutated {self.method}>", "exec"), vars(sys.modules[self.owner.__module__]), made)
        monkeypatch.setattr(self.owner, self.method, made[self.method])


RULES = {
    "a manifest needs every rank's shard": Mutation(
        Coordinator, "_report",
        {"len(attempt.reports) == self._world_size": "len(attempt.reports) >= max(1, self._world_size - 1)"},
        "shard is not durable",
        Mutation(
            Coordinator, "_reported",
            {"[attempt.reports[rank] for rank in range(self._world_size)]":
                "[attempt.reports.get(rank, {**max(attempt.reports.items())[1], 'rank': rank,"
                " 'file': f'rank_{rank:05d}.safetensors'}) for rank in range(self._world_size)]"},
            "",
        ),
    ),
    "what is in doubt is not deleted before the decision is read": Mutation(
        Ledger, "receive",
        {'checkpointing has stopped on all ranks: {message[\'reason\']}")':
            'x"); actions += map(Discard, self._undecided.values())'},
        "goes, and the manifest is in place . there",
    ),
    "what is durable everywhere is not deleted before the decision is read": Mutation(
        Ledger, "receive",
        {"for level in LEVELS[: LEVELS.index(kind) + 1]:":
            'actions += [Discard(w) for s, w in self._undecided.items() if (kind, s) == ("durable", message["seq"])]\n'
            "            for level in LEVELS[: LEVELS.index(kind) + 1]:"},
        "goes, and the manifest is|is not durable",
    ),
    "a shard stays until its manifest is gone for good": Mutation(
        CheckpointMetadataManager, "withdraw", {"self.env.sync_dir(folder)": "pass"}, "not gone for good",
    ),
    "an old epoch commits nothing": Mutation(
        Owner, "check", {"found.get(\"epoch\") != self.epoch or found.get(\"session\") != self._session": "False"},
        "old epoch commits|committed behind|goes, and the manifest|is not durable|comes back",
    ),
    "a newer commit aborts older attempts, those that begin later too": Mutation(
        Coordinator, "_report", {"if seq < self._last_committed:": "if False:"}, "committed behind",
        Mutation(Coordinator, "_committed", {"if a.seq < attempt.seq]": "if False]"}, ""),
    ),
    "what all monitors hold is not given up when a training process dies": Mutation(
        Coordinator, "_abort_if_missed",
        {"self._orphaned if rank not in attempt.staged": "self._orphaned"},
        "had been staged by all",
    ),
    "what all monitors hold is not given up because another attempt fails behind that": Mutation(
        Coordinator, "_abort", {"failure and not self._orphaned": "failure"}, "had been staged by all",
    ),
    "an attempt ends at its deadline": Mutation(
        Coordinator, "tick", {"now - a.since > self._timeout_s": "False"}, "is not decided after",
    ),
    "committed is said when the manifest is durable": Mutation(
        CheckpointMetadataManager, "_into_place", {"self.env.sync_dir(folder)": "pass"},
        "not durable|announced|not whole",
    ),
    "a failed manifest is not announced": Mutation(
        Coordinator, "wrote", {"elif problem is not None:": "elif False:"}, "its manifest is not durable",
    ),
    "what is in doubt is not aborted": Mutation(
        Coordinator, "wrote", {"isinstance(problem, InDoubt)": "False"}, "is aborted, and its manifest is there",
    ),
    "a session in doubt commits no more": Mutation(
        Coordinator, "_may_commit", {"return self._finished is None": "return True",
                                     "if self._finished is not None:": "if False:"},
                                     "committed behind|not whole|lineage|base .* goes, and the manifest",
        Mutation(Coordinator, "_report", {"elif self._finished is not None:": "elif False:"}, ""),
    ),
    "keep_last newer commits are durable before one goes": Mutation(
        Committer, "_retire", {"keep_last=self._keep_last,": "keep_last=max(1, self._keep_last - 1),"}, "not whole",
    ),
    "what a restore has chosen stays until the lineage goes on from it": Mutation(
        Committer, "hold", {"self._held = held": "pass"}, "is gone, and a restore has chosen it",
    ),
    "the newest branch record stays, so that damage brings no other branch back": Mutation(
        Committer, "_retire",
        {"sorted(inventory.branches)[:-1]": "[s for s in inventory.branches if s < max(inventory.manifests)]"},
        "comes back",
    ),
    "a branch descends from what it left, and from nothing that came later": Mutation(
        Committer, "_follow", {"parent.spans if": "[Span(first=0, last=branch_seq - 1)] if"}, "the lineage is",
    ),
    "a base stays as long as a manifest refers to it": Mutation(
        Committer, "unneeded", {"[*inventory.manifests.values(), *self._returning.values()]": "[]"},
        "base .* goes, and the manifest",
    ),
    "a base that attempts on their way may refer to stays": Mutation(
        Committer, "unneeded", {"below=head.seq": "below=1 << 40"}, "rank .'s base is not durable|not all of its bases",
    ),
    "a base stays until the manifest that refers to it is gone for good": Mutation(
        Committer, "_retire",
        {"self._returning[attempt] = inventory.manifests.pop(seq)  #": "del inventory.manifests[seq]  #"},
        "base .* goes, and the manifest .* not gone for good",
    ),
    "a base stays while any node keeps the manifest": Mutation(
        Committer, "_retire", {"self._returning[attempt] = inventory.manifests.pop(seq)\n        withdrawn":
                               "del inventory.manifests[seq]\n        withdrawn"}, "base .* goes, and the manifest",
    ),
    "a start removes no base that a manifest refers to": Mutation(
        CheckpointMetadataManager, "collect_leftovers", {"inventory.manifests.values()) if": "[]) if"},
        "base .* goes, and the manifest",
    ),
    "a stop names one boundary": Mutation(
        Ledger, "must_raise", {"count >= self.stop[0]": "True"}, "raise at different boundaries",
    ),
    "a roll back is durable before it is followed": Mutation(
        Committer, "_follow", {"self._manager.write_branch(record)": "pass"}, "newest record|lineage",
    ),
    "ranks meet where none has been": Mutation(
        CommonBoundary, "held", {"max(current.held.values())": "min(current.held.values())"}, "meets",
    ),
    "a rank that was told to hold does not go on": Mutation(
        Hold, "hold", {"min(self._limit, self._passed + 1)": "self._limit"}, "meets",
    ),
    "a rank that asked does not go on": Mutation(
        Hold, "ask", {"self._limit = min(self._limit, at)": "self._passed += 0"}, "meets",
        Mutation(Hold, "hold", {"min(self._limit, self._passed + 1)": "self._limit"}, ""),
    ),
    "a boundary that is not agreed on is given up": Mutation(
        CommonBoundary, "tick", {"now - current.since <= self._timeout_s": "True"}, "has held for",
    ),
    "there is no meeting with a rank that left": Mutation(
        CommonBoundary, "end", {"return self._give_up(why)": "return []"}, "has held for|meets",
        Mutation(CommonBoundary, "tick", {"now - current.since <= self._timeout_s": "True"}, ""),
    ),
    "rank 0's manifest is the first": Mutation(
        Coordinator, "composed", {'"prepare", text': '"prepare", text); self._say('
                                  '{"t": "publish", "seq": seq, "step": attempt.step}'}, "before rank 0 has written",
    ),
    "committed is said when every node has the manifest": Mutation(
        Coordinator, "wrote", {"elif self._keepers:": "elif False:"}, "its manifest is not durable",
    ),
    "a shard stays while any node keeps the manifest": Mutation(
        Coordinator, "withdrawn", {"if self._keepers and attempts:": "if False:"}, "goes, and the manifest is in place",
    ),
    "what is committed elsewhere is no leftover": Mutation(
        Place, "settle", {"{AttemptId(*each) for each in plan.kept}": "set()",
                          "if self._ranks[0] in lacking and": "if False and"},
        "goes, and the manifest is|not whole|the lineage is",
    ),
    "what is committed elsewhere is brought here": Mutation(
        Place, "settle", {"if self._ranks[0] in lacking and": "if False and"}, "not whole|the lineage is",
    ),
    "what a start reads is durable in every place before it collects": Mutation(
        Place, "look", {"self._manager.flush_records(found)": "[]"}, "not gone for good|not whole|newest record",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_breaking_a_rule_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    RULES[rule].apply(monkeypatch)
    with pytest.raises(Broken, match=RULES[rule].finds):
        walk(1, 400_000)
