# SPDX-License-Identifier: Apache-2.0
"""What cannot be removed stays and is told; it holds up nothing else, and the next start removes it."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.crash import try_ranks

from layerwise_dist._native import PosixEnv
from layerwise_dist.commit import places
from layerwise_dist.commit.coordinator_thread import CoordinatorThread, perform
from layerwise_dist.commit.keeper import Keeper
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.orders import ComposeManifest, Retired, RetireOld, WriteManifest
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.commit.votes import tried
from layerwise_dist.errors import DamageError, DeadlineError, DirectoryError, OwnerError
from layerwise_dist.storage import filenames, odd
from layerwise_dist.storage.filenames import AttemptId

pytestmark = pytest.mark.quick


@pytest.fixture
def broken() -> testing.FaultEnv:
    return testing.FaultEnv(PosixEnv())


def unfinished(root: Path, *steps: int) -> list[AttemptId]:
    """What a session that died left of these steps."""
    found = [AttemptId(1, seq, step) for seq, step in enumerate(steps, 1)]
    for attempt in found:
        (root / attempt.folder).mkdir()
        (root / attempt.folder / filenames.shard_file(0)).write_bytes(b"a shard")
    return found


def test_one_leftover_in_the_way_keeps_no_other_and_goes_at_the_next_start(
    tmp_path: Path, broken: testing.FaultEnv, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = unfinished(tmp_path, 1, 2, 3)
    manager = CheckpointMetadataManager(broken, str(tmp_path))
    broken.fail(operation="sync_dir", path_pattern="*step_0000000001*")
    broken.fail(operation="unlink", path_pattern="*step_0000000002*")
    found = manager.inventory()
    doubtful = manager.flush_records(found)
    assert doubtful == attempts[:1], "whose removal an earlier session may not have flushed: nobody may touch it"
    manager.collect_leftovers(found, doubtful)
    assert [(tmp_path / each.folder).exists() for each in attempts] == [True, True, False]
    assert [each.message.split(": ")[0] for each in caplog.records] == [
        f"leftovers of step {step} stay until the next start" for step in (1, 2)
    ]
    again = manager.inventory()
    assert manager.flush_records(again) == []
    manager.collect_leftovers(again)
    assert list(tmp_path.iterdir()) == []


# -- rank 0's thread ---------------------------------------------------------------------------------------------------


class Failing:
    """As the committer on a disk that fails all but what is asked of it first."""

    def __init__(self, error: OSError | OwnerError) -> None:
        self.error = error

    def commit(self, *_: Any) -> None:
        raise self.error

    compose = collect_old = unneeded = remove_bases = commit

    def retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        withdrawn(AttemptId(1, 2, 3))
        raise self.error


class Decider:
    """Takes note of what the coordinator is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def wrote(self, *told: Any) -> list[Any]:
        self.told.append(told)
        return []

    composed = withdrawn = wrote


@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), OwnerError("a newer job took over")])
def test_whatever_fails_on_rank_0s_disk_the_ranks_and_the_coordinator_hear_what_was_done(
    error: OSError | OwnerError, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Any] = []
    decider, committer = Decider(), Failing(error)
    for output in (WriteManifest(7, 3, []), ComposeManifest(8, 4, []), RetireOld(), Retired(AttemptId(1, 2, 3))):
        perform(decider, committer, sent.append, output)  # type: ignore[arg-type]
    assert decider.told == [(7, error), (8, "", error), ([AttemptId(1, 2, 3)],)]
    assert sent == [{"t": "retired", "epoch": 1, "seq": 2, "step": 3}]
    assert [each.message.removesuffix(f": {error}") for each in caplog.records] == [
        "an old checkpoint could not be removed",
        "frozen parameters that no checkpoint refers to stay until the next start",
        "leftovers of step 3 stay until the next start",
        "frozen parameters that no checkpoint refers to stay until the next start",
    ]


class HeldUp:
    """As a coordinator whose disk holds its thread up, and that has settled all at the third look."""

    idle = True

    def __init__(self) -> None:
        self.free, self.looks = threading.Event(), 0

    @property
    def settled(self) -> bool:
        self.looks += 1
        return self.looks > 2

    def handle(self, message: Any, now: float) -> list[Any]:
        self.free.wait(20)
        return []

    def tick(self, now: float) -> list[Any]:
        return []


def test_an_end_does_not_wait_for_a_thread_that_is_held_up_longer_than_it_may() -> None:
    coordinator, committer = HeldUp(), SimpleNamespace(close=lambda: None)
    thread = CoordinatorThread(coordinator, committer, lambda message: None)  # type: ignore[arg-type]
    thread.post({"t": "anything"})  # type: ignore[arg-type,typeddict-item]
    began = time.monotonic()
    thread.quiet(0.05)
    assert time.monotonic() - began < 10 and coordinator.looks == 0
    coordinator.free.set()
    thread.quiet(20.0)
    assert thread.close(20.0) and coordinator.looks == 3


# -- a node's keeper ---------------------------------------------------------------------------------------------------


@pytest.fixture
def keeper(tmp_path: Path, broken: testing.FaultEnv, monkeypatch: pytest.MonkeyPatch) -> Keeper:
    monkeypatch.setattr(odd, "_named", set())
    manager = CheckpointMetadataManager(broken, str(tmp_path))
    return Keeper(4, manager, SimpleNamespace(check=lambda: None), SimpleNamespace(epoch=9))  # type: ignore[arg-type]


def test_what_a_keeper_cannot_remove_stays_on_its_node_and_is_told(
    tmp_path: Path, broken: testing.FaultEnv, keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    attempt, prepared = AttemptId(1, 2, 3), AttemptId(9, 5, 6)
    base = filenames.base_folder("0000000100000002")
    keeper._prepared.add(prepared.seq)
    for folder, name in (
        (attempt.folder, filenames.shard_file(0)), (prepared.folder, filenames.MANIFEST_TMP),
        (base, filenames.shard_file(0)),
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(b"")
    broken.fail(operation="unlink", times=-1)
    assert keeper.handle({"t": "aborted", "seq": 5, "step": 6, "reason": "", "failure": True}) is None  # type: ignore[typeddict-item]
    assert keeper.handle({"t": "retired", "epoch": 1, "seq": 2, "step": 3}) is None
    assert keeper.handle({"t": "unneeded", "bases": ["0000000100000002"]}) is None
    assert [each.message.split(": ")[:2] for each in caplog.records] == [
        ["rank 4", "leftovers of step 6 stay until the next start"],
        ["rank 4", "leftovers of step 3 stay"],
        ["rank 4", "frozen parameters that no checkpoint refers to stay"],
    ]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    broken.clear()
    keeper.handle({"t": "retired", "epoch": 1, "seq": 2, "step": 3})
    keeper.handle({"t": "unneeded", "bases": ["0000000100000002"]})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [filenames.MANIFEST_TMP]


@pytest.mark.parametrize(
    ("number", "stops"), [(errno.ELOOP, False), (errno.EIO, True)], ids=["a link", "a broken disk"]
)
def test_a_manifest_behind_a_link_stays_and_one_on_a_broken_disk_is_told_to_rank_0(
    tmp_path: Path, broken: testing.FaultEnv, keeper: Keeper, caplog: pytest.LogCaptureFixture, number: int, stops: bool
) -> None:
    attempt = AttemptId(1, 2, 3)
    (tmp_path / attempt.folder).mkdir()
    (tmp_path / attempt.folder / filenames.MANIFEST).write_bytes(b"")
    broken.fail(operation="unlink", path_pattern="*manifest.json", errno=number)
    answer: Any = keeper.handle({"t": "withdraw", "batch": 1, "attempts": [[1, 2, 3]]})
    assert (answer["t"], answer["what"], answer["rank"], answer["batch"]) == ("kept", "withdraw", 4, 1)
    assert (answer["error"] is not None) is stops
    assert ("it is left alone" in caplog.text) is not stops
    assert (tmp_path / attempt.folder / filenames.MANIFEST).exists()


# -- the search for common directories ---------------------------------------------------------------------------------


def searched(root: Path, env: Any = None, *, ranks: int = 2) -> list[Any]:
    def run(transport: LocalTransport) -> Any:
        participant = Participant(transport, timeout_s=20)
        try:
            return places.find_places(env or PosixEnv(), str(root), participant, file_mode=0o600, dir_mode=0o700)
        finally:
            participant.close(5.0)

    return [thread.error or thread.value for thread in try_ranks(run, world=ranks)]


def test_a_probe_that_stays_and_a_disk_that_answers_no_more_end_no_start(
    tmp_path: Path, broken: testing.FaultEnv, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken.fail(operation="unlink")
    assert searched(tmp_path / "ckpt", broken) == [[[0, 1]]] * 2
    (left,) = (tmp_path / "ckpt").iterdir()
    assert f"{left} stays until the next start" in caplog.text

    def stuck(probe: Any) -> None:
        raise DeadlineError("the search for a common directory: the disk has not answered")

    monkeypatch.setattr(places._Probe, "remove", stuck)
    assert searched(tmp_path / "ckpt") == [[[0, 1]]] * 2
    assert caplog.text.count("the disk has not answered") == 2


def test_a_directory_that_cannot_be_had_is_an_error_on_all_ranks(tmp_path: Path, broken: testing.FaultEnv) -> None:
    (tmp_path / "file").write_bytes(b"")
    for each in searched(tmp_path / "file"):
        assert isinstance(each, DirectoryError) and f"{tmp_path}/file is not a directory" in str(each)
    broken.fail(operation="create", errno=errno.EROFS)
    for each in searched(tmp_path / "ckpt", broken):
        assert isinstance(each, DirectoryError) and f"rank 0 cannot write in {tmp_path}/ckpt" in str(each)


def test_what_a_rank_met_is_raised_as_what_it_is_and_else_as_its_directory_s() -> None:
    def fail(error: Exception) -> Any:
        raise error

    well = tried(5.0, "a look", lambda: 1)
    assert places._all_well([well, well]) == [1, 1]
    with pytest.raises(DamageError, match="^it is cut$"):
        places._all_well([well, tried(5.0, "a look", lambda: fail(DamageError("it is cut")))])
    with pytest.raises(DirectoryError, match="^rank 1: .*Input/output error"):
        places._all_well([well, tried(5.0, "a look", lambda: fail(OSError(errno.EIO, "Input/output error")))])


def test_a_file_system_that_does_not_say_what_it_is_counts_as_a_node_s_own(tmp_path: Path) -> None:
    def file_system(path: str) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    assert places._network(SimpleNamespace(file_system=file_system), str(tmp_path)) is None  # type: ignore[arg-type]
