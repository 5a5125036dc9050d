"""Keeping a directory in order: what is pinned stays, what is pruned was not needed, and a copy needs nothing else."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.cli import call, call_json

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture import survey
from layerwise_dist.commit import holding, pins
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.storage.filenames import AttemptId

torch.set_num_threads(1)


class Loop:
    """A training with a frozen part that checkpoints share, if asked for."""

    def __init__(self, root: Path, *, frozen: bool = False, **config: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        self.model[0].requires_grad_(not frozen)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.ckpt = lwd.attach(self.model, self.optimizer, dir=str(root), **config)
        self.ckpt.restore()

    def to(self, step: int) -> None:
        for _ in self.ckpt.steps(step):
            self.model(torch.ones(2, 8)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.ckpt.drain()

    def values(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def train(root: Path, step: int, **config: Any) -> dict[str, torch.Tensor]:
    loop = Loop(root, **config)
    loop.to(step)
    loop.ckpt.close()
    return loop.values()


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)


def steps(root: Path) -> list[int]:
    return sorted(manifest.step for manifest in manager(root).inventory().manifests.values())


def becomes(root: Path, expected: list[int]) -> None:
    """Retention comes behind the commit."""
    deadline = time.monotonic() + 30
    while steps(root) != expected:
        assert time.monotonic() < deadline, f"{steps(root)}, expected {expected}"
        time.sleep(0.005)


def manager(root: Path) -> CheckpointMetadataManager:
    return CheckpointMetadataManager(PosixEnv(), str(root))


def attempt(root: Path, step: int) -> AttemptId:
    return next(m.attempt_id for m in manager(root).inventory().manifests.values() if m.step == step)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -- pin -------------------------------------------------------------------------------------------------------------


def pinned_while_it_runs(root: Path) -> list[int]:
    """The steps that are left at the end of a training which keeps one, and whose second was pinned while it ran."""
    loop = Loop(root, keep_last=1)
    try:
        loop.to(2)
        assert call("pin", root, "--step", 2)[0] == 0
        loop.to(5)
    finally:
        loop.ckpt.close()
    return steps(root)


def test_a_running_job_keeps_what_is_pinned_and_lets_it_go_once_it_is_not(tmp_path: Path) -> None:
    loop = Loop(tmp_path, keep_last=1)
    loop.to(2)
    code, found = call_json("pin", tmp_path, "--step", 2)
    assert code == 0 and found["pinned"] and found["changed"]
    loop.to(5)
    becomes(tmp_path, [2, 5])
    code, found = call_json("pin", tmp_path, "--step", 2)
    assert code == 0 and not found["changed"], "pinned already"
    assert [(e["step"], e["pinned"]) for e in call_json("ls", tmp_path)[1]["checkpoints"]] == [(5, False), (2, True)]
    assert "pinned" in call("ls", tmp_path)[1] and "pinned" in call("show", tmp_path, "--step", 2)[1]
    assert call_json("unpin", tmp_path, "--step", 2)[1]["changed"]
    assert call_json("unpin", tmp_path, "--step", 2) == (0, {**found, "pinned": False, "changed": False})
    loop.to(6)
    loop.ckpt.close()
    assert steps(tmp_path) == [6]
    assert call("ls", tmp_path)[1].count("pinned") == 0 and len(list(tmp_path.glob("step_*"))) == 1


def test_the_next_session_keeps_what_is_pinned_and_a_pin_alone_is_no_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 2, keep_last=1)
    call("pin", tmp_path, "--step", 2)
    gone = tmp_path / AttemptId(1, 900, 7).folder
    gone.mkdir()
    (gone / "pinned").touch()
    train(tmp_path, 4, keep_last=1)
    assert steps(tmp_path) == [2, 4] and not gone.exists()


def test_mutation_a_retention_that_looks_for_no_pins_removes_what_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointMetadataManager, "pinned", lambda self, attempt: False)
    assert pinned_while_it_runs(tmp_path / "mutant") == [5]
    monkeypatch.undo()
    assert pinned_while_it_runs(tmp_path / "whole") == [2, 5]


def pinned_in_between(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool]:
    """The exit code of a pin that comes after retention has looked for one, and whether the checkpoint was kept."""
    monkeypatch.setattr(holding, "_PATIENCE_S", 0.0)
    codes: list[int] = []
    look = CheckpointMetadataManager.pinned

    def pinned(self: CheckpointMetadataManager, attempt: AttemptId) -> bool:
        found = look(self, attempt)
        if attempt.step == 1 and not codes:
            codes.append(-1)
            codes[0] = call("pin", root, "--step", 1)[0]
        return found

    monkeypatch.setattr(CheckpointMetadataManager, "pinned", pinned)
    train(root, 2, keep_last=1)
    return codes[0], 1 in steps(root)


def test_who_is_told_that_a_checkpoint_is_pinned_can_rely_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pinned_in_between(tmp_path, monkeypatch) == (2, False)


def test_mutation_without_the_hold_a_pin_comes_too_late_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointMetadataManager, "_hold_alone", lambda self, path: None)
    assert pinned_in_between(tmp_path, monkeypatch) == (0, False)


def test_a_checkpoint_that_somebody_reads_is_passed_by(tmp_path: Path) -> None:
    loop = Loop(tmp_path, keep_last=1)
    loop.to(1)
    with holding.held(manager(tmp_path), attempt(tmp_path, 1)):
        loop.to(3)
        becomes(tmp_path, [1, 3])
    loop.to(4)
    loop.ckpt.close()
    assert steps(tmp_path) == [4]


def test_what_cannot_be_pinned_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    train(root, 2)
    assert "--step or --tag" in call("pin", root)[1] and call("pin", root)[0] == 2
    assert call("pin", root, "--step", 9)[0] == 2 and call("pin", root, "--tag", "x")[0] == 2
    assert call("pin", root, "--step", 1, "--tag", "x")[0] == 2
    found = next(m for m in manager(root).inventory().manifests.values() if m.step == 1)
    (root / found.attempt_id.folder / "pinned").mkdir()
    assert call("pin", root, "--step", 1)[0] == 2
    code, text = call("unpin", root, "--step", 1)
    assert code == 2 and "pinned" in text
    (root / found.attempt_id.folder / "pinned").rmdir()
    with pytest.raises(errors.DirectoryError, match="rank 0"):
        apart = found.model_copy(update={"places": [[0], [1]], "epoch": 77})
        pins.pin(manager(root), apart)
    shutil.rmtree(root / found.attempt_id.folder)
    with pytest.raises(errors.NotFoundError, match="removed"):
        pins.pin(manager(root), found)
