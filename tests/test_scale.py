# SPDX-License-Identifier: Apache-2.0
"""How a commit grows with the number of ranks: in messages and in the coordinator's work, no faster than linearly."""

from __future__ import annotations

import time
from dataclasses import dataclass

from layerwise_dist.commit.coordinator import Announce, Coordinator, RetireOld, WriteManifest
from layerwise_dist.commit.ledger import Ledger, Post
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.reports import ShardReport


@dataclass
class Sealed:
    attempt: AttemptId


@dataclass
class Load:
    """What `steps` iterations with a checkpoint each cost: messages to rank 0, to all, and the coordinator's CPU."""

    ranks: int
    steps: int
    posted: int = 0
    announced: int = 0
    at: int = 0
    seconds: float = 0.0

    def run(self) -> Load:
        coordinator = Coordinator(self.ranks, timeout_s=60.0, on_failure="raise", raise_after=1, now=0.0)
        ledgers = [Ledger(rank, self.ranks) for rank in range(self.ranks)]
        for step in range(1, self.steps + 1):
            attempt, now = AttemptId(1, step, step), float(step)
            said = [a for each in ledgers for a in [*each.sealed(Sealed(attempt)), *each.boundary(step)]]  # type: ignore[arg-type]
            for each in ledgers:
                said += each.persisted(attempt, ShardReport(each.rank, "x", 1, 4096, 0))
            messages = [action.message for action in said if isinstance(action, Post)]
            self.posted += len(messages)
            self.at += sum(message["t"] == "at" for message in messages)
            began = time.thread_time()
            outputs = [output for message in messages for output in coordinator.handle(message, now)]
            for output in list(outputs):
                if isinstance(output, WriteManifest):
                    outputs += coordinator.wrote(output.seq, None)
            outputs += coordinator.tick(now)
            self.seconds += time.thread_time() - began
            assert sum(isinstance(output, RetireOld) for output in outputs) == 1
            said_to_all = [output.message for output in outputs if isinstance(output, Announce)]
            self.announced += len(said_to_all)
            for each in ledgers:
                for message in said_to_all:
                    each.receive(message)
                assert each.may_pass(step) and each.has_reached(step, "committed")
        return self


def test_a_commit_takes_two_messages_of_each_rank_and_a_handful_to_all() -> None:
    for ranks in (2, 64, 1000):
        load = Load(ranks, 100).run()
        assert load.posted - load.at == 2 * ranks * 100
        # One a second a step: each rank says where it is once in four steps.
        assert load.at <= 26 * ranks
        assert load.announced <= 100 * 4


def test_the_coordinators_work_for_a_commit_grows_no_faster_than_the_ranks() -> None:
    """A thing of seconds, but not a measurement: what grows with the square would be at 256 times."""
    few, many = (min(Load(ranks, 3).run().seconds for _ in range(3)) for ranks in (500, 8000))
    assert many < 64 * few
