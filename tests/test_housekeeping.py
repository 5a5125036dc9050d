# SPDX-License-Identifier: Apache-2.0
"""Keeping a directory in order: what is pinned stays, what is pruned was not needed, and a copy needs nothing else."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.cli import call, call_json
from kit.commands import ROOT
from kit.shards import flip

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture import survey
from layerwise_dist.commit import copying, holding, pins, pruning
from layerwise_dist.commit.copying import CheckpointCopy
from layerwise_dist.commit.metadata import CheckpointMetadataManager, InDoubt
from layerwise_dist.storage import retention
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
    note = json.loads((root / "owner").read_text())
    (root / "owner").write_text(json.dumps({**note, "decided_on": "node7"}))
    with pytest.raises(errors.DirectoryError, match="rank 0, which was last on node7"):
        pins.pin(manager(root), found.model_copy(update={"places": [[0], [1]]}))
    shutil.rmtree(root / found.attempt_id.folder)
    with pytest.raises(errors.NotFoundError, match="removed"):
        pins.pin(manager(root), found)


# -- prune -----------------------------------------------------------------------------------------------------------


def test_prune_lists_what_would_go_and_removes_it_only_if_told(tmp_path: Path) -> None:
    train(tmp_path, 8, keep_last=8)
    call("pin", tmp_path, "--step", 2)
    before = tree(tmp_path)
    asked = ("--keep-last", 2, "--keep-every", 4)
    code, found = call_json("prune", tmp_path, *asked)
    assert code == 0 and found["dry_run"] and tree(tmp_path) == before
    verdicts = {entry["step"]: entry["verdict"] for entry in found["checkpoints"]}
    assert verdicts == {8: "stays", 7: "stays", 6: "goes", 5: "goes", 4: "stays", 3: "goes", 2: "stays", 1: "goes"}
    assert {entry["step"]: entry["why"] for entry in found["checkpoints"] if entry["why"]} == {
        8: "newest", 7: "of the newest 2", 4: "a multiple of 4", 2: "pinned",
    }  # fmt: skip
    text = call("prune", tmp_path, *asked)[1]
    assert "nothing was removed" in text and "4 of 8 checkpoints would go" in text
    code, found = call_json("prune", tmp_path, *asked, "--yes")
    assert code == 0 and not found["dry_run"] and steps(tmp_path) == [2, 4, 7, 8]
    assert len(list(tmp_path.glob("step_*"))) == 4 and call("verify", tmp_path)[0] == 0
    assert found["bytes"] == sum(len(data) for name, data in before.items() if "rank_" in name) // 2
    train(tmp_path, 9, keep_last=8)
    assert steps(tmp_path) == [2, 4, 7, 8, 9]


def test_prune_takes_the_rules_of_a_configuration_and_of_tags(tmp_path: Path) -> None:
    root, config = tmp_path / "checkpoints", tmp_path / "config.json"
    loop = Loop(root, keep_last=20)
    for step in range(1, 6):
        loop.to(step)
        loop.ckpt.save(f"global_step{step}")
    loop.ckpt.save("best")
    loop.ckpt.close()
    assert call("prune", root, "--yes")[0] == 2, "nobody said how many stay"
    config.write_text('{"keep_last": 1, "keep_every_n_steps": 2}')
    found = call_json("prune", root, "--config", config, "--tags", 2)[1]
    stays = [(entry["step"], entry["tag"]) for entry in found["checkpoints"] if entry["verdict"] == "stays"]
    assert stays == [(5, "best"), (5, "global_step5"), (4, "global_step4"), (4, None), (2, "global_step2"), (2, None)]
    found = call_json("prune", root, "--keep-last", 1, "--yes")[1]
    tags = {entry["tag"] for entry in found["checkpoints"] if entry["verdict"] == "stays"}
    assert tags == {"best", *(f"global_step{step}" for step in range(1, 6))}
    assert call("show", root, "--tag", "global_step3")[0] == call("verify", root, "--tag", "global_step3")[0] == 0


def test_prune_is_refused_while_a_job_runs(tmp_path: Path) -> None:
    loop = Loop(tmp_path, keep_last=5)
    loop.to(5)
    before = steps(tmp_path)
    code, text = call("prune", tmp_path, "--keep-last", 1, "--yes")
    assert code == 2 and f"pid {os.getpid()}" in text and steps(tmp_path) == before
    loop.to(6)  # it still owns the directory
    loop.ckpt.close()
    assert call("prune", tmp_path, "--keep-last", 1, "--yes")[0] == 0 and steps(tmp_path) == [6]


def test_a_job_that_starts_meanwhile_waits_for_the_end(tmp_path: Path) -> None:
    train(tmp_path, 3, keep_last=3)
    under_way = pruning.Pruning(manager(tmp_path), pruning.Kept(1, None, None))
    came: list[BaseException | list[int]] = []

    def job() -> None:
        try:
            train(tmp_path, 4, keep_last=3)
            came.append(steps(tmp_path))
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=job)
    thread.start()
    try:
        under_way.run(lambda manifest: None)
        assert steps(tmp_path) == [3] and not came
    finally:
        under_way.close()
    thread.join(60)
    assert came == [[3, 4]]


def test_what_somebody_reads_stays(tmp_path: Path) -> None:
    train(tmp_path, 3, keep_last=3)
    with holding.held(manager(tmp_path), attempt(tmp_path, 1)):
        code, found = call_json("prune", tmp_path, "--keep-last", 1, "--yes")
    assert code == 1 and steps(tmp_path) == [1, 3]
    assert [entry["why"] for entry in found["checkpoints"]] == ["newest", None, pruning.OPEN]


def shares_a_base(root: Path) -> None:
    """Steps 1 and 2 refer to one base, 3 and 4 to another."""
    train(root, 2, keep_last=9, frozen=True)
    loop = Loop(root, keep_last=9, frozen=True)
    with torch.no_grad():
        loop.model[0].weight.add_(1)
    loop.to(4)
    loop.ckpt.close()


@pytest.mark.usefixtures("frozen")
def test_bases_go_with_the_last_checkpoint_that_refers_to_them(tmp_path: Path) -> None:
    shares_a_base(tmp_path)
    first, second = sorted(path.name for path in (tmp_path / "base").iterdir())
    call("pin", tmp_path, "--step", 1)
    assert call_json("prune", tmp_path, "--keep-last", 1)[1]["bases"] == []
    assert call("prune", tmp_path, "--keep-last", 1, "--yes")[0] == 0
    assert steps(tmp_path) == [1, 4] and call("verify", tmp_path)[0] == 0
    call("unpin", tmp_path, "--step", 1)
    assert call_json("prune", tmp_path, "--keep-last", 1)[1]["bases"] == [first]
    assert call_json("prune", tmp_path, "--keep-last", 1, "--yes")[1]["bases"] == [first]
    assert [path.name for path in (tmp_path / "base").iterdir()] == [second] and call("verify", tmp_path)[0] == 0


@pytest.mark.usefixtures("frozen")
def test_mutation_bases_that_go_though_they_are_referred_to_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares_a_base(tmp_path)
    call("pin", tmp_path, "--step", 1)
    monkeypatch.setattr(
        "layerwise_dist.commit.metadata.unneeded_bases",
        lambda found, manifests, below=None: retention.unneeded_bases(found, [], below),
    )
    assert call("prune", tmp_path, "--keep-last", 1, "--yes")[0] == 0
    monkeypatch.undo()
    code, text = call("verify", tmp_path)
    assert code == 1 and "missing" in text


def stops_after(monkeypatch: pytest.MonkeyPatch, call_number: int) -> None:
    """Each call that changes a name is counted, and this one and all later ones fail: so the process may have died."""
    done = 0

    def counted(name: str) -> None:
        original = getattr(PosixEnv, name)

        def change(self: PosixEnv, *args: Any) -> Any:
            nonlocal done
            done += 1
            if done >= call_number:
                raise OSError(5, "the disk is gone", str(args[0]))
            return original(self, *args)

        monkeypatch.setattr(PosixEnv, name, change)

    for name in ("unlink", "remove_dir", "rename"):
        counted(name)


@pytest.mark.usefixtures("frozen")
def test_wherever_a_prune_ends_what_is_left_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tmp_path / "start"
    shares_a_base(start)
    ends = set[tuple[int, ...]]()
    for number in range(1, 99):
        root = Path(shutil.copytree(start, tmp_path / str(number)))
        with monkeypatch.context() as faults:
            stops_after(faults, number)
            code, _ = call("prune", root, "--keep-last", 1, "--yes")
        left = steps(root)
        assert left[-1] == 4 and call("verify", root)[0] == 0, number
        ends.add(tuple(left))
        if code == 0 and not list(root.glob("base/*"))[1:]:
            break
        assert call("prune", root, "--keep-last", 1, "--yes")[0] == 0 and steps(root) == [4]
        assert len(list(root.glob("step_*"))) == len(list(root.glob("base/*"))) == 1
    assert ends == {(1, 2, 3, 4), (2, 3, 4), (3, 4), (4,)} and number > 6


def test_mutation_shards_that_go_before_their_manifest_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 2, keep_last=2)
    withdraw = CheckpointMetadataManager.withdraw

    def too_late(self: CheckpointMetadataManager, attempt: AttemptId) -> None:
        os.unlink(os.path.join(self.folder(attempt), "rank_00000.safetensors"))
        raise InDoubt("the machine stops here")

    monkeypatch.setattr(CheckpointMetadataManager, "withdraw", too_late)
    assert call("prune", tmp_path, "--keep-last", 1, "--yes")[0] == 2
    monkeypatch.setattr(CheckpointMetadataManager, "withdraw", withdraw)
    assert call("verify", tmp_path)[0] == 1


def test_prune_removes_nothing_where_it_is_not_known_what_is_needed(tmp_path: Path) -> None:
    train(tmp_path, 4, keep_last=9)
    loop = lwd.attach(torch.nn.Linear(2, 2), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), enabled=False)
    loop.close()
    damaged = tmp_path / attempt(tmp_path, 3).folder / "manifest.json"
    damaged.write_bytes(b"{}" + damaged.read_bytes()[2:])
    code, found = call_json("prune", tmp_path, "--keep-last", 1, "--yes")
    assert code == 0 and steps(tmp_path) == [1, 2, 4]
    assert {entry["why"] for entry in found["checkpoints"]} == {"newest", "older than a damaged one"}
    branch = tmp_path / "branch_0000000099.json"
    branch.write_text("{}")
    code, text = call("prune", tmp_path, "--keep-last", 1, "--yes")
    assert code == 1 and "nothing is removed" in text and steps(tmp_path) == [1, 2, 4]
    branch.unlink()
    (tmp_path / "identity.json").unlink()
    assert call("prune", tmp_path, "--keep-last", 1, "--yes")[0] == 2


def test_disks_of_nodes_are_left_to_the_job(tmp_path: Path) -> None:
    train(tmp_path, 2)
    found = manager(tmp_path).inventory()
    manifests = {
        seq: manifest.model_copy(update={"places": [[0], [1]], "world_size": 2, "shards": [
            *manifest.shards, manifest.shards[0].model_copy(update={"rank": 1, "file": "rank_00001.safetensors"}),
        ]}) for seq, manifest in found.manifests.items()
    }  # fmt: skip
    with pytest.raises(errors.DirectoryError, match="on all nodes"):
        pruning.plan(manager(tmp_path), replace(found, manifests=manifests), pruning.Kept(1, None, None))
    with pytest.raises(errors.NotFoundError, match="on other nodes"):
        CheckpointCopy(manager(tmp_path), manifests[max(manifests)], str(tmp_path.parent / "copy"))


# -- cp --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("frozen")
def test_a_copy_restores_by_itself(tmp_path: Path) -> None:
    root, out = tmp_path / "checkpoints", tmp_path / "copy"
    wanted = train(root, 2, keep_last=9, frozen=True)
    train(root, 4, keep_last=9, frozen=True)
    before = tree(root)
    code, found = call_json("cp", root, out, "--step", 2)
    assert code == 0 and found["step"] == 2 and tree(root) == before
    assert len([file for file in found["files"] if file["file"].startswith("base/")]) == 1
    shutil.rmtree(root)
    assert call("verify", out)[0] == 0 and steps(out) == [2]
    loop = Loop(out, keep_last=9, frozen=True)
    assert all(torch.equal(loop.values()[name], value) for name, value in wanted.items())
    loop.to(3)
    loop.ckpt.close()
    assert steps(out) == [2, 3]


@pytest.mark.usefixtures("frozen")
def test_mutation_a_copy_without_its_base_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = tmp_path / "checkpoints", tmp_path / "copy"
    train(root, 2, frozen=True)
    files = copying._files
    monkeypatch.setattr(copying, "_files", lambda *args: (file for file in files(*args) if not file.base))
    assert call("cp", root, out)[0] == 0
    monkeypatch.undo()
    assert call("verify", out)[0] == 1


def test_a_copy_takes_what_restore_would_choose_or_what_is_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    loop = Loop(root, keep_last=9)
    loop.to(2)
    loop.ckpt.save("best")
    loop.to(3)
    call("pin", root, "--tag", "best")
    assert call_json("cp", root, tmp_path / "a")[1]["step"] == 3  # while the job runs
    assert call_json("cp", root, tmp_path / "b", "--tag", "best")[1]["tag"] == "best"
    loop.ckpt.close()
    assert not call_json("show", tmp_path / "b")[1]["pinned"], "a pin is of its directory"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*") if path.is_file()} == {0o600}


def test_a_copy_goes_nowhere_that_something_is_and_says_why(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    train(root, 1)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, words in (("there", "already"), ("link", "already"), ("no/copy", "no such directory"),
                       ("checkpoints/copy", "inside")):  # fmt: skip
        code, text = call("cp", root, tmp_path / out)
        assert code == 2 and words in text, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "link", "there"]


@pytest.mark.parametrize("hashed", [True, False])
def test_damage_is_told_from_a_copy_that_went_wrong_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: bool
) -> None:
    root, out = tmp_path / "checkpoints", tmp_path / "copy"
    train(root, 1, hash=hashed)
    verify = CheckpointCopy.verify

    def bad_disk(self: CheckpointCopy, advance: Any) -> None:
        flip(next(out.rglob("rank_00000.safetensors")), 4096 + 8)
        verify(self, advance)

    monkeypatch.setattr(CheckpointCopy, "verify", bad_disk)
    code, text = call("cp", root, out)
    assert code == 1 and "reads back differently from its new place" in text and not out.exists()
    monkeypatch.undo()
    if hashed:
        flip(next(root.rglob("rank_00000.safetensors")), 4096 + 8)
        code, text = call("cp", root, out)
        assert code == 1 and "was damaged before it was copied" in text and not out.exists()
    next(root.rglob("rank_00000.safetensors")).unlink()
    code, text = call("cp", root, out)
    assert code == 1 and "is missing" in text and not out.exists()


def test_mutation_a_copy_that_is_not_verified_may_be_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = tmp_path / "checkpoints", tmp_path / "copy"
    train(root, 1)
    monkeypatch.setattr(
        CheckpointCopy, "verify",
        lambda self, advance: flip(next(out.rglob("rank_00000.safetensors")), 4096 + 8),
    )  # fmt: skip
    assert call("cp", root, out)[0] == 0
    monkeypatch.undo()
    assert call("verify", out)[0] == 1


def test_wherever_a_copy_is_interrupted_nothing_of_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    train(root, 1)
    for name in ("make_dir", "create", "sync_dir", "write_file", "rename"):
        original = getattr(PosixEnv, name)
        for before in (True, False):

            def interrupted(self: PosixEnv, path: str, *args: Any) -> Any:
                if before or name == "create":  # noqa: B023
                    raise KeyboardInterrupt
                original(self, path, *args)  # noqa: B023
                raise KeyboardInterrupt

            with monkeypatch.context() as faults:
                faults.setattr(PosixEnv, name, interrupted)
                assert call("cp", root, tmp_path / "copy")[0] == 130
            assert not (tmp_path / "copy").exists(), (name, before)
    assert call("cp", root, tmp_path / "copy")[0] == 0


SLOW = """
import sys, time
from layerwise_dist.cli import main
from layerwise_dist.commit.copying import CheckpointCopy
def verify(self, advance):
    print("here", file=sys.stderr, flush=True)
    time.sleep(60)
CheckpointCopy.verify = verify
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_copy_and_nothing_of_it_stays(tmp_path: Path, number: int) -> None:
    root, out = tmp_path / "checkpoints", tmp_path / "copy"
    train(root, 1)
    command = [sys.executable, "-c", SLOW, "cp", str(root), str(out)]
    # After `&` a shell lets SIGINT be ignored, and that is inherited.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, preexec_fn=listening)
    try:
        assert job.stderr is not None and job.stderr.readline() == b"here\n"
        assert list(out.rglob("rank_*")) and not list(out.rglob("manifest.json")), "the manifest comes last"
        job.send_signal(number)
        said, told = job.communicate(timeout=30)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode == 130 and said == b"" and b"interrupted" in told and b"Traceback" not in told
    assert not out.exists()


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, who runs tests, may write anywhere: so the operating system's answer is put in."""
    root = tmp_path / "checkpoints"
    train(root, 2)
    before = tree(root)

    def refused(self: PosixEnv, path: str, *args: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    for name in ("write_file", "lock", "make_dir"):
        monkeypatch.setattr(PosixEnv, name, refused)
    commands = (("pin", root, "--step", 1), ("prune", root, "--keep-last", 1, "--yes"), ("cp", root, tmp_path / "copy"))
    for command in commands:
        code, text = call(*command)
        assert code == 2 and f"cannot {'copy' if command[0] == 'cp' else command[0]}" in text and "Permission" in text
    assert tree(root) == before and not (tmp_path / "copy").exists()
