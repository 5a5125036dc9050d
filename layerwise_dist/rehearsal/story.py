# SPDX-License-Identifier: Apache-2.0
"""What the ranks of one run recorded, read while it runs, and where two runs diverge."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise_dist.rehearsal.plan import Plan, name_of
from layerwise_dist.rehearsal.script import LOADER, VALUE

Told = dict[str, Any]


@dataclass
class Rank:
    """One rank of the engine whose steps count, as far as it has recorded.

    Attributes:
        attached: what it said of itself, newest last: a launcher may start it again.
        steps: what it saw of each iteration, by the step that ended it.
        ready, stopped: what it said at the end, if it came there.
        warned: what the library warned of.
    """

    attached: list[Told] = field(default_factory=list)
    steps: dict[int, Told] = field(default_factory=dict)
    ready: Told | None = None
    stopped: Told | None = None
    warned: list[str] = field(default_factory=list)

    def take(self, told: Told) -> None:
        match told["t"]:
            case "attached":
                self.attached.append(told)
            case "passed":
                self.steps[told["step"]] = told
            case "ready":
                self.ready = told
            case "stopped":
                self.stopped = told
            case "warned":
                self.warned.append(told["text"])


class Story:
    """Of one run. `directories`: those that the script asked for, the one whose steps count first."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._offsets: dict[str, int] = {}
        self._ranks: dict[str, dict[int, Rank]] = {}
        self.directories: list[str] = []

    def read(self) -> None:
        """What is new. A line that is being written is left for the next time."""
        for name in sorted(os.listdir(self._plan.told)):
            place, number, _ = name.split(".")
            with open(os.path.join(self._plan.told, name), "rb") as file:
                file.seek(self._offsets.get(name, 0))
                text = file.read()
            whole = text.rfind(b"\n") + 1
            self._offsets[name] = self._offsets.get(name, 0) + whole
            rank = self._ranks.setdefault(place, {}).setdefault(int(number), Rank())
            for line in text[:whole].splitlines():
                told = json.loads(line)
                rank.take(told)
                if told["t"] == "attached" and told["dir"] not in self.directories:
                    self.directories.insert(0 if told["leads"] else len(self.directories), told["dir"])

    @property
    def ranks(self) -> dict[int, Rank]:
        """Of the engine whose steps count, by number; none before one was attached."""
        return self._ranks.get(name_of(self.directories[0]), {}) if self.directories else {}

    @property
    def size(self) -> int:
        """Ranks of the job; 0 before one was attached."""
        return max((rank.attached[-1]["ranks"] for rank in self.ranks.values() if rank.attached), default=0)

    @property
    def newest(self) -> int:
        return max((step for rank in self.ranks.values() for step in rank.steps), default=0)

    @property
    def begun_at(self) -> int:
        """The first step that ended in this run."""
        return min((step for rank in self.ranks.values() for step in rank.steps), default=0)

    @property
    def committed(self) -> int | None:
        """As the ranks said that wait to be killed."""
        found = [rank.ready["committed"] for rank in self.ranks.values() if rank.ready is not None]
        return min(found, default=None)

    def all_are(self, what: str) -> bool:
        """Whether every rank said that it is `ready`, or has `stopped`."""
        ranks = self.ranks
        return 0 < len(ranks) == self.size and all(getattr(rank, what) is not None for rank in ranks.values())

    def place(self, directory: str) -> str:
        """Where the checkpoints are that the script meant for `directory`."""
        return self._plan.place_of(directory)


@dataclass(frozen=True)
class Divergence:
    """What differs of one iteration between two runs, on one rank.

    Attributes:
        objects: variables of the script with other states, by name, with their kinds.
        values: plain variables of the script that differ, by name, with both texts.
        hidden: attributes of modules that are no tensors of the model.
        weights: parameters and buffers when the iteration began.
        forward: which forward of the iteration is the first to differ; None if none does.
        rng, given, gives: of that forward: global generators before it, what it is given, what it gives.
        count: whether there were more forwards in one run than in the other.
        gradients: of parameters, before the update.
    """

    step: int
    rank: int
    objects: dict[str, str]
    values: dict[str, tuple[str, str]]
    hidden: list[str]
    weights: list[str]
    forward: int | None
    rng: list[str]
    given: list[str]
    gives: list[str]
    count: bool
    gradients: list[str]

    @property
    def stage(self) -> int | None:
        """Where in the iteration the first thing differs that changes a training, 0 at its beginning; None if nothing
        does. Random numbers that nobody draws, and states of objects that nobody uses, change none.
        """
        for number, differs in enumerate((self.weights, self.given, self.gives, self.count, self.gradients)):
            if differs:
                return number
        return None


def divergence(one: Rank, other: Rank, step: int, rank: int) -> Divergence | None:
    """None if either saw nothing of that iteration."""
    if step not in one.steps or step not in other.steps:
        return None
    mine, theirs = one.steps[step], other.steps[step]
    script, others = mine.get("script", {}), theirs.get("script", {})
    both = [name for name in script if name in others and script[name]["kind"] == others[name]["kind"]]
    forwards = list(zip(mine.get("forwards", ()), theirs.get("forwards", ()), strict=False))
    at: int | None = None
    rng: list[str] = []
    given: list[str] = []
    gives: list[str] = []
    for number, (here, there) in enumerate(forwards):
        rng, given, gives = (unlike(here.get(what), there.get(what)) for what in ("rng", "in", "out"))
        if rng or given or gives:
            at = number
            break
    return Divergence(
        step, rank,
        {
            name: script[name]["kind"] for name in both
            if script[name]["kind"] not in (VALUE, LOADER) and script[name]["hash"] != others[name]["hash"]
        },
        {
            name: (script[name]["text"], others[name]["text"]) for name in both
            if script[name]["kind"] == VALUE and script[name]["text"] != others[name]["text"]
        },
        unlike(mine.get("hidden"), theirs.get("hidden")), unlike(mine.get("weights"), theirs.get("weights")),
        at, rng, given, gives, len(mine.get("forwards", ())) != len(theirs.get("forwards", ())),
        unlike(mine.get("gradients"), theirs.get("gradients")),
    )  # fmt: skip


def divergences(one: Story, other: Story, step: int, without: Set[str]) -> list[Divergence]:
    """Of each rank that both runs have; objects of the names in `without` are left out."""
    both = sorted(one.ranks.keys() & other.ranks.keys())
    found = [divergence(one.ranks[rank], other.ranks[rank], step, rank) for rank in both]
    return [
        replace(each, objects={name: kind for name, kind in each.objects.items() if name not in without})
        for each in found if each is not None
    ]  # fmt: skip


def first_of(found: Sequence[Divergence], *, objects: bool) -> Divergence | None:
    """The one that differs earliest in the iteration; with `objects` those too where the script's objects differ."""
    telling = [each for each in found if each.stage is not None or (objects and each.objects)]
    return min(telling, key=lambda each: (-1 if objects and each.objects else each.stage or 0, each.rank), default=None)


def loaders(rank: Rank, step: int) -> list[str]:
    """Variables of the script that hold a DataLoader which `state=` does not name."""
    return [name for name, told in rank.steps.get(step, {}).get("script", {}).items() if told["kind"] == LOADER]


def unlike(one: Mapping[str, str] | None, other: Mapping[str, str] | None) -> list[str]:
    """Names that both have, with another hash."""
    one, other = one or {}, other or {}
    return [name for name, each in one.items() if name in other and other[name] != each]
