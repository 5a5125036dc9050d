# SPDX-License-Identifier: Apache-2.0
"""Steps that are shorter than a commit: what is begun and not decided stays bounded, and so does what a crash costs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.crash import build, in_ranks, settings, train

from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.ledger import Ledger
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly

KEPT = 2
LEAVING = 6  # retired folders at most, on their way out in the background


def slow(seconds: float) -> Any:
    """A disk on which shards are fast and manifests are not."""
    env = testing.FaultEnv(PosixEnv())
    env.delay("sync", "*manifest*", seconds)
    return env


def folders(root: Path) -> int:
    return sum(name.startswith("step_") for name in os.listdir(root))


def short_steps(root: Path, steps: int = 20, world: int = 1, **config: Any) -> list[tuple[int, int, dict[str, Any]]]:
    """By rank: the largest lag that was seen, the most folders, and what stats() says at the end."""

    def run(transport: LocalTransport) -> tuple[int, int, dict[str, Any]]:
        model, optimizer = build(transport.rank)
        options = settings(str(root), keep_last=KEPT, **{"commit": {"on_failure": "raise"}, **config})
        lag = most = 0
        with assembly.assemble(model, optimizer, options, transport, slow(0.02)) as engine:
            for step in engine.steps(steps):
                train(model, optimizer, transport.rank, 0, step)
                lag, most = max(lag, engine.stats()["lag_steps"]), max(most, folders(root))
        return lag, most, engine.stats()

    return in_ranks(run, world=world)


@pytest.mark.parametrize(("world", "limit"), [(1, 1), (1, 3), (2, 2)])
def test_steps_shorter_than_a_commit_wait_for_it(tmp_path: Path, world: int, limit: int) -> None:
    for lag, most, stats in short_steps(tmp_path, world=world, max_in_flight=limit):
        assert lag <= limit, "the newest commit is so many steps behind at most"
        assert most <= KEPT + limit + LEAVING
        assert (stats["checkpoints_committed"], stats["checkpoints_aborted"], stats["in_flight"]) == (20, 0, 0)
        assert (stats["lag_steps"], stats["lag_s"]) == (0, 0.0)


def test_mutation_a_count_of_shards_on_their_way_to_the_disk_alone_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "in_flight", Ledger.on_disk_way)
    with pytest.raises(AssertionError, match="the newest commit is so many steps behind at most"):
        test_steps_shorter_than_a_commit_wait_for_it(tmp_path, 1, 1)


def test_with_skip_all_ranks_leave_out_the_same_steps(tmp_path: Path) -> None:
    ranks = short_steps(tmp_path, steps=60, world=2, max_in_flight=2, when_full="skip")
    counted = {(stats["checkpoints_committed"], stats["checkpoints_skipped"]) for _, _, stats in ranks}
    assert len(counted) == 1
    ((committed, skipped),) = counted
    assert committed > 0 < skipped and committed + skipped == 60
    for _, most, stats in ranks:
        assert most <= KEPT + 2 + LEAVING and stats["checkpoints_aborted"] == 0


def test_the_lag_is_what_a_crash_would_cost(tmp_path: Path) -> None:
    def run(transport: LocalTransport) -> None:
        model, optimizer = build(0)
        options = settings(str(tmp_path), every_n_steps=2, save_last=False)
        with assembly.assemble(model, optimizer, options, transport, PosixEnv()) as engine:
            for step in engine.steps(3):
                train(model, optimizer, 0, 0, step)
                time.sleep(0.05)
            stats = engine.stats()
            assert stats["lag_steps"] in (1, 3) and stats["lag_s"] > 0.05 * stats["lag_steps"] - 0.04
            engine.wait(2)
            assert engine.stats()["lag_steps"] == 1
            assert engine.restore() == 2
            stats = engine.stats()
            assert (stats["lag_steps"], stats["lag_s"]) == (0, 0.0)
            for step in engine.steps(3):
                train(model, optimizer, 0, 0, step)
            assert engine.stats()["lag_steps"] == 1

    in_ranks(run, world=1)


@pytest.mark.slow
def test_a_rank_0_that_is_stuck_holds_training_up_once(tmp_path: Path) -> None:
    """Its manifest's flush hangs. Once that is over, checkpoints go on."""
    hang_s, timeout_s = 2.0, 0.4

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(0)
        options = settings(str(tmp_path), max_in_flight=1, commit={"timeout_s": timeout_s, "raise_after": 99})
        env = slow(hang_s)
        with assembly.assemble(model, optimizer, options, transport, env) as engine:
            engine.explicit()

            def step() -> float:
                began = time.monotonic()
                train(model, optimizer, 0, 0, engine.completed)
                engine.end_step()
                return time.monotonic() - began

            began = time.monotonic()
            waits = []
            while time.monotonic() - began < 0.7 * hang_s:
                waits.append(step())
            assert len(waits) > 10, "the next steps do not: of such waits there is time for four"
            assert engine.stats()["checkpoints_committed"] == 0
            assert max(waits) > 0.8 * timeout_s, "one step waited for a decision"
            env.clear()
            while engine.stats()["in_flight"]:
                time.sleep(0.01)
            step()
            engine.wait(engine.completed, timeout=20)
            assert engine.stats()["checkpoints_skipped"] > 8

    in_ranks(run, world=1)
