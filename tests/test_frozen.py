# SPDX-License-Identifier: Apache-2.0
"""A frozen base is written once, and referred to as long as it is what the memory holds; then it is written again."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import numpy as np
import pytest
import torch
from kit.cli import call, call_json
from kit.runners import Warm
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture import audit, base_writing, survey
from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.session import Committer
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.storage import frozen_file as storage_base

sys.path.insert(0, str(Path(__file__).parent / "jobs"))
import lora  # noqa: E402
from job_kit import contents, differences  # noqa: E402
from several import Gan  # noqa: E402
from several import trial as several_trial  # noqa: E402

torch.set_num_threads(1)
BLOCKS = {"writer": {"block_kb": 4}}


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)


def steps(job: lora.Job, ckpt: Any, upto: int) -> None:
    for _ in ckpt.steps(upto):
        job.step()


def manifests(root: Path) -> dict[int, Manifest]:
    """By step; of several with one step the newest."""
    found = CheckpointMetadataManager(PosixEnv(), str(root)).inventory().manifests
    return {manifest.step: manifest for _, manifest in sorted(found.items())}


def bases(root: Path) -> set[str]:
    return {path.name for path in (root / "base").iterdir()} if (root / "base").exists() else set()


def resumed(root: Path, job: lora.Job, expected: dict[str, Any], **options: Any) -> None:
    """What `job` holds after a restore is `expected`."""
    with lwd.attach(job.model, job.optimizer, dir=str(root), **options) as ckpt:
        ckpt.restore()
        # Random numbers are put back when the loop begins.
        assert [name for name in differences(job.contents(), expected) if name != "rng"] == []


# -- written once ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    "options",
    [{}, {"audit": "always"}, {"capture": "stage"}, {"hash": False}, {"update": "in_backward"}, BLOCKS],
    ids=str,
)
def test_adapters_train_and_resume_bit_for_bit_with_and_without_checkpoints(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    assert lora.trial("plain", str(tmp_path), **options) == []


def test_adapters_under_ddp_and_fsdp2_train_and_resume_bit_for_bit(warm: Warm, tmp_path: Path) -> None:
    warm.run("lora.py", 2, tmp_path, "ddp", "fsdp2", timeout=60)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"ddp": [], "fsdp2": []}


@pytest.mark.usefixtures("any_size")
def test_mutation_a_base_that_is_never_looked_at_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrozenBases, "_changes", lambda bases, found: set())
    problems = lora.trial("plain", str(tmp_path))
    assert any("resumed" in problem for problem in problems)


@pytest.mark.parametrize("all_params", [True, False], ids=["all in the optimizer", "adapters only"])
def test_each_checkpoint_writes_the_adapters_only(tmp_path: Path, all_params: bool) -> None:
    job = lora.Job("plain", 1, 29_000, all_params=all_params)  # 2.3 MB of frozen weights
    frozen = sum(p.numel() * 4 for p in job.model.parameters() if not p.requires_grad)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), keep_last=3) as ckpt:
        steps(job, ckpt, 2)
        ckpt.wait(2)
        before = ckpt.stats()
        steps(job, ckpt, 7)
    stats = ckpt.stats()
    assert stats["bases_written"] == 1 and stats["base_bytes"] >= frozen > 2 << 20
    trained = sum(p.numel() * 4 for p in job.model.parameters() if p.requires_grad)
    assert stats["bytes_written"] - before["bytes_written"] < 5 * (3 * trained + 40_000) < 5 * frozen
    (folder,) = (tmp_path / "base").iterdir()
    assert (folder / "rank_00000.safetensors").stat().st_size == stats["base_bytes"]
    assert {base for manifest in manifests(tmp_path).values() for base in manifest.bases} == {folder.name}
    resumed(tmp_path, lora.Job("plain", 2, 29_000, all_params=all_params), job.contents())


def test_little_that_is_frozen_stays_in_the_shard(tmp_path: Path) -> None:
    job = lora.Job("plain", 1, 9_000)  # 0.7 MB
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path)) as ckpt:
        steps(job, ckpt, 2)
    assert ckpt.stats()["bases_written"] == 0 and not bases(tmp_path) and not manifests(tmp_path)[2].bases


@pytest.mark.usefixtures("any_size")
def test_memory_that_is_not_the_hosts_is_copied_as_a_device_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `stage.Copies`, into blocks that other memory may have a part of."""
    monkeypatch.setattr(base_writing, "on_host", lambda tensor: tensor.numel() % 2 == 0)
    monkeypatch.setattr(storage_base, "_RUN_BYTES", 12_000)
    assert lora.trial("plain", str(tmp_path), **BLOCKS) == []
    job = lora.Job("plain", 1, 999)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path / "more"), **BLOCKS) as ckpt:
        steps(job, ckpt, 2)
    resumed(tmp_path / "more", lora.Job("plain", 2, 999), job.contents())


# -- and again ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_size")
def test_unfreezing_writes_what_is_still_frozen_again(tmp_path: Path) -> None:
    def unfreeze(job: lora.Job) -> None:
        job.net[3].base.requires_grad_(True)
        job.optimizer.add_param_group({"params": list(job.net[3].base.parameters()), "lr": 0.02})

    def train(job: lora.Job, loop: Any) -> None:
        for step in loop:
            job.step()
            if step == 3:
                unfreeze(job)  # after the update: step 4 is saved as it was when that was made

    make = {"wrapper": "plain", "seed": 1, "width": 500, "all_params": False}
    plain = lora.Job(**make)
    train(plain, range(8))
    job = lora.Job(**make)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), keep_last=8, commit={"on_failure": "raise"}) as ckpt:
        train(job, ckpt.steps(8))
        assert ckpt.stats()["bases_written"] == 2
    assert differences(job.contents(), plain.contents()) == []
    found = manifests(tmp_path)
    assert found[8].base_nbytes < found[2].base_nbytes and found[8].bases > found[2].bases
    job = lora.Job(**make)
    unfreeze(job)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path)) as ckpt:
        assert ckpt.restore(6) == 6
        train(job, ckpt.steps(8))
        assert ckpt.stats()["bases_written"] == 0
    assert differences(job.contents(), plain.contents()) == []


@pytest.mark.usefixtures("any_size")
def test_requires_grad_alone_is_enough_if_the_optimizer_has_it_all(tmp_path: Path) -> None:
    job = lora.Job("plain", 1)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), commit={"on_failure": "raise"}) as ckpt:
        steps(job, ckpt, 4)
        job.net[3].base.requires_grad_(True)
        steps(job, ckpt, 7)
        assert ckpt.stats()["bases_written"] == 2
    resumed(tmp_path, lora.Job("plain", 2), job.contents())


@pytest.mark.usefixtures("any_size")
def test_a_write_that_no_counter_shows_is_found_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = lora.Job("plain", 1, 2_000)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), commit={"on_failure": "raise"}, **BLOCKS) as ckpt:
        steps(job, ckpt, 2)
        job.net[0].base.weight.data.add_(1)  # all is looked at in the first checkpoints of a base
        steps(job, ckpt, 3)
        assert ckpt.stats()["bases_written"] == 2 and "param/0.base.weight changed without raising" in caplog.text
        steps(job, ckpt, 3 + audit.FULL_FIRST)
        caplog.clear()
        job.net[3].base.weight.detach().numpy().view(np.int32)[-1, -1] ^= 1
        blocks = -(-int(ckpt.stats()["base_bytes"]) // 4096)
        assert 20 < blocks < audit.ROUND
        steps(job, ckpt, ckpt.completed + blocks)
        assert ckpt.stats()["bases_written"] == 3 and "param/3.base.weight changed without raising" in caplog.text
    resumed(tmp_path, lora.Job("plain", 2, 2_000), job.contents())


@pytest.mark.usefixtures("any_size")
def test_what_moved_and_is_the_same_is_not_written_again(tmp_path: Path) -> None:
    job = lora.Job("plain", 1)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path)) as ckpt:
        steps(job, ckpt, 4)
        for param in job.net[0].base.parameters():
            param.data = param.data.clone()
        with torch.no_grad():
            job.net[3].base.weight.add_(0)
        steps(job, ckpt, 6)
        assert ckpt.stats()["bases_written"] == 1
        with torch.no_grad():
            job.net[0].base.weight.add_(1)
        steps(job, ckpt, 8)
        assert ckpt.stats()["bases_written"] == 2
    resumed(tmp_path, lora.Job("plain", 2), job.contents())


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("seen", [True, False], ids=["in place", ".data"])
def test_an_average_of_weights_is_no_base(tmp_path: Path, seen: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It changes in every iteration, and every checkpoint is right; soon it is copied with each of them."""

    def follow(average: nn.Module, net: nn.Module) -> None:
        for mine, live in zip(average.parameters(), net.parameters(), strict=True):
            (mine if seen else mine.data).mul_(0.9).add_(live.detach(), alpha=0.1)

    torch.manual_seed(0)
    net, average = nn.Linear(61, 67), nn.Linear(61, 67).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    kept = {}
    slow = testing.FaultEnv(PosixEnv())
    slow.delay("write", "*/base/*", 0.02)
    config = load_config({"dir": str(tmp_path), "keep_last": 9, "commit": {"on_failure": "raise"}, **BLOCKS})
    models, transport = {"net": net, "average": average}, LocalTransport(LocalHub(1), 0)
    with (
        assembly.assemble(None, optimizer, config, transport, slow, models=models) as ckpt,
        caplog.at_level(logging.INFO),
    ):
        for step in ckpt.steps(7):
            net(torch.randn(3, 61)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            follow(average, net)
            kept[step + 1] = contents(nn.ModuleDict(models), optimizer)
            if step:
                ckpt.wait(step)
        ckpt.wait(7)
        assert ckpt.stats()["bases_written"] == 3 and ckpt.stats()["checkpoints_committed"] == 7
    assert "param/average.weight" in caplog.text and "copied at the boundary from now on" in caplog.text
    assert [bool(manifests(tmp_path)[step].bases) for step in range(1, 8)] == [True] * 3 + [False] * 4
    for step in range(1, 8):
        with lwd.attach(models=models, optimizer=optimizer, dir=str(tmp_path)) as ckpt:
            ckpt.restore(step)
            assert [n for n in differences(contents(nn.ModuleDict(models), optimizer), kept[step]) if n != "rng"] == []


@pytest.mark.usefixtures("any_size")
def test_several_models_resume_from_every_step_whatever_is_a_base(tmp_path: Path) -> None:
    assert several_trial(Gan, str(tmp_path)) == []


# -- while it is being written -----------------------------------------------------------------------------------------


class Slow:
    """A plain job whose bases take their time: `slow` is whether they do now."""

    def __init__(self, root: Path, width: int = 600) -> None:
        self.env = testing.FaultEnv(PosixEnv())
        self.job = lora.Job("plain", 1, width, all_params=False)
        self.notes: dict[str, Any] = {}
        settings = load_config({"dir": str(root), "keep_last": 20, "commit": {"timeout_s": 20.0}, **BLOCKS})
        self.ckpt = assembly.assemble(
            self.job.model, self.job.optimizer, settings, LocalTransport(LocalHub(1), 0), self.env,
            state={"notes": self.notes},
        )  # fmt: skip

    def slow(self, seconds: float) -> None:
        self.env.delay("write", "*/base/*", seconds)

    @property
    def read(self) -> bool:
        """Whether nothing reads the model's memory for a base."""
        return not workings_of(self.ckpt).frozen.is_read

    def another(self) -> None:
        """The next checkpoint writes another base, of fewer tensors."""
        self.job.net[3].base.bias.requires_grad_(True)
        self.job.optimizer.add_param_group({"params": [self.job.net[3].base.bias]})

    def steps(self, upto: int) -> None:
        for _ in self.ckpt.steps(upto):
            self.job.step()


@pytest.fixture
def slow(tmp_path: Path, any_size: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    monkeypatch.setattr(storage_base, "_RUN_BYTES", 4 * 4096)  # of 60 KiB or so
    made = Slow(tmp_path)
    yield made
    made.env.clear()
    made.ckpt.close()


def test_a_base_is_written_beside_training_once_the_first_checkpoints_are_over(slow: Slow, tmp_path: Path) -> None:
    slow.slow(0.05)
    slow.steps(1)
    assert slow.read, "the first is audited in full, and so written before its boundary is over"
    slow.steps(4)
    slow.another()
    slow.slow(1.0)
    slow.steps(6)
    assert not slow.read
    slow.env.clear()
    slow.ckpt.wait(6)
    assert slow.ckpt.stats()["bases_written"] == 2 and slow.ckpt.stats()["checkpoints_aborted"] == 0
    expected = slow.job.contents()
    slow.ckpt.close()
    again = lora.Job("plain", 2, 600, all_params=False)
    slow.job = again
    slow.another()
    resumed(tmp_path, again, expected, state={"notes": {}})


@pytest.mark.parametrize("seen", [True, False], ids=["in place", ".data"])
def test_what_changes_while_it_is_being_written_ends_those_checkpoints_and_no_other(
    slow: Slow, tmp_path: Path, caplog: pytest.LogCaptureFixture, seen: bool
) -> None:
    slow.steps(4)
    slow.ckpt.wait(4)
    slow.another()
    slow.slow(20.0)
    slow.steps(5)
    weight = slow.job.net[0].base.weight
    with torch.no_grad():
        (weight if seen else weight.data)[-1].add_(1)
    slow.env.clear()
    slow.steps(6)
    slow.ckpt.wait(6)
    assert re.search("step 5 failed: .*param/0.base.weight.* changed after the boundary", caplog.text)
    assert sorted(manifests(tmp_path)) == [1, 2, 3, 4, 6] and len(bases(tmp_path)) == 2


@pytest.mark.parametrize("fenced", [True, False], ids=["as it is", "mutation: without the fence"])
def test_unfreezing_waits_for_a_base_that_is_being_read(
    slow: Slow, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    if not fenced:
        monkeypatch.setattr(FrozenBases, "before_update", lambda bases, trained: None)
    slow.steps(4)
    slow.another()
    slow.slow(0.1)
    slow.steps(5)
    slow.job.net[0].base.requires_grad_(True)
    slow.job.optimizer.add_param_group({"params": list(slow.job.net[0].base.parameters())})
    slow.steps(6)
    slow.env.clear()
    slow.ckpt.wait(6)
    assert slow.ckpt.stats()["checkpoints_aborted"] == (0 if fenced else 1)


def test_closing_gives_up_a_base_that_nothing_waits_for(slow: Slow, tmp_path: Path) -> None:
    """The attempt that wanted it was given up before it was sealed: by a state that cannot be written."""
    slow.steps(4)
    slow.ckpt.wait(4)
    slow.another()
    slow.slow(0.5)
    slow.notes["bad"] = object()
    slow.steps(5)
    assert not slow.read
    with pytest.raises(errors.CommitError, match="the last checkpoint is not committed .* step 4.*: .* of step 5"):
        slow.ckpt.close()
    assert slow.read and "0000000100000005" not in bases(tmp_path)


# -- failures ----------------------------------------------------------------------------------------------------------

OPERATIONS = ["make_dir", "create", "allocate", "write", "sync", "rename", "sync_dir"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_base_that_cannot_be_written_ends_its_checkpoint_and_the_next_writes_another(
    tmp_path: Path, any_size: None, operation: str, number: int
) -> None:
    slow = Slow(tmp_path, 60)
    with slow.ckpt as ckpt:
        slow.steps(1)
        ckpt.wait(1)
        with torch.no_grad():
            slow.job.net[0].base.weight.add_(1)
        slow.env.fail(operation=operation, path_pattern="*/base/0000000100000002*", errno=number)
        slow.steps(2)
        with pytest.raises(errors.CommitError, match="step 2 was aborted"):
            ckpt.wait(2)
        assert slow.env.injected == 1
        slow.steps(4)
        ckpt.wait(4)
        assert ckpt.stats()["checkpoints_aborted"] == 1 and ckpt.stats()["checkpoints_committed"] == 3
    of_it = [line.split()[0] for line in slow.env.trace() if "/base/0000000100000002" in line]
    assert of_it.count("sync") <= 1, "a flush that failed is never tried again"
    assert bases(tmp_path) == {"0000000100000001", "0000000100000003"}
    assert [manifest.bases for _, manifest in sorted(manifests(tmp_path).items())] == [
        ["0000000100000001"], ["0000000100000003"], ["0000000100000003"],
    ]  # fmt: skip
    resumed(tmp_path, lora.Job("plain", 2, 60, all_params=False), slow.job.contents(), state={"notes": {}})


def test_a_base_outlives_the_checkpoint_that_made_it(tmp_path: Path, any_size: None) -> None:
    slow = Slow(tmp_path, 60)
    slow.env.fail(operation="sync", path_pattern="*/step_0000000001-*")
    with slow.ckpt as ckpt:
        slow.steps(1)
        with pytest.raises(errors.CommitError, match="step 1 was aborted"):
            ckpt.wait(1)
        slow.steps(3)
    found = manifests(tmp_path)
    assert sorted(found) == [2, 3] and ckpt.stats()["bases_written"] == 1
    assert found[2].bases == found[3].bases == ["0000000100000001"]
    resumed(tmp_path, lora.Job("plain", 2, 60, all_params=False), slow.job.contents(), state={"notes": {}})


# -- references --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_size")
def test_branches_share_a_base_and_the_last_checkpoint_that_needs_it_takes_it_along(tmp_path: Path) -> None:
    def run(upto: int, keep_last: int, restore: int | None = None, merge: bool = False) -> None:
        job = lora.Job("plain", 1)
        with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), keep_last=keep_last) as ckpt:
            ckpt.restore(restore)
            if merge:
                job.net[0].merge()
            for step in ckpt.steps(upto):
                job.step()
                ckpt.wait(step) if step > ckpt.completed else None
            ckpt.wait(upto)

    run(3, 9)
    (first,) = bases(tmp_path)
    run(4, 9, restore=2)  # a branch, which refers to what it found
    assert bases(tmp_path) == {first}
    run(5, 9, restore=1, merge=True)
    (second,) = bases(tmp_path) - {first}
    found = CheckpointMetadataManager(PosixEnv(), str(tmp_path)).inventory()
    assert [manifest.bases for _, manifest in sorted(found.manifests.items())][-4:] == [[second]] * 4
    assert sum(manifest.bases == [first] for manifest in found.manifests.values()) >= 5
    run(6, 2)  # what is older, and both other branches, go with it; the last of them needs the first base no more
    left = CheckpointMetadataManager(PosixEnv(), str(tmp_path)).inventory()
    assert sorted(m.step for m in left.manifests.values()) == [5, 6] and left.bases == [second]


def _at_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    collect = CheckpointMetadataManager.collect_leftovers

    def all_known(self: CheckpointMetadataManager, found: Inventory, kept: Any = ()) -> None:
        collect(self, replace(found, damaged={}), kept)

    monkeypatch.setattr(CheckpointMetadataManager, "collect_leftovers", all_known)


def _beside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    unneeded = Committer.unneeded

    def all_known(self: Committer) -> list[str]:
        if self._known is not None:
            self._known.damaged.clear()
        return unneeded(self)

    monkeypatch.setattr(Committer, "unneeded", all_known)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("careless", [None, _at_a_start, _beside_a_job])
def test_a_start_removes_what_nothing_refers_to_unless_a_manifest_is_damaged(
    tmp_path: Path, careless: Callable[[pytest.MonkeyPatch], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lora.Job("plain", 1)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), keep_last=5) as ckpt:
        steps(job, ckpt, 2)
        job.net[0].merge()
        steps(job, ckpt, 3)
    first, second = sorted(bases(tmp_path))
    (tmp_path / "base" / "00000001000000ff").mkdir()
    (tmp_path / "base" / "00000001000000ff" / "rank_00000.safetensors").write_bytes(b"left")
    (tmp_path / "base" / "of somebody else").mkdir()
    path = next(tmp_path.glob("step_0000000001-*/manifest.json"))
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])

    def start() -> None:
        job = lora.Job("plain", 2)
        with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), keep_last=1) as ckpt:
            ckpt.restore()
            steps(job, ckpt, ckpt.completed + 1)

    start()
    assert {first, second, "00000001000000ff"} < bases(tmp_path), "what the damaged one refers to is not known"
    if careless is not None:
        careless(monkeypatch)
        start()
        assert first not in bases(tmp_path)
        return
    path.write_bytes(good)
    start()
    assert bases(tmp_path) == {second, "of somebody else"}, "once it is mended it goes by the ordinary rule"


@pytest.mark.usefixtures("any_size")
def test_a_restore_of_something_else_forgets_the_base(tmp_path: Path) -> None:
    job = lora.Job("plain", 1)
    with lwd.attach(job.model, job.optimizer, dir=str(tmp_path), keep_last=9) as ckpt:
        steps(job, ckpt, 2)
        job.net[0].merge()
        steps(job, ckpt, 4)
        ckpt.wait(4)
        first, second = sorted(bases(tmp_path))
        ckpt.restore(2)
        steps(job, ckpt, 3)
        ckpt.wait(3)
        assert manifests(tmp_path)[3].bases == [first] and ckpt.stats()["bases_written"] == 2
    resumed(tmp_path, lora.Job("plain", 2), job.contents())


# -- damage, and who else reads it -------------------------------------------------------------------------------------


@pytest.fixture
def two_bases(tmp_path: Path, any_size: None) -> Path:
    """Steps 1 and 2 refer to one, 3 and 4 to another."""
    job = lora.Job("plain", 1, 300)
    root = tmp_path / "checkpoints"
    with lwd.attach(job.model, job.optimizer, dir=str(root), keep_last=9) as ckpt:
        steps(job, ckpt, 2)
        job.net[0].merge()
        steps(job, ckpt, 4)
    return root


def harm(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    else:
        data[len(data) - 5000 if how == "data" else 60] ^= 1
        path.write_bytes(data if how != "cut" else data[:-4096])


@pytest.mark.parametrize("how", ["data", "header", "cut", "missing"])
def test_a_damaged_base_is_the_damage_of_all_that_refer_to_it(
    two_bases: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    path = two_bases / "base" / max(bases(two_bases)) / "rank_00000.safetensors"
    harm(path, how)
    job = lora.Job("plain", 2, 300)
    with lwd.attach(job.model, job.optimizer, dir=str(two_bases)) as ckpt:
        assert ckpt.restore() == 2
    said = [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]
    assert len(said) == 2 and (how != "data" or "block" in said[0])
    code, found = call_json("verify", two_bases)
    assert code == 1 and [r["result"] for r in found["checkpoints"]] == ["damaged"] * 2 + ["sound"] * 2
    bad, good = sorted(found["bases"], key=lambda base: -len(base["damage"]))
    assert bad["steps"] == [3, 4] and good["steps"] == [1, 2] and not good["damage"] and str(path) in bad["damage"][0]
    _, text = call("verify", two_bases)
    assert text.count(f"damaged: shard {path}") == 1 and "needed by step(s) 3, 4" in text


def test_the_command_line_tells_what_is_shared(two_bases: Path) -> None:
    _, listed = call_json("ls", two_bases)
    assert [base["steps"] for base in listed["bases"]] == [[1, 2], [3, 4]]
    for entry in listed["checkpoints"]:
        own = sum(path.stat().st_size for path in (two_bases / entry["folder"]).glob("rank_*"))
        base = two_bases / "base" / manifests(two_bases)[entry["step"]].bases[0] / "rank_00000.safetensors"
        assert (entry["bytes"], entry["base_bytes"]) == (own, base.stat().st_size)
    _, shown = call_json("show", two_bases)
    parts = {tensor["name"]: tensor["parts"][0]["file"] for tensor in shown["tensors"]}
    assert parts["param/0.base.weight"].startswith("base/") and parts["param/0.up.weight"] == "rank_00000.safetensors"
    _, verified = call_json("verify", two_bases)
    assert verified["bytes"] == sum(path.stat().st_size for path in two_bases.glob("**/rank_*"))


def test_the_short_reader_reads_bases_too(two_bases: Path, tmp_path: Path) -> None:
    reader = Path(__file__).parent.parent / "examples" / "read_checkpoint.py"
    (tmp_path / "xxhash.py").write_text(
        "from layerwise_dist._native import xxh3_64\nxxh3_64_hexdigest = lambda data: f'{xxh3_64(bytes(data)):016x}'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, reader, two_bases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "hashes checked" in done.stdout, done.stderr
    weight = next(line for line in done.stdout.splitlines() if "param/0.base.weight" in line)
    assert "F32 [300, 13] whole 15600 bytes" in weight and "param/0.up.weight" in done.stdout


def test_a_base_opens_with_the_safetensors_package(two_bases: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    found = safetensors.load_file(two_bases / "base" / max(bases(two_bases)) / "rank_00000.safetensors")
    job = lora.Job("plain", 2, 300)
    with lwd.attach(job.model, job.optimizer, dir=str(two_bases)) as ckpt:
        ckpt.restore()
    assert torch.equal(found["param/0.base.weight"], job.net[0].base.weight)


def test_a_copy_of_one_checkpoint_with_what_the_guide_says_restores_and_without_its_base_names_it(
    two_bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`layerwise show` lists what belongs to it."""
    step = max(manifests(two_bases))
    _, shown = call_json("show", two_bases, "--step", step)
    files = {Path(part["file"]) for tensor in shown["tensors"] for part in tensor["parts"]}
    needed = {file.parent for file in files if file.parts[0] == "base"}
    assert len(needed) == 1, "of the two that there are"
    (folder,) = two_bases.glob(f"step_{step:010d}-*")
    whole, lacking = tmp_path / "whole", tmp_path / "lacking"
    for copy in (whole, lacking):
        shutil.copytree(folder, copy / folder.name)
        shutil.copy(two_bases / "identity.json", copy)
    for base in needed:
        shutil.copytree(two_bases / base, whole / base)
    assert call_json("verify", whole)[0] == 0
    code, found = call_json("verify", lacking)
    assert code == 1 and "base" in str(found)
    job = lora.Job("plain", 2, 300)
    with lwd.attach(job.model, job.optimizer, dir=str(whole)) as ckpt:
        assert ckpt.restore() == step
    job = lora.Job("plain", 2, 300)
    with lwd.attach(job.model, job.optimizer, dir=str(lacking)) as ckpt:
        with pytest.raises(lwd.errors.DamageError, match="see the warnings"):
            ckpt.restore()
    assert str(lacking / next(iter(needed))) in caplog.text
