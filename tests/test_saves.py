# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a script asks for by name: `save()`, and `restore()` by tag."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import build, in_ranks, settings, tensors_of
from kit.shards import differing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.console import put
from layerwise_dist.cli.listing import ls
from layerwise_dist.cli.showing import show
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.engine.on_call import OnCall
from layerwise_dist.engine.restores import Restores
from layerwise_dist.storage import retention

pytestmark = pytest.mark.quick

CALLS = {"every_n_steps": None}


class Script:
    """A loop that tells nothing: batches and dropout come from the global generator."""

    def __init__(self, folder: Path, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.ckpt = lwd.attach(self.model, self.optimizer, dir=str(folder), **{**CALLS, **options})

    def train(self, steps: int) -> list[str]:
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(4, 3)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item().hex())
        return losses

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: Any) -> None:
        self.ckpt.__exit__(*error)


def commits(folder: Path) -> list[tuple[int, str | None]]:
    """(step, tag), oldest first."""
    manifests = CheckpointMetadataManager(PosixEnv(), str(folder), file_mode=0o600).inventory().manifests
    return [(manifest.step, manifest.tag) for _, manifest in sorted(manifests.items())]


@pytest.mark.parametrize("every", [None, 1, 2], ids=["only when asked", "every step", "every other step"])
def test_what_was_saved_comes_back_by_its_name_and_training_goes_on_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, every: int | None
) -> None:
    options = {"every_n_steps": every, "keep_last": 1}
    with Script(tmp_path / "other", **CALLS) as plain:
        losses = plain.train(7)
    with Script(tmp_path / "ckpt", **options) as script:
        assert script.train(3) == losses[:3]
        assert script.ckpt.save("best", {"epoch": 1, "history": [0.5, 0.25]}) == 3
        assert script.ckpt.committed_step == 3
        assert script.train(2) == losses[3:5]
        assert script.ckpt.save("last", {"epoch": 2}) == 5
    with Script(tmp_path / "ckpt", seed=1, **options) as script:
        assert script.ckpt.restore(saved=True) == 5 and script.ckpt.client_state == {"epoch": 2}
        assert script.train(2) == losses[5:]
    with Script(tmp_path / "ckpt", seed=1, **options) as script:
        assert script.ckpt.restore(tag="best") == 3 == script.ckpt.completed
        assert script.ckpt.client_state == {"epoch": 1, "history": [0.5, 0.25]}
        assert Path(script.ckpt.restored_from or "").name.startswith("step_0000000003-")
        assert script.train(4) == losses[3:]
    assert {"best", "last"} <= {tag for _, tag in commits(tmp_path / "ckpt")}, "retention takes none that has a name"
    inferred = [record for record in caplog.records if "is inferred" in record.message]
    assert bool(inferred) == (every is not None), "with calls alone it makes no difference how other ends are known"


def test_with_an_attached_loader_the_epoch_goes_on_where_it_was(tmp_path: Path) -> None:
    def train(folder: Path, seed: int, stop: int | None) -> tuple[list[str], bool]:
        torch.manual_seed(seed)
        data = TensorDataset(torch.arange(24.0).view(12, 2))
        loader = DataLoader(data, batch_size=3, shuffle=True)
        model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        losses: list[str] = []
        with lwd.attach(model, optimizer, dir=str(folder), state={"loader": loader}, **CALLS) as ckpt:
            ckpt.restore(saved=True)
            for _ in range(2):
                for (batch,) in loader:
                    loss = model(batch).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item().hex())
                    if stop is not None and ckpt.completed + 1 == stop:
                        ckpt.save("here")
                        return losses, True
        return losses, False

    whole, _ = train(tmp_path / "whole", 0, None)
    first, _ = train(tmp_path / "ckpt", 0, 2)
    rest, _ = train(tmp_path / "ckpt", 1, None)
    assert first == whole[:2] and rest[: len(whole) - 2] == whole[2:]


def test_the_same_step_may_be_saved_twice_and_a_name_given_anew(tmp_path: Path) -> None:
    with Script(tmp_path, keep_last=1) as script:
        assert script.ckpt.save("start") == 0, "before the first update"
        script.train(1)
        assert script.ckpt.save("last") == 1
        assert script.ckpt.save("best", {"twice": True}) == 1
        for _ in range(2):
            script.train(1)
            script.ckpt.save("last")
        live = tensors_of(script.model, script.optimizer)
    assert commits(tmp_path) == [(0, "start"), (1, "best"), (3, "last")], "the older ones under that name are gone"
    with Script(tmp_path, seed=1) as script:
        assert script.ckpt.restore(tag="best") == 1 and script.ckpt.client_state == {"twice": True}
        assert script.ckpt.restore(tag="last") == 3
        assert differing(tensors_of(script.model, script.optimizer), live) == []
        assert script.ckpt.restore(tag="start") == 0
        with pytest.raises(errors.NotFoundError, match=r"tag 'worst'; committed are \['best', 'last', 'start'\]"):
            script.ckpt.restore(tag="worst")


def save_many(folder: Path, **options: Any) -> list[tuple[int, str | None]]:
    """What stays of one tag for each of five steps, and of another two that are each alone of their kind."""
    with Script(folder, keep_last=1, **options) as script:
        for step in range(1, 6):
            script.train(1)
            if step == 1:
                script.ckpt.save("best")
            if step == 2:
                script.ckpt.save("epoch1-final")
            script.ckpt.save(f"global_step{step}")
    return commits(folder)


def test_of_tags_that_differ_in_their_digits_keep_tags_keeps_the_newest_and_all_others(tmp_path: Path) -> None:
    alone: list[tuple[int, str | None]] = [(1, "best"), (2, "epoch1-final")]
    assert save_many(tmp_path / "two", keep_tags=2) == [*alone, (4, "global_step4"), (5, "global_step5")]
    assert len(save_many(tmp_path / "all")) == 7
    with Script(tmp_path / "two", keep_tags=1) as script:
        assert script.ckpt.restore(tag="best") == 1
        with pytest.raises(errors.NotFoundError, match="global_step4"):
            script.ckpt.restore(tag="global_step3")


def test_mutation_a_retention_that_takes_all_tags_for_one_kind_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_series", lambda tag: "")
    assert (1, "best") not in save_many(tmp_path, keep_tags=2)


def test_what_is_saved_in_another_directory_leaves_nothing_open_and_the_training_as_it_was(tmp_path: Path) -> None:
    with Script(tmp_path / "plain", every_n_steps=1) as script:
        losses = script.train(6)
    open_at_first = 0
    with Script(tmp_path / "here", every_n_steps=1) as script:
        found = []
        for step in range(1, 7):
            found += script.train(1)
            OnCall(workings_of(script.ckpt), "").save(str(tmp_path / "best"), f"at{step}", {"at": step})
            held = len(os.listdir("/proc/self/fd")) + threading.active_count()
            open_at_first = open_at_first or held
            assert held <= open_at_first + 2, "what a call opens it closes"
        (tmp_path / "file").touch()
        with pytest.raises(errors.DirectoryError):
            OnCall(workings_of(script.ckpt), "").save(str(tmp_path / "file"), "best", None)
    assert found == losses
    assert [step for step, _ in commits(tmp_path / "here")] == [5, 6]
    assert commits(tmp_path / "best") == [(step, f"at{step}") for step in range(1, 7)], "one lineage, all tags"
    with Script(tmp_path / "best", seed=1) as script:
        assert script.ckpt.restore(tag="at4") == 4 and script.ckpt.client_state == {"at": 4}
        assert script.train(2) == losses[4:]


def test_mutation_a_session_that_does_not_follow_what_is_there_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Restores, "begin_after_newest", lambda self: None)
    with pytest.raises(errors.BoundaryError, match="already holds checkpoints"):
        test_what_is_saved_in_another_directory_leaves_nothing_open_and_the_training_as_it_was(tmp_path)


def test_without_a_tag_only_what_was_saved_by_name_counts(tmp_path: Path) -> None:
    with Script(tmp_path, every_n_steps=1, keep_last=9) as script:
        script.train(2)
    with Script(tmp_path, every_n_steps=1, keep_last=9) as script:
        assert script.ckpt.restore(saved=True) == 0 and script.ckpt.restored_from is None
        script.train(1)  # a new lineage, since none was chosen
        script.ckpt.save("mine")
        script.train(3)
    with Script(tmp_path, every_n_steps=1, keep_last=9) as script:
        assert script.ckpt.restore(saved=True) == 1, "and not the newer ones that were made by themselves"
        script.train(1)
        live = tensors_of(script.model, script.optimizer)
    with Script(tmp_path, seed=1, every_n_steps=1, keep_last=9) as script:
        assert script.ckpt.restore() == 2, "what had come after it was left behind"
        assert differing(tensors_of(script.model, script.optimizer), live) == []
        assert script.ckpt.client_state is None


def test_a_tag_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Script(tmp_path) as script:
        script.train(1)
        script.ckpt.save("global_step1")
    catalogue = Catalogue(str(tmp_path))
    listed = ls(catalogue)
    assert listed.data["checkpoints"][0]["tag"] == "global_step1"
    put(listed, False)
    assert "global_step1" in capsys.readouterr().out
    assert show(catalogue, None, False).data["manifest"]["tag"] == "global_step1"


def test_misuse_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    with Script(tmp_path) as script:
        script.train(1)
        with pytest.raises(errors.StateError, match=r"client_state\['bad'\]"):
            script.ckpt.save("a", {"bad": object()})
        with pytest.raises(ValueError, match="printable"):
            script.ckpt.save("a\nb")
        with pytest.raises(ValueError, match="one of step, tag and saved"):
            script.ckpt.restore(3, tag="a")
        assert script.ckpt.completed == 0 and commits(tmp_path) == []
        assert script.ckpt.save("a") == 1
    with pytest.raises(errors.BoundaryError, match="after close"):
        script.ckpt.save("b")
    with Script(tmp_path) as script:
        with pytest.raises(errors.BoundaryError, match=r"call restore\(\) before"):
            script.ckpt.save("b")
        script.ckpt.restore()
        for _ in script.ckpt.steps(2):
            script.train(1)
            with pytest.raises(errors.BoundaryError, match="within an iteration whose end is marked by steps"):
                script.ckpt.save("b")
    assert commits(tmp_path) == [(1, "a")]


def ranks(folder: Path, run: Any, envs: tuple[Any, ...] = (None, None), **options: Any) -> list[Any]:
    """`run(engine, model, optimizer, rank)` on two ranks."""

    def one(transport: LocalTransport) -> Any:
        model, optimizer = build(transport.rank)
        config = settings(str(folder), **{**CALLS, **options})
        with assembly.assemble(model, optimizer, config, transport, envs[transport.rank] or PosixEnv()) as engine:
            return run(engine, model, optimizer, transport.rank)

    return in_ranks(one, world=len(envs), timeout_s=60)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()


def test_ranks_that_disagree_are_told_so_and_can_still_save(tmp_path: Path) -> None:
    def run(engine: Any, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> list[str]:
        update(model, optimizer)
        said = []
        for tag, state in ((f"of rank {rank}", {}), ("same", {"bad": object()} if rank else {})):
            with pytest.raises((errors.BoundaryError, errors.StateError)) as caught:
                engine.save(tag, state)
            said.append(str(caught.value))
        assert engine.save("same", {"rank": rank}) == 1
        return said

    for different, unwritable in ranks(tmp_path, run):
        assert "different tags on different ranks: ['of rank 0', 'of rank 1']" in different
        assert "rank 1" in unwritable and "client_state['bad']" in unwritable
    assert commits(tmp_path) == [(1, "same")]


def test_a_capture_that_one_rank_could_not_open_is_opened_anew_on_all(tmp_path: Path) -> None:
    def run(engine: Any, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
        update(model, optimizer)
        model(torch.ones(2, 6))
        adapter = workings_of(engine).adapter
        real = adapter.begin

        def begin(*args: Any) -> Any:
            adapter.begin = real
            raise OSError(12, "Cannot allocate memory")

        if rank:
            adapter.begin = begin
        update(model, optimizer)
        assert (workings_of(engine).captures.open is None) == bool(rank)
        assert engine.save("here") == 2

    ranks(tmp_path, run, every_n_steps=1, commit={"on_failure": "warn", "timeout_s": 30.0})
    assert commits(tmp_path)[-1] == (2, "here")


def test_a_save_that_fails_says_so_on_all_ranks_and_the_next_one_works(tmp_path: Path) -> None:
    env = testing.FaultEnv(PosixEnv())

    def run(engine: Any, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
        update(model, optimizer)
        if rank:
            env.fail(operation="sync", path_pattern="*rank_00001*", errno=5)
        with pytest.raises(errors.CommitError, match="rank 1"):
            engine.save("first")
        assert engine.save("second") == 1

    ranks(tmp_path, run, envs=(None, env), commit={"on_failure": "warn", "timeout_s": 30.0})
    assert commits(tmp_path) == [(1, "second")]
