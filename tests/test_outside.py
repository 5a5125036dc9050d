# SPDX-License-Identifier: Apache-2.0
"""Nothing outside of a checkpoint directory is written, removed or given a mode, whatever links lie in it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.outside import (
    NOBODY,
    Job,
    at_call,
    bases_of_any_size,
    exchange,
    move_out,
    other_user,
    snapshot,
    step_folder,
)

from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.bench.light import LightWrite
from layerwise_dist.capture import survey
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.cli.listing import ls
from layerwise_dist.cli.verifying import verify
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.records import Manifest
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.doctor import examination
from layerwise_dist.engine import assembly
from layerwise_dist.storage import odd
from layerwise_dist.storage.exposure import exposed
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.recycling import Recycler

LOGGER = "layerwise_dist"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which makes another user")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 3, all of which refer to one base. For copies."""
    root = tmp_path_factory.mktemp("trained") / "ck"
    with bases_of_any_size():
        Job().run(root, 3, keep_last=3)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    monkeypatch.setattr(odd, "_named", set())
    shutil.copytree(trained, tmp_path / "ck")
    (tmp_path / "out").mkdir()
    return tmp_path / "ck"


def manager_of(root: Path, env: Any = None) -> CheckpointMetadataManager:
    return CheckpointMetadataManager(env or PosixEnv(), str(root))


def said(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if name in record.getMessage()]


# -- what was linked in ------------------------------------------------------------------------------------------------

LINKED = {
    "a step": lambda root: step_folder(root, 2),
    "the newest step": lambda root: step_folder(root, 3),
    "base": lambda root: root / "base",
    "a base": lambda root: next((root / "base").iterdir()),
}


@pytest.mark.parametrize("which", LINKED)
def test_a_folder_that_was_moved_away_and_linked_back_is_read_and_never_changed(
    root: Path, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    link = LINKED[which](root)
    target = move_out(link, root.parent / "out")
    (target / "rank_00000.safetensors.partial").write_bytes(b"a leftover")
    another = "0000000100000009"  # of another run, of which nothing here knows
    if which == "base":
        shutil.copytree(next(target.iterdir()), target / another)
    elif which == "a base":
        shutil.copytree(target, target.parent / another)
        (link.parent / another).symlink_to(target.parent / another)
    before = snapshot(root.parent / "out")
    catalogue = Catalogue(str(root))
    assert verify(catalogue, None).good and ls(catalogue).good
    assert Job(1).run(root, 0, step=2, keep_last=3) == 2  # a roll-back, and what the start collects
    assert Job(1).run(root, 3, keep_last=1) == 2  # retention
    assert snapshot(root.parent / "out") == before
    assert link.readlink() == target
    named = link.parent / another if which == "a base" else link
    assert said(caplog, f"{named}: is a symbolic link")
    if "step" in which:
        assert len(said(caplog, "nothing is written or removed through it")) == 1
        assert Job(3).run(root, 0, step=2 if which == "a step" else 3) in (2, 3)
    assert snapshot(root.parent / "out") == before


def test_the_base_of_a_checkpoint_in_an_archive_that_is_not_there_stays(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = root.parent / "out"
    for step in (1, 2, 3):
        move_out(step_folder(root, step), archive)
    archive.rename(root.parent / "unmounted")
    bases = snapshot(root / "base")
    Job(1).attach(root, fresh=True, keep_last=1).close()
    assert "is a symbolic link, so there is no manifest" in str(manager_of(root).inventory().damaged)
    assert snapshot(root / "base") == bases
    (root.parent / "unmounted").rename(archive)
    assert verify(Catalogue(str(root)), None).good


def operations(root: Path, out: Path) -> dict[str, Callable[[Any], None]]:
    """All that storage and commit change in a directory, each by an Env."""
    inventory = manager_of(root).inventory()
    manifest = inventory.manifests[max(inventory.manifests)]
    attempt, (base,) = manifest.attempt_id, inventory.bases
    new = AttemptId(attempt.epoch, attempt.seq, attempt.step)

    def light(env: Any) -> None:
        write = LightWrite(env, str(root), new, 3)
        env.confine(root)
        write.begin()
        write.persist(1.0)

    def recycle(env: Any) -> None:
        env.confine(root)
        recycler = Recycler(env, str(root), 0, limit=1, file_mode=0o640)
        recycler.published(attempt, 4096)
        recycler.retire(attempt)
        recycler.close(10)

    def discard(env: Any) -> None:
        env.confine(root)
        LightWrite(env, str(root), attempt, 0).discard()

    def make(env: Any) -> None:
        env.confine(root)
        before = os.umask(0o077)
        try:
            env.make_dir(root / attempt.folder / "new", 0o750)
        finally:
            os.umask(before)

    return {
        "commit": lambda env: manager_of(root, env).commit(manifest),
        "prepare": lambda env: manager_of(root, env).prepare(manifest),
        "publish": lambda env: manager_of(root, env).publish(attempt),
        "unprepare": lambda env: manager_of(root, env).unprepare(attempt),
        "withdraw": lambda env: manager_of(root, env).withdraw(attempt),
        "collect": lambda env: manager_of(root, env).collect(attempt),
        "remove a base": lambda env: manager_of(root, env).remove_base(base),
        "collect leftovers": lambda env: manager_of(root, env).collect_leftovers(inventory),
        "write a shard": light,
        "recycle": recycle,
        "discard": discard,
        "make a folder": make,
    }


OPERATIONS = [
    "commit", "prepare", "publish", "unprepare", "withdraw", "collect", "remove a base", "collect leftovers",
    "write a shard", "recycle", "discard", "make a folder",
]  # fmt: skip


class Unconfined(PosixEnv):
    """The mutation: paths are followed wherever they lead."""

    def confine(self, root: Any) -> None:
        pass


def changed_outside(root: Path, operation: str, env: Any) -> bool:
    """Whether the operation changes what step 3, its base and a leftover's folder, all of them links, lead to."""
    out = root.parent / "out"
    (step_folder(root, 3) / "manifest.json.tmp").write_bytes(b"a leftover")
    run = operations(root, out)[operation]
    for path in (step_folder(root, 3), next((root / "base").iterdir())):
        move_out(path, out)
    before = snapshot(out)
    try:
        run(env)
    except OSError as error:
        assert "a symbolic link is there" in str(error) and str(root) in str(error.filename)
    return snapshot(out) != before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_changed_through_a_link(root: Path, operation: str) -> None:
    assert not changed_outside(root, operation, PosixEnv())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_mutation_paths_that_are_not_confined_are_caught(root: Path, operation: str) -> None:
    assert changed_outside(root, operation, Unconfined())


def test_a_directory_that_is_replaced_while_a_job_runs_is_named_and_the_new_one_is_left_alone(root: Path) -> None:
    job = Job(1)
    ckpt = job.attach(root, keep_last=1)
    ckpt.restore()
    root.rename(root.parent / "away")
    shutil.copytree(root.parent / "away", root)
    before = snapshot(root)
    with pytest.raises(errors.CommitError, match="another directory than the one that was opened"):
        job.train(ckpt, 2)
        ckpt.close()
    try:
        ckpt.close()
    except errors.LayerwiseError:
        pass
    assert snapshot(root) == before


# -- links that come at the worst moment -------------------------------------------------------------------------------


def _traced(root: Path, trained: Path, operation: str, env: type[PosixEnv], *, every: bool = False) -> list[int]:
    """The calls to the kernel at which a link of another user, put there then, let the operation get outside.

    Step 3, its base and the new folder change places with links to copies of them. Of what is read there, the manifest
    differs.
    """
    found, number, calls = [], 0, 1
    out = root.parent / "out"
    while number < calls:
        for folder in (root, out):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(trained, folder)
        pairs = []
        for name in (step_folder(root, 3).relative_to(root), next((root / "base").iterdir()).relative_to(root)):
            link = root / name.parent / f".{name.name}"
            link.symlink_to(out / name)
            os.lchown(link, NOBODY, NOBODY)
            pairs.append((os.open(link.parent, os.O_PATH), name.name, link.name))
        os.chmod(out / pairs[0][1], 0o711)
        (step_folder(root, 3) / "manifest.json.tmp").write_bytes(b"a leftover")
        (step_folder(out, 3) / "manifest.json.tmp").write_bytes(b"a leftover")
        run = operations(root, out)[operation]
        before = snapshot(out)

        def action(run: Callable[[Any], None] = run) -> int:
            try:
                run(env())
            except OSError:
                return 1
            return 0

        def happens(pairs: list[tuple[int, str, str]] = pairs) -> None:
            for folder, one, other in pairs:
                exchange(folder, one, other)

        calls, code = at_call(number, action, happens, every=every)
        for folder, _, _ in pairs:
            os.close(folder)
        assert code in (0, 1), code
        if snapshot(out) != before:
            found.append(number)
        number += 1
    assert number > 3
    return found


@as_root
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_link_that_comes_at_any_call_to_the_kernel_leads_nowhere(
    root: Path, trained: Path, operation: str, long: bool
) -> None:
    if not long and operation not in ("commit", "collect", "write a shard"):
        pytest.skip("--long")
    assert _traced(root, trained, operation, PosixEnv, every=long) == []


@as_root
def test_mutation_a_link_that_comes_in_between_gets_unconfined_paths_outside(root: Path, trained: Path) -> None:
    assert _traced(root, trained, "withdraw", Unconfined)


def tried(outcomes: dict[str, int], kinds: list[str], count: int, least_s: float) -> Iterator[None]:
    """Goes on until each of these kinds came more than `count` times, and so many seconds are over."""
    began = time.monotonic()
    while time.monotonic() < began + least_s or min(outcomes.get(kind, 0) for kind in kinds) <= count:
        assert time.monotonic() < began + 60, outcomes
        yield


@as_root
def test_another_user_who_swaps_links_as_fast_as_he_can_gets_nobody_outside(root: Path, long: bool) -> None:
    out = root.parent / "out"
    shutil.rmtree(out)
    shutil.copytree(root, out)
    inventory = manager_of(root).inventory()
    manifest = inventory.manifests[max(inventory.manifests)]
    foreign = manifest.model_copy(update={"tag": "outside"})
    manager_of(out).commit(foreign)
    name, link = manifest.attempt_id.folder, ".link"
    (root / link).symlink_to(out / name)
    os.lchown(root / link, NOBODY, NOBODY)
    os.chmod(root, 0o777)
    before = snapshot(out)
    outcomes: dict[str, int] = {}
    with other_user(root, [(name, link)]):
        for _ in tried(outcomes, ["done", "OSError"], 20, 3.0 if long else 0.3):
            manager = manager_of(root)
            for run in (
                lambda m=manager: m.commit(manifest), lambda m=manager: m.withdraw(manifest.attempt_id),
                lambda m=manager: m.collect(manifest.attempt_id), lambda m=manager: _read(m, manifest, outcomes),
                lambda m=manager: m.env.make_dir(root / name, 0o700),
            ):  # fmt: skip
                try:
                    run()
                    kind = "done"
                except OSError as error:
                    kind = type(error).__name__
                outcomes[kind] = outcomes.get(kind, 0) + 1
    assert snapshot(out) == before


def _read(manager: CheckpointMetadataManager, manifest: Manifest, outcomes: dict[str, int]) -> None:
    try:
        assert manager.read_manifest(manifest.attempt_id).tag is None
    except errors.DamageError as error:
        assert "another user" in str(error) or "the folder above it is not a directory" in str(
            error
        )  # it came in between
        outcomes["refused"] = outcomes.get("refused", 0) + 1


@as_root
def test_another_user_who_swaps_the_directory_itself_is_noticed_and_gets_nobody_into_his(
    root: Path, long: bool
) -> None:
    out = root.parent / "out"
    shutil.rmtree(out)
    shutil.copytree(root, out)
    (root.parent / "link").symlink_to(out)
    os.lchown(root.parent / "link", NOBODY, NOBODY)
    os.chmod(root.parent, 0o777)
    manager = manager_of(root)
    owner = Owner(manager.env, str(root), file_mode=0o600, who="test")
    owner.begin("0" * 32, owner.previous + 1)
    manifest = max(manager.inventory().manifests.items())[1]
    before = snapshot(out)
    outcomes = {"done": 0, "named": 0, "lost": 0}
    with other_user(root.parent, [("ck", "link")]):
        for _ in tried(outcomes, [*outcomes], 5, 2.0 if long else 0.3):
            for run in (lambda: manager.withdraw(manifest.attempt_id), lambda: manager.commit(manifest)):
                try:
                    owner.check()
                    run()
                    outcomes["done"] += 1
                except errors.OwnerError:
                    outcomes["lost"] += 1
                except OSError as error:
                    assert "another directory" in str(error), error
                    outcomes["named"] += 1
    owner.release()
    assert snapshot(out) == before


# -- who may write there -----------------------------------------------------------------------------------------------


def test_a_directory_that_others_may_write_to_is_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert exposed(str(root)) == []
    os.chmod(step_folder(root, 2), 0o770)
    os.chmod(root / "base", 0o707)
    os.chmod(root, 0o1777)
    expected = [
        f"{root} may be written to by everybody (mode 1777)",
        f"{root / 'base'} may be written to by everybody (mode 707)",
        f"{step_folder(root, 2)} may be written to by its group (mode 770)",
    ]
    assert sorted(exposed(str(root))) == sorted(expected)
    Job(1).run(root, 0)
    (warning,) = said(caplog, "others may change or remove")
    assert all(text in warning for text in expected)
    report = examination.examine(
        str(root), examination.Questions(LayerwiseConfig(dir=str(root)), nbytes=1 << 20, rounds=1)
    )
    (finding,) = [each for each in report.findings if each.name == "access"]
    assert finding.verdict == "warn" and all(text in finding.text for text in expected)


def test_a_directory_whose_users_cannot_be_looked_up_is_warned_of_and_trained_in(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(assembly, "exposed", refuse)
    Job(1).run(root, 4)
    assert said(caplog, f"{root}: whether others may write there can't be told ([Errno 13] Permission denied")
    newest = CheckpointMetadataManager(PosixEnv(), str(root)).inventory().newest
    assert newest is not None and newest.step == 3 + 4


@as_root
def test_a_directory_of_another_user_is_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.chown(root, NOBODY, NOBODY)
    Job(1).run(root, 0)
    assert said(caplog, f"{root} belongs to another user (uid {NOBODY})")


def test_the_doctor_writes_and_removes_only_in_its_own_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever somebody puts in the place of that folder's name."""
    out = root.parent / "out"
    (out / "flush").write_bytes(b"outside")
    (out / "record").write_bytes(b"outside")
    before = snapshot(out)
    taken = []

    def swap(*_: Any, **__: Any) -> Any:
        (folder,) = root.glob(f"{examination.SCRATCH}*")
        folder.rename(root / "mine")
        folder.symlink_to(out)
        taken.append(folder)
        return flush_times(*_, **__)

    flush_times = examination.speed.flush_times
    monkeypatch.setattr(examination.speed, "flush_times", swap)
    config = LayerwiseConfig(dir=str(root))
    report = examination.examine(str(root), examination.Questions(config, nbytes=1 << 20, flushes=3, rounds=1))
    assert taken and snapshot(out) == before
    assert taken[0].is_symlink() and list((root / "mine").iterdir()) == []
    assert report.findings[-1].name == "measured" and "/proc/self" not in report.findings[-1].text
