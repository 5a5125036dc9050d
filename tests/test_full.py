# SPDX-License-Identifier: Apache-2.0
"""More checkpoints than the disk takes: the loop waits or skips as configured, and never fails, crashes or changes."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import build, in_ranks, settings, tensors_of, train
from kit.shards import differing

from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import workings_of

STEPS = 50


def slow(operation: str, seconds: float) -> Any:
    env = testing.FaultEnv(PosixEnv())
    env.delay(operation, "*rank_*", seconds)
    return env


def job(env: Any, root: Path, steps: int = STEPS, slow_rank: int | None = None, **config: Any) -> list[tuple[Any, Any]]:
    """Trains a model a rank, each on its own Env; (tensors, stats) by rank."""

    def run(transport: LocalTransport) -> tuple[Any, Any]:
        rank = transport.rank
        model, optimizer = build(rank)
        mine = env if slow_rank in (None, rank) else PosixEnv()
        with assembly.assemble(model, optimizer, settings(str(root), **config), transport, mine) as engine:
            for step in engine.steps(steps):
                train(model, optimizer, rank, 0, step)
        return tensors_of(model, optimizer), engine.stats()

    return in_ranks(run, world=1 if slow_rank is None else 2, timeout_s=120)


def expected(world: int = 1, steps: int = STEPS) -> list[Any]:
    """What each rank holds without the engine. On threads too: how many a kernel uses is set per thread."""

    def run(transport: LocalTransport) -> Any:
        model, optimizer = build(transport.rank)
        for step in range(steps):
            train(model, optimizer, transport.rank, 0, step)
        return tensors_of(model, optimizer)

    return in_ranks(run, world=world)


def seqs(root: Path) -> list[tuple[int, int]]:
    """(seq, step) of every commit that is there."""
    manifests = CheckpointMetadataManager(PosixEnv(), str(root), file_mode=0o600).inventory().manifests
    return sorted((seq, manifest.step) for seq, manifest in manifests.items())


@pytest.mark.parametrize("when_full", ["wait", "skip"])
def test_a_checkpoint_every_step_on_a_slow_disk_is_never_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, when_full: str
) -> None:
    caplog.set_level(logging.WARNING, logger="layerwise_dist")
    options = {"max_in_flight": 1, "when_full": when_full, "keep_last": STEPS, "commit": {"on_failure": "raise"}}
    ((tensors, stats),) = job(slow("sync", 0.02), tmp_path, **options)
    assert differing(tensors, expected()[0]) == [], "training is what it is without checkpoints"
    found = seqs(tmp_path)
    assert found == sorted(found, key=lambda commit: commit[1]), "commits go by seq, and so do their steps"
    assert stats["checkpoints_committed"] == len(found) and stats["checkpoints_aborted"] == 0
    assert stats["checkpoints_committed"] + stats["checkpoints_skipped"] == STEPS
    assert (stats["checkpoints_skipped"] > 0) == (when_full == "skip")
    assert not caplog.records, "a skip is no failure and no reason to warn"


def test_one_rank_without_room_makes_all_ranks_skip_that_step_and_only_that(tmp_path: Path) -> None:
    options = {
        "max_in_flight": 1,
        "when_full": "skip",
        "keep_last": STEPS,
        "commit": {"on_failure": "raise", "timeout_s": 20.0},
    }
    ranks = job(slow("sync", 0.02), tmp_path, slow_rank=1, **options)
    stats = [each for _, each in ranks]
    assert stats[0]["checkpoints_skipped"] == stats[1]["checkpoints_skipped"] > 0
    assert stats[0]["checkpoints_committed"] == stats[1]["checkpoints_committed"] == len(seqs(tmp_path)) > 0
    assert stats[0]["checkpoints_aborted"] == 0
    for (tensors, _), plain in zip(ranks, expected(2), strict=True):
        assert differing(tensors, plain) == []
    folders = [path for path in tmp_path.glob("step_*")]
    assert all((path / "manifest.json").exists() for path in folders), "what the other rank had written of it is gone"


def test_waiting_for_a_step_that_was_skipped_says_so(tmp_path: Path) -> None:
    def run(transport: LocalTransport) -> None:
        model, optimizer = build(0)
        options = settings(str(tmp_path), max_in_flight=1, when_full="skip")
        env = slow("sync", 0.5)
        with assembly.assemble(model, optimizer, options, transport, env) as engine:
            for step in engine.steps(3):
                train(model, optimizer, 0, 0, step)
                if step == 2:
                    with pytest.raises(
                        errors.CommitError, match=r"step 2 was aborted: rank 0: 1 checkpoint is in flight .*'skip'"
                    ):
                        engine.wait(2, timeout=20)

    in_ranks(run, world=1)


torch.set_num_threads(1)


def test_a_commit_does_not_wait_for_the_next_update(tmp_path: Path) -> None:
    """Written while the forward's result is looked at, judged at the backward's first gradient, and nowhere else."""

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(0)
        env = slow("write", 0.05)
        with assembly.assemble(model, optimizer, settings(str(tmp_path), keep_last=9), transport, env) as engine:
            for step in engine.steps(5):
                loss = model(torch.randn(2, 6)).square().mean()
                if step == 4:
                    capture = workings_of(engine).captures.sealed[0]
                    assert not capture.settled
                    deadline = time.monotonic() + 60
                    while not capture.write.leases_over():
                        assert time.monotonic() < deadline
                        time.sleep(0.01)
                    workings_of(engine).participant.wait(3, "committed", 60)
                    time.sleep(0.1)
                    assert workings_of(engine).participant.reached("committed") == 3
                    loss.backward()
                    workings_of(engine).participant.wait(4, "committed", 60)
                else:
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    in_ranks(run, world=1, timeout_s=120)
