# SPDX-License-Identifier: Apache-2.0
"""The last step of a run is saved, however its loop tells where it ends, and once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.chain import attach, equal, tensors
from kit.crash import build, in_ranks, settings, train
from torch import nn

from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.closing import Closing
from layerwise_dist.engine.engine import LayerwiseEngine
from layerwise_dist.engine.last_step import LastStep

pytestmark = pytest.mark.quick

Update = Callable[[torch.Tensor], None]


def by_steps(ckpt: LayerwiseEngine, total: int, update: Update, data: Any) -> None:
    for _ in ckpt.steps(total):
        update(torch.ones(2, 4))


def by_break(ckpt: LayerwiseEngine, total: int, update: Update, data: Any) -> None:
    for step in ckpt.steps(100):
        update(torch.ones(2, 4))
        if step + 1 == total:
            break


def by_end_step(ckpt: LayerwiseEngine, total: int, update: Update, data: Any) -> None:
    ckpt.explicit()
    while ckpt.completed < total:
        update(torch.ones(2, 4))
        ckpt.end_step()


def by_loader(ckpt: LayerwiseEngine, total: int, update: Update, data: Any) -> None:
    for number, batch in enumerate(data, 1):
        update(batch)
        if number == total:
            break


def by_forward(ckpt: LayerwiseEngine, total: int, update: Update, data: Any) -> None:
    for _ in range(total):
        update(torch.ones(2, 4))


LOOPS = [by_steps, by_break, by_end_step, by_loader, by_forward]


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.parent.name[5:15]) for path in root.glob("step_*/manifest.json"))


def job() -> tuple[nn.Module, torch.optim.Optimizer, Update]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())

    def update(x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, update


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("total", [7, 6])
def test_the_last_step_is_saved_once_and_is_what_the_job_held(
    tmp_path: Path, loop: Callable[..., None], total: int
) -> None:
    model, optimizer, update = job()
    data = torch.utils.data.DataLoader(list(torch.randn(20, 4)), batch_size=2)
    options = {"every_n_steps": 3, "commit": {"on_failure": "raise"}}
    with attach(model, optimizer, tmp_path, **options) as ckpt:
        loop(ckpt, total, update, data)
    held = tensors(model, optimizer)
    assert steps_in(tmp_path) == sorted({3, 6, total})
    model, optimizer, _ = job()
    with attach(model, optimizer, tmp_path, **options) as ckpt:
        assert ckpt.restore() == total
        assert equal(tensors(model, optimizer), held)
    assert steps_in(tmp_path) == sorted({3, 6, total}), "nothing was trained"


@pytest.mark.parametrize("loop", LOOPS)
def test_without_save_last_or_with_an_exception_on_its_way_it_is_not(tmp_path: Path, loop: Callable[..., None]) -> None:
    model, optimizer, update = job()
    data = list(torch.randn(20, 2, 4))
    with attach(model, optimizer, tmp_path / "off", every_n_steps=3, save_last=False) as ckpt:
        loop(ckpt, 5, update, data)
    assert steps_in(tmp_path / "off") == [3]
    model, optimizer, update = job()
    with pytest.raises(ZeroDivisionError):
        with attach(model, optimizer, tmp_path / "raised", every_n_steps=3) as ckpt:
            loop(ckpt, 4, update, data)
            ckpt.wait(3)
            raise ZeroDivisionError
    assert steps_in(tmp_path / "raised") == [3, 4][: 1 + (loop is by_steps)]


def test_all_ranks_save_it_whatever_became_of_the_one_before(tmp_path: Path) -> None:
    """With `when_full: skip` ranks may not agree which attempts found room; on the last one they do."""

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(transport.rank)
        options = settings(str(tmp_path), every_n_steps=2, when_full="skip", max_in_flight=1)
        with assembly.assemble(model, optimizer, options, transport, PosixEnv()) as engine:
            for step in engine.steps(31):
                train(model, optimizer, transport.rank, 0, step)

    in_ranks(run)
    assert steps_in(tmp_path)[-1] == 31


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "how"),
    [(by_steps, "pipelined_step"), (by_steps, "in_backward"), (by_steps, "several"), (by_loader, "whole"),
     (by_end_step, "whole")],
)  # fmt: skip
def test_it_waits_for_room_though_others_are_skipped(
    tmp_path: Path, loop: Callable[..., None], how: str, slow_s: float = 0.2
) -> None:
    """With `when_full: skip`, step 7 finds step 6 still in flight."""
    env = testing.FaultEnv(PosixEnv())
    env.delay("sync", "*/rank_*", slow_s)
    model, optimizer, update = job()
    data = torch.utils.data.DataLoader(list(torch.randn(20, 4)), batch_size=2)
    options = {"every_n_steps": 6, "when_full": "skip", "max_in_flight": 1}
    if how == "several":
        config = load_config({"dir": str(tmp_path), "keep_last": 100, **options})
        given = {"models": {"m": model}, "optimizers": {"o": optimizer}}
        made = assembly.assemble(None, None, config, LocalTransport(LocalHub(1), 0), env, **given)
    else:
        made = attach(model, optimizer, tmp_path, env, update=how, **options)
    with made as ckpt:
        loop(ckpt, 7, update, data)
    assert steps_in(tmp_path) == [6, 7]


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "how"), [(by_steps, "pipelined_step"), (by_loader, "whole")])
def test_mutation_a_last_step_that_waits_for_no_room_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: Callable[..., None], how: str
) -> None:
    opens = Attempts.open
    monkeypatch.setattr(Attempts, "open", lambda attempts, *given, patience_s: opens(attempts, *given))
    with pytest.raises(AssertionError):
        test_it_waits_for_room_though_others_are_skipped(tmp_path, loop, how, slow_s=1.0)


def test_it_is_an_error_if_it_cannot_be_saved(tmp_path: Path) -> None:
    env = testing.FaultEnv(PosixEnv())
    model, optimizer, update = job()
    ckpt = attach(model, optimizer, tmp_path, env, every_n_steps=3)
    by_end_step(ckpt, 4, update, None)
    ckpt.wait(3)
    env.fail(operation="sync", path_pattern="*rank_00000*", errno=5)
    with pytest.raises(errors.CommitError, match="step 4"):
        ckpt.close()
    assert steps_in(tmp_path) == [3]


def test_mutation_a_close_that_saves_only_what_is_due_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LastStep, "begins", lambda last: None)
    monkeypatch.setattr(Closing, "_close_boundary", lambda closing, seal, left: closing._boundary.close(seal=seal))
    for loop in LOOPS:
        with pytest.raises(AssertionError):
            test_the_last_step_is_saved_once_and_is_what_the_job_held(tmp_path / loop.__name__, loop, 7)
