# SPDX-License-Identifier: Apache-2.0
"""Callbacks hear of each commit and of each failure, on a thread of their own, and can't disturb the training."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import build, in_ranks, settings, train
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.engine.notices import Notices

torch.set_num_threads(1)


def attach(root: Path, env: Any = None, transport: Any = None, **config: Any) -> tuple[Any, nn.Module, Any]:
    model, optimizer = build(0)
    if env is None:
        return lwd.attach(model, optimizer, dir=str(root), **config), model, optimizer
    return assembly.assemble(model, optimizer, settings(str(root), **config), transport, env), model, optimizer


def test_each_commit_is_told_once_in_order_with_the_folder_that_holds_it(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, int]] = []
    ckpt, model, optimizer = attach(tmp_path, keep_last=9)

    def told(step: int, path: str) -> None:
        seen.append((step, (Path(path) / "manifest.json").is_file(), threading.get_ident()))

    ckpt.on_commit(told)
    ckpt.on_failure(lambda step, reason: pytest.fail(reason))
    with ckpt:
        for step in ckpt.steps(5):
            train(model, optimizer, 0, 0, step)
    assert [(step, there) for step, there, _ in seen] == [(step, True) for step in range(1, 6)]
    assert len({thread for *_, thread in seen}) == 1 and threading.get_ident() not in {thread for *_, thread in seen}
    with pytest.raises(errors.BoundaryError, match=r"on_commit\(\) after close"):
        ckpt.on_commit(told)


def test_what_a_callback_raises_is_logged_under_its_name_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    ckpt, model, optimizer = attach(tmp_path)

    def breaks(step: int, path: str) -> None:
        raise SystemExit("none of this job's business")

    ckpt.on_commit(breaks)
    ckpt.on_commit(lambda step, path: seen.append(step))
    with caplog.at_level(logging.ERROR, "layerwise_dist"), ckpt:
        for step in ckpt.steps(3):
            train(model, optimizer, 0, 0, step)
    assert seen == [1, 2, 3] and ckpt.committed_step == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "breaks failed at step 1: SystemExit: none of this job's business" in said[0]


def test_failures_are_told_and_the_end_of_all_checkpoints_once(tmp_path: Path) -> None:
    """On both ranks, though only rank 0's disk is broken."""
    broken = testing.FaultEnv(PosixEnv())
    broken.fail(operation="sync", path_pattern="*rank_00000*", errno=5)

    def run(transport: LocalTransport) -> list[tuple[int | None, str]]:
        heard: list[tuple[int | None, str]] = []
        model, optimizer = build(transport.rank)
        options = settings(str(tmp_path), commit={"raise_after": 2})
        env = PosixEnv() if transport.rank else broken
        ckpt = assembly.assemble(model, optimizer, options, transport, env)
        ckpt.on_failure(lambda step, reason: heard.append((step, reason)))
        with pytest.raises(errors.CommitError), ckpt:
            for step in ckpt.steps(10_000):
                if step == 1:
                    with pytest.raises(errors.CommitError):
                        ckpt.wait(1)
                    if transport.rank == 0:
                        broken.fail(operation="sync", path_pattern="*rank_00000*", errno=5)
                train(model, optimizer, transport.rank, 0, step)
        return heard

    for heard in in_ranks(run, world=2):
        assert heard[0][0] == 1 and "Input/output error" in heard[0][1]
        assert [step for step, _ in heard].count(None) == 1


def test_close_does_not_wait_for_ever_for_a_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()
    ckpt, model, optimizer = attach(tmp_path, commit={"timeout_s": 1.0})

    def hangs(step: int, path: str) -> None:
        go_on.wait()

    ckpt.on_commit(hangs)
    with caplog.at_level(logging.WARNING, "layerwise_dist"), ckpt:
        for step in ckpt.steps(1):
            train(model, optimizer, 0, 0, step)
    go_on.set()
    assert any("hangs did not finish" in record.getMessage() for record in caplog.records)


def test_only_what_can_be_called_is_taken(tmp_path: Path) -> None:
    with attach(tmp_path)[0] as ckpt:
        with pytest.raises(TypeError, match=r"on_failure\(\) takes a callable, not str"):
            ckpt.on_failure("mail me")


def test_mutation_a_close_that_does_not_wait_for_callbacks_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held back until after close(): what a close that waits for nothing would leave untold."""
    held = threading.Event()
    run = Notices._run
    monkeypatch.setattr(Notices, "_run", lambda notices: (held.wait(20), run(notices))[1])
    monkeypatch.setattr(Notices, "close", lambda notices, timeout_s: notices._queue.put(None))
    try:
        with pytest.raises(AssertionError):
            test_each_commit_is_told_once_in_order_with_the_folder_that_holds_it(tmp_path)
    finally:
        held.set()
