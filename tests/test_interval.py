# SPDX-License-Identifier: Apache-2.0
"""`every_n_steps: auto`: the interval follows what checkpoints cost and how often jobs fail, on all ranks at once."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from typing import Any

import pytest

from layerwise_dist.commit.coordinator import Announce, Coordinator
from layerwise_dist.commit.grants import Grants
from layerwise_dist.commit.ledger import Ledger, Post
from layerwise_dist.interval import (
    FIRST,
    FIRST_OF_FAILING,
    Choice,
    Costs,
    Limits,
    Pace,
    choose,
    loss_s,
    optimum_s,
    overhead,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("costs", "limits", "steps", "why"),
    [
        (Costs(1.0, 0.2, 1.0, 1.0), {}, 10, "max_overhead is 0.02"),
        (Costs(1.0, 0.2, 1.0, 1.0), {"max_overhead": 0.1}, 2, "max_overhead is 0.1"),
        (Costs(1.0, 0.0, 0.5, 0.5), {}, 1, "the disk finishes a checkpoint every 500 ms"),
        (Costs(1.0, 0.01, 40.0, 40.0), {}, 40, "the disk finishes a checkpoint every 40 s"),
        (Costs(1.0, 0.01, 40.0, 20.0), {"max_overhead": 0.25}, 16, "every 20 s, and a step takes 1 s"),
        # sqrt(2 x 0.5 x 10800) = 103.9, of higher order 103.6
        (Costs(1.0, 0.5, 1.0, 1.0), {"mtbf_s": 10800.0}, 104, "Young/Daly"),
        (Costs(1.0, 0.5, 1.0, 1.0), {"mtbf_s": 60.0}, 8, "Young/Daly"),  # no budget was given
        (Costs(1.0, 0.5, 1.0, 1.0), {"mtbf_s": 60.0, "max_overhead": 0.02}, 25, "max_overhead is 0.02"),
        (Costs(1.0, 0.2, 1.0, 1.0), {"min_steps": 50}, 50, "min_steps is 50; otherwise it would be 10"),
        (Costs(1.0, 0.2, 1.0, 1.0), {"max_steps": 3}, 3, "max_steps is 3; otherwise it would be 10"),
    ],
)
def test_the_largest_of_three_bounds_holds(costs: Costs, limits: dict[str, Any], steps: int, why: str) -> None:
    found = choose(costs, Limits(**limits))
    assert found.steps == steps and why in found.why


@pytest.mark.parametrize(("cost", "mtbf"), [(0.1, 100.0), (1.0, 3600.0), (30.0, 1000.0), (5.0, 20.0)])
def test_no_other_interval_loses_less_than_dalys(cost: float, mtbf: float) -> None:
    """By the expected time of a run with exponential failures (Daly's equation 20, without restart)."""

    def lost(between: float) -> float:
        return mtbf * math.expm1((between + cost) / mtbf) / between

    best = min((lost(tau), tau) for tau in (cost * 1.02**power / 50 for power in range(1200)) if tau < 20 * mtbf)
    assert lost(optimum_s(cost, mtbf)) <= 1.01 * best[0]
    assert optimum_s(3 * mtbf, mtbf) == mtbf


def test_overhead_and_loss() -> None:
    costs = Costs(2.0, 0.4, 5.0, 5.0)
    assert overhead(10, costs) == pytest.approx(0.02) and loss_s(10, costs) == pytest.approx(15.2)


class Disk:
    """A job whose checkpoint stalls training and slows it down while it is written: one after the other, two in flight
    at most, so that a third waits.
    """

    def __init__(self, pace: Pace, *, step: float, stall: float, slower: float, write: float) -> None:
        self.pace, self.step, self.stall, self.slower, self.write = pace, step, stall, slower, write
        self.now, self.ends = 0.0, deque[tuple[float, float]]()  # (when it began, when it is written)
        self.chosen: list[Choice] = []

    def run(self, steps: int) -> int:
        for number in range(1, steps + 1):
            since, busy, begun = self.now, bool(self.ends), number % self.pace.steps == 0
            self.now += self.step * (self.slower if busy else 1) + self.stall * begun
            if begun:
                if len(self.ends) == 2:
                    self.now = max(self.now, self.ends[0][1])
                self.ends.append((self.now, max(self.now, self.ends[-1][1] if self.ends else 0.0) + self.write))
            while self.ends and self.ends[0][1] <= self.now:
                began, end = self.ends.popleft()
                self.pace.committed(end - began)
            self.pace.step(self.now - since, busy=busy or bool(self.ends), begun=begun)
            if (choice := self.pace.decide()) is not None:
                self.chosen.append(choice)
                self.pace.follow(choice.steps)
        return self.pace.steps


@pytest.mark.parametrize("first", [1, 10, 3000])
def test_it_comes_to_the_budget_from_anywhere_and_stays(first: int) -> None:
    # A checkpoint costs 0.1 s of stall, and 4 steps of 0.5 s that take a tenth longer: 0.3 s, 30 steps of the budget.
    disk = Disk(Pace(Limits(), first), step=0.5, stall=0.1, slower=1.1, write=2.2)
    assert 24 <= disk.run(40 * max(first, 100)) <= 36
    before = len(disk.chosen)
    disk.run(5000)
    assert len(disk.chosen) <= before + 1, "the same costs are no reason for another interval"


def test_a_disk_that_gets_slower_or_faster_is_followed_and_the_limits_hold() -> None:
    disk = Disk(Pace(Limits(min_steps=5, max_steps=300)), step=0.1, stall=0.001, slower=1.0, write=0.9)
    assert 8 <= disk.run(2000) <= 12
    disk.write = 10.0  # as long as 100 steps
    assert 80 <= disk.run(8000) <= 130
    disk.write = 500.0
    assert disk.run(40_000) == 300
    disk.write = 0.01
    assert disk.run(40_000) == 5
    assert all(choice.why for choice in disk.chosen)


def test_a_disk_that_is_never_idle_is_given_time() -> None:
    disk = Disk(Pace(Limits(), 1), step=0.1, stall=0.0, slower=1.2, write=0.5)
    disk.run(5)
    assert disk.pace.steps == 2 and "nothing to compare with" in disk.chosen[0].why


def test_it_begins_with_what_the_job_had_before() -> None:
    assert Pace(Limits()).steps == FIRST and Pace(Limits(), 77).steps == 77
    assert Pace(Limits(max_steps=5)).steps == 5


def test_a_job_that_fails_often_begins_soon_and_saves_as_failures_want_it() -> None:
    """A life of a dozen steps would learn nothing of a checkpoint every ten; and 2 % of overhead would lose most."""
    limits = Limits(mtbf_s=18.0)
    disk = Disk(Pace(limits), step=1.4, stall=0.1, slower=1.05, write=0.9)
    assert disk.pace.steps == FIRST_OF_FAILING and disk.run(3 * FIRST_OF_FAILING) == FIRST_OF_FAILING
    assert disk.run(200) == round(optimum_s(0.17, 18.0) / 1.4 + 0.5) == 2
    assert Pace(Limits(mtbf_s=18.0, min_steps=3)).steps == 3


def test_commits_that_take_longer_than_a_step_do_not_hide_what_a_step_takes_for_long() -> None:
    """With a checkpoint every two steps none is without one; with one every four there are."""
    disk = Disk(Pace(Limits(mtbf_s=18.0)), step=1.4, stall=0.1, slower=1.05, write=1.8)
    assert disk.run(200) == 2 and [choice.steps for choice in disk.chosen] == [4, 2]


def lives(count: int, steps: int, *, keeping: bool) -> list[int]:
    """The interval at the end of each life of a job that is killed after so many steps, the last being saved."""
    found, every, kept = [], None, None
    for _ in range(count):
        pace = Pace(Limits(mtbf_s=18.0), every)
        if kept is not None and keeping:
            pace.take_up(kept)
        found.append(Disk(pace, step=1.4, stall=0.1, slower=1.05, write=1.8).run(steps))
        every, kept = pace.steps, pace.kept()
    return found


def test_what_was_measured_in_lives_too_short_to_decide_is_kept_over_restarts() -> None:
    assert lives(6, 11, keeping=True) == [4, 4, 2, 2, 2, 2]
    assert lives(6, 11, keeping=False)[-1] > 2, "no life sees five checkpoints that it can tell the cost of"


def test_what_a_life_measured_itself_stands_and_little_of_others_is_kept() -> None:
    pace = Pace(Limits())
    for number in range(20):
        pace.step(1.0 + number, busy=False, begun=0)
    kept = pace.kept()
    assert kept == {"step_s": [13.0 + number for number in range(8)], "checkpoint_s": [], "write_s": [], "disk_s": []}
    pace.take_up({"step_s": [9.0], "checkpoint_s": [0.5], "write_s": [0.25], "disk_s": [0.125]})
    assert pace.kept() == {**kept, "checkpoint_s": [0.5], "write_s": [0.25], "disk_s": [0.125]}


@pytest.mark.parametrize("step_s", [0.0, 5e-324, 1e-10])
def test_steps_of_no_time_decide_nothing(step_s: float) -> None:
    pace = Pace(Limits())
    pace.take_up({"step_s": [step_s] * 5, "checkpoint_s": [0.5] * 8, "write_s": [0.25] * 8, "disk_s": [0.125] * 8})
    pace.step(step_s, busy=True, begun=1)
    pace.step(step_s, busy=False, begun=0)
    assert pace._fresh and pace.decide() is None


@pytest.mark.parametrize("mtbf_s", [None, 18.0])
def test_whatever_a_reader_lets_through_is_decided_on_within_bounds(mtbf_s: float | None) -> None:
    """A directory's own numbers raise nothing in training, and are outweighed."""
    for seconds in itertools.product(([], [0.0] * 8, [1e-9] * 8, [1e9] * 32), repeat=4):
        pace = Pace(Limits(mtbf_s=mtbf_s))
        pace.take_up(dict(zip(("step_s", "checkpoint_s", "write_s", "disk_s"), seconds, strict=True)))
        for step in range(12):
            pace.step(1.0, busy=step % 2 == 0, begun=step % 2 == 0)
            if (choice := pace.decide()) is not None:
                assert 1 <= choice.steps <= 4 * pace.steps
                pace.follow(choice.steps)


# -- at one boundary ---------------------------------------------------------------------------------------------------


def applied(seed: int, coordinator: Coordinator, ranks: int = 3, wanted: int = 120) -> list[dict[int, int]]:
    """By rank, the interval of each boundary, with messages that travel for any time; a rank waits where it must."""
    chance = random.Random(seed)
    ledgers = [Ledger(rank, ranks) for rank in range(ranks)]
    to_rank: list[deque[Any]] = [deque() for _ in ledgers]
    to_rank0: list[deque[Any]] = [deque() for _ in ledgers]
    counts, now = [0] * ranks, [4] * ranks
    found: list[dict[int, int]] = [{} for _ in ledgers]
    asked = 0
    for turn in range(200_000):
        if min(counts) >= wanted:
            break
        rank = chance.randrange(ranks)
        what = chance.randrange(3)
        if what == 0 and counts[rank] < wanted:
            count = counts[rank] + 1
            # A rank that waits at a boundary says so once.
            to_rank0[rank] += [a.message for a in ledgers[rank].boundary(count) if isinstance(a, Post)]
            if ledgers[rank].may_pass(count):
                counts[rank] = count
                if (told := ledgers[rank].interval(count)) is not None:
                    now[rank] = told[0]
                found[rank][count] = now[rank]
                if rank == 0 and chance.random() < 0.1:
                    asked += 1
                    to_rank0[0].append({"t": "pace", "rank": 0, "steps": 4 + asked, "why": "so"})
        elif what == 1 and to_rank0[rank]:
            for output in coordinator.handle(to_rank0[rank].popleft(), turn / 100):
                if isinstance(output, Announce):
                    for each in to_rank:
                        each.append(output.message)
        elif what == 2 and to_rank[rank]:
            ledgers[rank].receive(to_rank[rank].popleft())
    assert min(counts) >= wanted, "somebody waits for ever"
    return found


def coordinator(ranks: int = 3) -> Coordinator:
    return Coordinator(ranks, timeout_s=1e9, on_failure="warn", raise_after=5, now=0.0)


def test_all_ranks_change_at_one_boundary_however_messages_travel() -> None:
    for seed in range(30):
        found = applied(seed, coordinator())
        assert found[0] == found[1] == found[2] and len(set(found[0].values())) > 2


def test_mutation_a_change_that_is_not_agreed_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if it held at once: from the slowest rank's boundary on.
    monkeypatch.setattr(Grants, "last", property(lambda grants: int(min(grants._at))))
    assert any(len({tuple(each.items()) for each in applied(seed, coordinator())}) > 1 for seed in range(30))
