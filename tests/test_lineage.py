# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a restore goes back to, what retention keeps for it, and what neither ever does by itself."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise_dist as lwd
from layerwise_dist._native import PosixEnv
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.listing import ls
from layerwise_dist.cli.showing import show
from layerwise_dist.cli.verifying import verify
from layerwise_dist.commit import metadata
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory, Manifest, decode, encode
from layerwise_dist.commit.session import Committer
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.engine.restores import Restores
from layerwise_dist.errors import BoundaryError, DamageError, MismatchError, NotFoundError
from layerwise_dist.restore.choice import Wish, candidates
from layerwise_dist.restore.restorer import Restorer
from layerwise_dist.storage import retention

LOGGER = "layerwise_dist"


class Job:
    """A script that ends its iterations itself, or by `save(tag)`. What it trains depends on its seed."""

    def __init__(self, folder: Path, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(6, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.ckpt = lwd.attach(self.model, self.optimizer, dir=str(folder), **options)
        if options.get("every_n_steps", 1) is not None:
            self.ckpt.explicit()

    def train(self, steps: int) -> torch.Tensor:
        """Returns the weights after the last of them, which is committed."""
        for _ in range(steps):
            self.update()
            self.ckpt.end_step()
        self.ckpt.wait(self.ckpt.completed)
        return self.weights

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 6)).square().mean().backward()
        self.optimizer.step()

    @property
    def weights(self) -> torch.Tensor:
        return self.model.weight.detach().clone()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: Any) -> None:
        self.ckpt.__exit__(*error)


def inventory(folder: Path) -> Inventory:
    return CheckpointMetadataManager(PosixEnv(), str(folder)).inventory()


def commits(folder: Path) -> list[tuple[int, str | None]]:
    """(step, tag), oldest first."""
    return [(manifest.step, manifest.tag) for _, manifest in sorted(inventory(folder).manifests.items())]


def settles(folder: Path, wanted: list[tuple[int, str | None]], patience_s: float = 30) -> None:
    """Retention follows a commit in the background."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if commits(folder) == wanted:
            return
        time.sleep(0.005)
    assert commits(folder) == wanted


def manifest_of(folder: Path, step: int, *, newest: bool = True) -> Path:
    found = sorted(folder.glob(f"step_{step:010d}-*/manifest.json"))
    return found[-1 if newest else 0]


def spoil(path: Path, at: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def restored(folder: Path, *, seed: int = 9, **how: Any) -> tuple[int, torch.Tensor]:
    """What a new start gets."""
    with Job(folder, seed) as job:
        return job.ckpt.restore(**how), job.weights


# -- what a restore has chosen stays ----------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Once it was called, retention after the next commit is carried out in the middle of a restore."""
    begins, go, done = threading.Event(), threading.Event(), threading.Event()
    retire, adopt = Committer.retire, Restores._adopt

    def slow(self: Committer, withdrawn: Any) -> None:
        waits = begins.is_set() and not go.is_set()
        assert not waits or go.wait(30)
        retire(self, withdrawn)
        if waits:
            done.set()

    def meanwhile(self: Restores, loading: Any, parts: Any) -> None:
        adopt(self, loading, parts)
        if begins.is_set():
            go.set()
            assert done.wait(30), "retention was not asked for anything"

    monkeypatch.setattr(Committer, "retire", slow)
    monkeypatch.setattr(Restores, "_adopt", meanwhile)
    yield begins.set
    go.set()


@pytest.mark.parametrize("chosen", ["by its step", "since the newest is damaged"])
def test_what_a_restore_has_chosen_stays_until_the_next_commit_of_its_branch(
    tmp_path: Path, late: Callable[[], None], chosen: str
) -> None:
    root = tmp_path / "ckpt"
    with Job(root, keep_last=1) as job:
        first = job.train(1)
        late()
        job.train(1)
        if chosen == "by its step":
            assert job.ckpt.restore(step=1) == 1
        else:
            spoil(next(root.glob("step_0000000002-*/rank_00000.safetensors")), -5)
            assert job.ckpt.restore() == 1
        assert commits(root) == [(1, None), (2, None)]
        shutil.copytree(root, tmp_path / "crashed")
        job.train(1)
        settles(root, [(2, None)])
    step, weights = restored(tmp_path / "crashed")
    assert step == 1 and torch.equal(weights, first)


def test_mutation_retention_that_does_not_wait_for_a_restore_is_caught(
    tmp_path: Path, late: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Committer, "hold", lambda self, held: None)
    with Job(tmp_path, keep_last=1, commit={"on_failure": "warn"}) as job:
        job.train(1)
        late()
        job.train(1)
        with pytest.raises(DamageError, match="is no longer there"):
            job.ckpt.restore(step=1)
        with pytest.raises(DamageError, match="undefined"):
            job.train(1)
    assert restored(tmp_path)[0] == 2, "and not 0: nothing is lost in silence"


def test_after_a_restore_that_failed_retention_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatch(*_: Any) -> Any:
        raise MismatchError("another model")

    with Job(tmp_path, keep_last=1) as job:
        job.train(2)
        settles(tmp_path, [(2, None)])
        with pytest.raises(NotFoundError):
            job.ckpt.restore(step=1)
        with monkeypatch.context() as patch, pytest.raises(MismatchError):
            patch.setattr(Restorer, "_check", mismatch)
            job.ckpt.restore()
        job.train(2)
        settles(tmp_path, [(4, None)])


@pytest.mark.slow
def test_retention_in_a_monitor_waits_for_a_restore_too(tmp_path: Path) -> None:
    with Job(tmp_path, keep_last=1, mode="monitor") as job:
        job.train(1)
        committer = workings_of(job.ckpt).committer
        assert committer is not None
        committer.hold(True)
        job.train(2)
        assert commits(tmp_path) == [(1, None), (2, None), (3, None)]
        assert job.ckpt.restore(step=2) == 2
        job.train(1)
        settles(tmp_path, [(3, None)])
    found = inventory(tmp_path)
    assert [manifest.seq for manifest in found.lineage()] == [max(found.manifests)]


# -- branch records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["others", "nothing"])
def test_a_branch_that_goes_on_from_a_commit_which_is_gone_is_damage_and_never_step_0(
    tmp_path: Path, left: str
) -> None:
    with Job(tmp_path, keep_last=9) as job:
        first = job.train(1)
        job.train(2)
        assert job.ckpt.restore(step=2) == 2
    for step in (2,) if left == "others" else (1, 2, 3):
        shutil.rmtree(manifest_of(tmp_path, step).parent)
    (branch,) = (path.name for path in tmp_path.glob("branch_*"))

    with Job(tmp_path, 9) as job:
        with pytest.raises(BoundaryError, match="already holds"):
            job.train(1)
        for how in ({}, {"on_missing": "fresh"}, {"saved": True}):
            with pytest.raises(DamageError, match=rf"{branch}.*not there.*restore\(step=...\)"):
                job.ckpt.restore(**how)
    for look in (lambda found: verify(found, None), ls):
        answer = look(Catalogue(str(tmp_path)))
        assert not answer.good and any(branch in str(part) and "not there" in str(part) for part in answer.parts)
    with pytest.raises(DamageError, match=branch):
        show(Catalogue(str(tmp_path)), None, False)
    if left == "others":
        step, weights = restored(tmp_path, step=1)
        assert step == 1 and torch.equal(weights, first)
        assert restored(tmp_path)[0] == 1, "what was chosen by hand goes on"


def test_a_fresh_start_that_has_committed_nothing_is_step_0_whatever_is_damaged_beside_it(tmp_path: Path) -> None:
    with Job(tmp_path, keep_last=9) as job:
        job.train(2)
    Job(tmp_path, fresh=True).ckpt.close()
    spoil(manifest_of(tmp_path, 1))
    with Job(tmp_path, 3, keep_last=9) as job:
        assert job.ckpt.restore() == 0
        mine = job.train(1)
    assert [manifest.step for manifest in inventory(tmp_path).lineage()] == [1], "it goes on, and not the old lineage"
    step, weights = restored(tmp_path)
    assert step == 1 and torch.equal(weights, mine)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_manifests_of_a_fresh_lineage_never_bring_the_old_one_back(tmp_path: Path, keep_last: int) -> None:
    with Job(tmp_path, keep_last=keep_last) as job:
        old = job.train(9)
    with Job(tmp_path, 3, keep_last=keep_last, fresh=True) as job:
        job.train(5)
    for step in range(6 - keep_last, 6):
        spoil(manifest_of(tmp_path, step))
    with Job(tmp_path, 9) as job:
        with pytest.raises(DamageError, match=r"step_0000000005.*restore\(step=...\); committed and sound are \[.*9\]"):
            job.ckpt.restore()
        assert job.ckpt.restore(step=9) == 9 and torch.equal(job.weights, old)


def test_damaged_manifests_of_a_branch_never_bring_the_abandoned_one_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Job(tmp_path, keep_last=1) as job:
        job.train(3)
        good = job.train(1)
        job.ckpt.save("good")
        job.train(1)
        job.ckpt.save("bad")
        assert job.ckpt.restore(tag="good") == 4
        job.train(3)
    spoil(manifest_of(tmp_path, 7))
    with caplog.at_level(logging.WARNING, LOGGER):
        step, weights = restored(tmp_path)
    assert step == 4 and torch.equal(weights, good), "the lineage's next older one"
    assert any("step_0000000007" in record.message for record in caplog.records)


def test_what_a_restore_passed_over_is_left_behind_for_good(tmp_path: Path) -> None:
    with Job(tmp_path, keep_last=9) as job:
        job.train(1)
        second = job.train(1)
        third = job.train(1)
    path = manifest_of(tmp_path, 3)
    sound = path.read_bytes()
    spoil(path)
    with Job(tmp_path, 9, keep_last=9) as job:
        assert job.ckpt.restore() == 2
    path.write_bytes(sound)
    step, weights = restored(tmp_path)
    assert step == 2 and torch.equal(weights, second), "another start chooses the same, whatever was mended meanwhile"
    step, weights = restored(tmp_path, step=3)
    assert step == 3 and torch.equal(weights, third)


def test_any_number_of_roll_backs_leaves_one_branch_record_and_a_short_one(tmp_path: Path) -> None:
    with Job(tmp_path, keep_last=1) as job:
        first = job.train(1)
        job.ckpt.save("start")
        for _ in range(8):
            assert job.ckpt.restore(tag="start") == 1
            job.train(1)
        settles(tmp_path, [(1, "start"), (2, None)])
    (branch,) = inventory(tmp_path).branches.values()
    assert len(branch.before) == 1 and branch.root == 0
    spoil(manifest_of(tmp_path, 2))
    step, weights = restored(tmp_path)
    assert step == 1 and torch.equal(weights, first)


def test_what_is_asked_for_and_damaged_is_not_taken_from_another_branch(tmp_path: Path) -> None:
    with Job(tmp_path, keep_last=9) as job:
        job.train(1)
        other = job.train(1)
        job.ckpt.save("best")
        assert job.ckpt.restore(step=1) == 1
        job.train(1)
        job.ckpt.save("best")
        job.train(1)
    for path in tmp_path.glob("step_0000000002-*/manifest.json"):
        if path.parent.name in {m.attempt_id.folder for m in inventory(tmp_path).lineage()}:
            spoil(path)
    found = inventory(tmp_path)
    assert [m.step for m in found.lineage()] == [3, 1] and {m.step for m in found.manifests.values()} == {1, 2, 3}
    for how in ({"step": 2}, {"tag": "best"}):
        with Job(tmp_path, 9) as job, pytest.raises(DamageError, match=r"may be a damaged one.*step_0000000002"):
            job.ckpt.restore(**how)
    with pytest.raises(DamageError, match="may be a damaged one"):
        Catalogue(str(tmp_path)).chosen(2)
    with pytest.raises(DamageError, match="may be a damaged one"):
        candidates(found, Wish(tag="nowhere"), "here")
    for path in tmp_path.glob("step_0000000002-*/manifest.json"):
        if path.parent.name in found.damaged:
            shutil.move(path.parent, tmp_path.parent / path.parent.name)
    step, weights = restored(tmp_path, tag="best")
    assert step == 2 and torch.equal(weights, other)


def test_a_checkpoint_that_was_copied_from_another_directory_is_no_part_of_the_lineage(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    with Job(other, 5, keep_last=9) as job:
        job.train(2)
        theirs = job.train(1)
    with Job(mine, keep_last=9) as job:
        job.train(2)
    copy = manifest_of(other, 3).parent
    shutil.copytree(copy, mine / copy.name)
    with Job(mine, 9, keep_last=1) as job:
        assert job.ckpt.restore(step=2) == 2
        job.train(2)
        settles(mine, [(3, None), (4, None)])
    assert [manifest.step for manifest in inventory(mine).lineage()] == [4]
    with Job(mine, 9, keep_last=1) as job:
        assert job.ckpt.restore(step=3) == 3 and torch.equal(job.weights, theirs)
    step, weights = restored(mine)
    assert step == 3 and torch.equal(weights, theirs), "chosen by hand, it is gone on from"


def test_of_two_checkpoints_with_one_seq_only_this_directory_s_own_is_taken(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    with Job(other, 5, keep_last=9, every_n_steps=2) as job:
        job.train(4)
    with Job(mine, keep_last=9) as job:
        job.train(1)
        second = job.train(1)
    copy = manifest_of(other, 4).parent
    shutil.copytree(copy, mine / copy.name)
    assert set(inventory(mine).damaged) == {copy.name}
    step, weights = restored(mine)
    assert step == 2 and torch.equal(weights, second)


def test_of_two_checkpoints_of_this_directory_with_one_seq_none_is_taken(tmp_path: Path) -> None:
    with Job(tmp_path, keep_last=9) as job:
        first = job.train(1)
        job.train(1)
    newest = manifest_of(tmp_path, 2).parent
    copy = newest.name.replace("step_0000000002-", "step_0000000007-")
    shutil.copytree(newest, tmp_path / copy)
    manifest = tmp_path / copy / "manifest.json"
    record = decode(manifest.read_bytes(), Manifest, "it")
    manifest.write_bytes(encode(record.model_copy(update={"step": 7})))
    assert set(inventory(tmp_path).damaged) == {copy, newest.name}
    step, weights = restored(tmp_path)
    assert step == 1 and torch.equal(weights, first)


# -- tags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, None], ids=["among others", "only when asked"])
def test_a_tag_given_anew_lets_the_older_go_however_much_was_retired_between(tmp_path: Path, every: int | None) -> None:
    with Job(tmp_path, keep_last=2, every_n_steps=every) as job:
        for step in range(1, 17):
            if every is None:
                job.update()
            else:
                job.train(1)
            if every is None or step % 5 == 0:
                job.ckpt.save("best" if step % 5 == 0 else "last")
    assert commits(tmp_path) == [(15, "best"), (16, None if every else "last")]


@pytest.mark.slow
def test_a_tag_given_anew_lets_the_older_go_after_any_number_of_archived_commits(tmp_path: Path) -> None:
    with Job(tmp_path, keep_last=1, keep_every_n_steps=2) as job:
        job.train(1)
        job.ckpt.save("best")
        job.train(140)
        assert (1, "best") in commits(tmp_path)
        job.ckpt.save("best")
    assert commits(tmp_path) == [*((step, None) for step in range(2, 141, 2)), (141, "best")]
    assert len(inventory(tmp_path).lineage()) == 71


def branched(folder: Path, patience_s: float = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """ "best" at step 2 of the lineage and at step 4 of a branch that was left, "other" at its step 3 only; the lineage
    goes on with keep_last=2. Returns the weights of 2, and of 3.
    """
    with Job(folder, keep_last=9) as job:
        mine = job.train(2)
        job.ckpt.save("best")
        other = job.train(1)
        job.ckpt.save("other")
        job.train(1)
        job.ckpt.save("best")
    with Job(folder, keep_last=2) as job:
        assert job.ckpt.restore(step=2) == 2
        tagged = candidates(inventory(folder), Wish(tag="best"), "here")
        assert [m.step for m in tagged] == [2], "before retention"
        job.train(6)
        settles(folder, [(2, "best"), (3, "other"), (7, None), (8, None)], patience_s)
    return mine, other


def test_the_lineage_keeps_its_own_under_a_tag_and_an_abandoned_branch_what_it_alone_has(tmp_path: Path) -> None:
    mine, other = branched(tmp_path)
    step, weights = restored(tmp_path, tag="best")
    assert step == 2 and torch.equal(weights, mine)
    step, weights = restored(tmp_path, tag="other")
    assert step == 3 and torch.equal(weights, other)


def test_mutation_keeping_the_family_s_newest_under_a_tag_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newest(lineage: Any, family: Any, **_: Any) -> set[int]:
        return set({each.tag: each.seq for each in family if each.tag is not None}.values())

    monkeypatch.setattr(retention, "staying", newest)
    with pytest.raises(AssertionError):
        branched(tmp_path, patience_s=0.5)
    assert (2, "best") not in commits(tmp_path), "restore(tag=...) would give another than before"


# -- beside a job that goes on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("meanwhile", ["commits", "commits after a roll-back", "another roll-back"])
@pytest.mark.parametrize("looks", [metadata._LOOKS, 1], ids=["whole", "looks once"])
def test_a_listing_that_is_older_than_what_was_retired_since_is_taken_anew(
    tmp_path: Path, meanwhile: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the first record read, the job commits, and retention removes what was listed."""
    monkeypatch.setattr(metadata, "_LOOKS", looks)

    class Between:
        """The job goes on after the first listing."""

        def __init__(self, go_on: Callable[[], object]) -> None:
            self._go_on: Callable[[], object] | None = go_on

        def __getattr__(self, name: str) -> Any:
            return getattr(PosixEnv(), name)

        def list_dir(self, path: str) -> list[str]:
            names = PosixEnv().list_dir(path)
            if path == str(tmp_path) and self._go_on is not None:
                go_on, self._go_on = self._go_on, None
                go_on()
            return names

    with Job(tmp_path, keep_last=1 if meanwhile != "another roll-back" else 2) as job:
        job.train(2)
        if meanwhile != "commits":
            job.ckpt.restore(step=2 if meanwhile == "commits after a roll-back" else 1)
            job.train(1 if meanwhile == "another roll-back" else 0)

        def go_on() -> None:
            if meanwhile == "another roll-back":
                job.ckpt.restore(step=2)
            job.train(3)
            settles(tmp_path, [(step, None) for step in ((4, 5) if meanwhile == "another roll-back" else (5,))])

        found = CheckpointMetadataManager(Between(go_on), str(tmp_path)).inventory()
        if looks == 1:
            assert not found.lineage(), "the mutation must be seen"
        else:
            assert [manifest.step for manifest in found.lineage()][0] == 5
