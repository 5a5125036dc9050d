# SPDX-License-Identifier: Apache-2.0
"""Holds the events and commits of a run, and derives the numbers of a report from them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from layerwise_dist.telemetry.figures import median
from layerwise_dist.telemetry.names import PARTS

Event = dict[str, Any]


class Commit(NamedTuple):
    """One that is in the directory. `branch` and `parent` are seqs; `status` as `layerwise ls` has it."""

    seq: int
    step: int
    created: float
    nbytes: int
    branch: int
    parent: int | None
    status: str
    tag: str | None


class Branch(NamedTuple):
    """`parent`: the seq that it goes on from; None: it began anew."""

    seq: int
    parent: int | None


class RankFigures(NamedTuple):
    """Of one rank. Medians are None where nothing was told."""

    rank: int
    checkpoints: int
    write_s: float | None
    gb_per_s: float | None
    stall_s: float | None
    last: int  # how often its shard was durable last


@dataclass(frozen=True)
class Facts:
    """`events` of all ranks, each rank's in order; `layers` are bytes by layer in the newest checkpoint."""

    directory: str
    made: float
    events: Sequence[Event]
    commits: Sequence[Commit]
    branches: Sequence[Branch]
    layers: dict[str, int]
    problems: Sequence[str] = field(default_factory=list)
    cut: str = ""  # what is left out, in words

    @cached_property
    def checkpoints(self) -> list[Event]:
        """As the lowest rank tells them: what became of one is the same on all."""
        told = [event for event in self.events if event["event"] == "checkpoint"]
        first = min((event["rank"] for event in told), default=0)
        return [event for event in told if event["rank"] == first]

    @cached_property
    def outcomes(self) -> Counter[str]:
        return Counter(event["outcome"] for event in self.checkpoints)

    @cached_property
    def committed(self) -> list[Event]:
        return [event for event in self.checkpoints if event["outcome"] == "committed"]

    @cached_property
    def bad(self) -> list[Event]:
        """Checkpoints that failed or were skipped, and ends of all checkpoints; newest first."""
        found = [event for event in self.checkpoints if event["outcome"] in ("failed", "skipped", "undecided")]
        found += {event["time"]: event for event in self.events if event["event"] == "stopped"}.values()
        return sorted(found, key=lambda event: -event["time"])

    @cached_property
    def starts(self) -> list[Event]:
        told = [event for event in self.events if event["event"] == "start"]
        first = min((event["rank"] for event in told), default=0)
        return [event for event in told if event["rank"] == first]

    @cached_property
    def stalls_ms(self) -> list[float]:
        """Of each checkpoint, the longest of any rank."""
        longest: dict[tuple[int, int], float] = defaultdict(float)
        for event in self.events:
            if event["event"] == "checkpoint" and event["stall_s"] is not None:
                key = event["epoch"], event["seq"]
                longest[key] = max(longest[key], 1e3 * event["stall_s"])
        return [*longest.values()]

    @cached_property
    def stall_parts_s(self) -> dict[str, float]:
        """Sums over the checkpoints, as the lowest rank tells them."""
        return {part: sum(event[f"stall_{part}_s"] or 0.0 for event in self.checkpoints) for part in PARTS}

    @cached_property
    def ranks(self) -> list[RankFigures]:
        """Slowest first: by how often a rank was last, then by how long it takes to write."""
        by_rank: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            if event["event"] == "checkpoint" and event["outcome"] == "committed":
                by_rank[event["rank"]].append(event)
        last = Counter(event["slowest_rank"] for event in self.committed if event["slowest_rank"] is not None)

        def middle(events: list[Event], name: str) -> float | None:
            return median([event[name] for event in events if event[name] is not None])

        found = [
            RankFigures(
                rank, len(told), middle(told, "write_s"), middle(told, "gb_per_s"), middle(told, "stall_s"), last[rank]
            )
            for rank, told in ((rank, by_rank.get(rank, [])) for rank in sorted({*by_rank, *last}))
        ]  # fmt: skip
        return sorted(found, key=lambda each: (-each.last, -(each.write_s or 0.0)))
