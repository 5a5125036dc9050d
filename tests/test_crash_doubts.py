# SPDX-License-Identifier: Apache-2.0
"""Rules of the disk that a job as it mostly goes does not show the need of: each is kept, and each is left out, where
one rank is late, a flush fails, power has failed before, or a directory is pruned. What power loss leaves then is read.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import re
import sys
import threading
from types import SimpleNamespace
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.crash import POLICIES, Story
from kit.crash_stories import OF_ONE_RANK, check_found, one_branch, shrinking, sweep
from kit.mutant_env import MutantEnv, Mutation

from layerwise_dist.capture import survey
from layerwise_dist.commit import owner
from layerwise_dist.commit.keeper import Keeper
from layerwise_dist.commit.merging import merge
from layerwise_dist.commit.metadata import CheckpointMetadataManager, InDoubt, encode
from layerwise_dist.commit.opening import Place, make_dirs
from layerwise_dist.commit.pruning import Kept, Pruning
from layerwise_dist.errors import CommitError, DamageError, DirectoryError, OwnerError
from layerwise_dist.storage.adapter import PCCheckAdapter, ShardWrite
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.frozen_file import BaseFile


@pytest.fixture(autouse=True)
def _bases_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)


def rank_1_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each attempt, rank 1 begins its part when rank 0's is durable."""
    persist, begin, begin_base = ShardWrite.persist, PCCheckAdapter.begin, BaseFile.begin
    ends: dict[AttemptId, threading.Event] = {}

    def over(attempt: AttemptId) -> threading.Event:
        return ends.setdefault(attempt, threading.Event())

    def wait(rank: int, attempt: AttemptId) -> None:
        assert rank == 0 or over(attempt).wait(30), f"rank 0 has not written its shard of {attempt}"

    def shard_begins(adapter: PCCheckAdapter, attempt: AttemptId, *how: Any) -> ShardWrite:
        wait(adapter.rank, attempt)
        return begin(adapter, attempt, *how)

    def base_begins(file: BaseFile) -> None:
        wait(file._adapter.rank, file.attempt)
        begin_base(file)

    def shard_ends(write: ShardWrite, timeout_s: float) -> Any:
        report = persist(write, timeout_s)
        if write._adapter.rank == 0:
            over(write.attempt).set()
        return report

    monkeypatch.setattr(PCCheckAdapter, "begin", shard_begins)
    monkeypatch.setattr(BaseFile, "begin", base_begins)
    monkeypatch.setattr(ShardWrite, "persist", shard_ends)


@pytest.mark.parametrize("left_out", OF_ONE_RANK)
def test_leaving_out_a_flush_of_one_rank_alone_is_found(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_1_comes_last(monkeypatch)
    check_found(*OF_ONE_RANK[left_out])


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "nothing is removed"])
def test_what_power_loss_left_of_a_record_is_in_the_way_of_none(
    careless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity is the one that a start writes again under the same name before it collects what is left."""
    story = Story(testing.MemoryEnv())
    story.session(1, 1)
    log = [story.env.log_entry(number) for number in range(story.env.log_size)]
    torn = next(number for number, entry in enumerate(log) if entry.startswith("sync /ckpt/identity.json.tmp"))
    left = story.env.crash(torn, 0, "names")
    assert "identity.json.tmp" in left.list_dir("/ckpt")
    if not careless:
        assert story.restart(left, go_on=True) == 0
        return
    unlink = CheckpointMetadataManager._unlink
    monkeypatch.setattr(
        CheckpointMetadataManager, "_unlink",
        lambda manager, path: None if sys._getframe(1).f_code.co_name == "_write" else unlink(manager, path),
    )  # fmt: skip
    with pytest.raises((OSError, DirectoryError), match="exists"):
        story.restart(left, go_on=True)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "it is not cut"])
def test_a_file_that_is_written_over_ends_where_its_new_content_does(careless: bool) -> None:
    mutation = Mutation("truncate", "*/step_0000000004*/rank_*.partial")
    env = MutantEnv(mutation if careless else None)
    story = Story(env)
    shrinking(story)
    log = [env.log_entry(number) for number in range(env.log_size)]
    assert any(re.match("truncate .*step_0000000004.*partial", entry) for entry in log) is not careless
    left = env.crash(env.log_size, 0, "none")
    if careless:
        assert env.mutated == 2
        with pytest.raises(AssertionError, match="names a shard that does not verify"):
            story.check(left, (1, 4))
    else:
        assert story.check(left, (1, 4)) == (1, 4)


class Unflushable(MutantEnv):
    """The first manifest is written and can't be flushed."""

    failed = 0

    def write_file(self, path: str, data: bytes, mode: int = 0o600) -> None:
        fails = fnmatch.fnmatchcase(path, "*/manifest.json.tmp") and not self.failed
        if fails:
            self.drop("sync", path)
        super().write_file(path, data, mode)
        if fails:
            self.failed += 1
            raise OSError(errno.EIO, "sync (injected)", path)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "it is published anyway"])
def test_a_record_whose_flush_failed_is_not_published(careless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if careless:
        write = CheckpointMetadataManager._write

        def never_fails(manager: CheckpointMetadataManager, path: str, record: Any) -> None:
            with contextlib.suppress(OSError):
                write(manager, path, record)

        monkeypatch.setattr(CheckpointMetadataManager, "_write", never_fails)
    env = Unflushable()
    story = Story(env)
    with contextlib.nullcontext() if careless else pytest.raises(CommitError, match="injected"):
        story.session(1, 2)
    assert env.failed == 1
    if careless:
        with pytest.raises(AssertionError, match="^prefix.*records are damaged"):
            sweep(story, 4)
    else:
        sweep(story, 1)


def test_following_a_roll_back_that_is_in_doubt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    env = MutantEnv()
    story = Story(env)
    story.session(1, 2)
    env.mutation = Mutation("sync_dir", "/ckpt", "_into_place", forget=False)
    write = CheckpointMetadataManager.write_branch

    def doubtless(manager: CheckpointMetadataManager, branch: Any) -> None:
        with contextlib.suppress(InDoubt):
            write(manager, branch)

    monkeypatch.setattr(CheckpointMetadataManager, "write_branch", doubtless)
    story.session(2, 2, restore=1)
    assert env.mutated == 1
    with pytest.raises(AssertionError, match="^prefix.*was said to be committed"):
        sweep(story, 4)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "it goes on"])
def test_a_start_goes_on_from_no_commit_that_it_could_not_flush(
    careless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job ends between the manifest's rename and its flush, which the next start can't do either."""
    env = MutantEnv(Mutation("sync_dir", "*/step_*2-*", "_into_place", forget=False))
    story = Story(env)
    with pytest.raises(CommitError):
        story.session(1, 2)
    env.mutation = Mutation("sync_dir", "*/step_*2-*", "flush_records", forget=False)
    if not careless:
        with pytest.raises(DirectoryError, match="injected"):
            story.restart(env)
        return
    flush = CheckpointMetadataManager.flush_records

    def doubtless(manager: CheckpointMetadataManager, inventory: Any) -> list[AttemptId]:
        with contextlib.suppress(OSError):
            return flush(manager, inventory)
        return []

    monkeypatch.setattr(CheckpointMetadataManager, "flush_records", doubtless)
    assert story.restart(env) == 2 and env.mutated == 2
    env.mark("committed 1 2")
    with pytest.raises(AssertionError, match="^prefix"):
        sweep(story, 4)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "it does"])
def test_a_start_touches_no_shards_of_a_removal_that_it_could_not_flush(
    careless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the job that removed the manifest nor the next start could flush that."""
    env = MutantEnv(Mutation("sync_dir", "*/step_*1-*", "withdraw", forget=False))
    story = Story(env)
    story.session(1, 2, keep_last=1)
    env.mutation = Mutation("sync_dir", "*/step_*1-*", "flush_records", forget=False)
    if careless:
        flush = CheckpointMetadataManager.flush_records
        monkeypatch.setattr(
            CheckpointMetadataManager, "flush_records", lambda manager, inventory: flush(manager, inventory)[:0]
        )
    assert story.restart(env) == 2 and env.mutated == 2
    if careless:
        with pytest.raises(AssertionError, match="^prefix.*file is missing"):
            sweep(story, 4)
    else:
        sweep(story, 1)


BROUGHT = [
    ("step_", "sync", "*/manifest.json.tmp"), ("step_", "sync_dir", "*/step_*"), ("step_", "sync_dir", "/ckpt"),
    ("branch_", "sync", "*/branch_*"), ("branch_", "sync_dir", "/ckpt"),
]  # fmt: skip


def brought(kind: str, drop: tuple[str, str] | None) -> tuple[str, str]:
    """A record of one node, and what the other one has of it after power loss, when it was brought there."""
    there = Story(testing.MemoryEnv())
    one_branch(there)
    name = next(name for name in there.env.list_dir("/ckpt") if name.startswith(kind))
    text = CheckpointMetadataManager(there.env, "/ckpt").record_text(name)
    env = testing.MemoryEnv()
    make_dirs(env, "/ckpt", 0o700)
    if drop is not None:
        env.drop(*drop)
    manager = CheckpointMetadataManager(env, "/ckpt")
    Place(env, "/ckpt", manager, ranks=[1], file_mode=0o600, dir_mode=0o700, who="a test")._bring(name, text)
    left = CheckpointMetadataManager(env.crash(env.log_size, 0, "none"), "/ckpt")
    return text, left.record_text(name)


@pytest.mark.parametrize("kind", ["step_", "branch_"])
def test_a_record_that_is_brought_from_another_node_is_durable(kind: str) -> None:
    text, left = brought(kind, None)
    assert text == left
    for _, *drop in (each for each in BROUGHT if each[0] == kind):
        with pytest.raises((FileNotFoundError, DamageError)):
            brought(kind, tuple(drop))


def prune_to_the_newest(env: MutantEnv) -> list[int]:
    """The steps that it removed."""
    work = Pruning(CheckpointMetadataManager(env, "/ckpt"), Kept(1, None, None))
    removed: list[int] = []
    work.run(lambda manifest: removed.append(manifest.step))
    work.close()
    return removed


@pytest.mark.parametrize(
    "left_out",
    [None, Mutation("sync_dir", "*/step_*", "flush_records")],
    ids=["whole", "without the flush at the start"],
)
def test_a_prune_removes_nothing_before_what_stays_is_durable(left_out: Mutation | None) -> None:
    """A job ends between the manifest's rename and its flush; then the directory is pruned."""
    env = MutantEnv(Mutation("sync_dir", "*/step_*2-*", "_into_place", forget=False))
    story = Story(env)
    with pytest.raises(CommitError):
        story.session(1, 2)
    assert env.mutated == 1
    env.mutation = left_out
    assert prune_to_the_newest(env) == [1]
    env.mark("committed 1 2")
    if left_out is None:
        sweep(story, 4)
        return
    with pytest.raises(AssertionError, match="^prefix"):
        sweep(story, 4)


def test_an_owner_whose_length_changes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune writes a longer one. Power loss may leave its bytes and the old length: an epoch could be taken twice."""
    monkeypatch.setattr(owner, "_SECTOR", 1)
    story = Story(MutantEnv())
    story.session(1, 2)
    assert prune_to_the_newest(story.env) == [1]
    with pytest.raises(AssertionError, match="^prefix.*owner is gone or torn"):
        sweep(story, 4)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "its own lock is enough"])
def test_a_job_whose_owner_file_was_replaced_finds_that_another_has_the_directory(careless: bool) -> None:
    """Somebody removes the file; the next job makes another, and locks that."""
    env = testing.MemoryEnv()
    env.make_dir("/ckpt")
    first = owner.Owner(env, "/ckpt", file_mode=0o600, who="the first")
    first.begin("first", 1)
    env.unlink("/ckpt/owner")
    second = owner.Owner(env, "/ckpt", file_mode=0o600, who="the second")
    second.begin("second", 2)
    second.check()
    if careless:
        lock = first._lock
        first._lock = SimpleNamespace(held_path_is_mine=lambda: True, read=lock.read)  # type: ignore[assignment]
        first.check()
        return
    with pytest.raises(OwnerError, match="/ckpt/owner was replaced"):
        first.check()


class Nodes:
    """Two nodes with a disk each, and one directory's records on both. One operation comes after the other."""

    def __init__(self) -> None:
        self.disks = [testing.MemoryEnv(), testing.MemoryEnv()]
        self.managers = [CheckpointMetadataManager(disk, "/ckpt") for disk in self.disks]
        self.moments: list[list[int]] = []
        one_branch(Story(self.disks[0]))
        make_dirs(self.disks[1], "/ckpt", 0o700)
        self.managers[1].write_identity(self.managers[0].read_identity())
        self.start()
        self.attempt = next(iter(self.managers[1].inventory().manifests.values())).attempt_id

    def _looked(self, order: list[int]) -> list[Place]:
        return [
            Place(
                self.disks[node], "/ckpt", self.managers[node], ranks=[rank], file_mode=0o600, dir_mode=0o700, who="job"
            )
            for rank, node in enumerate(order)
        ]  # fmt: skip

    def start(self, order: tuple[int, int] = (0, 1), *, pins_go_first: bool = False) -> None:
        """Of a job with rank 0 on the first node of these, up to where its ranks go on."""
        places = self._looked(list(order))
        plan = merge([place.look() for place in places], "/ckpt", fresh=False)
        texts = {name: text for place in places for name, text in place.texts(plan).items()}
        settles = [(place.settle, (plan, texts)) for place in places]
        lets_go = [(place.let_pins_go, (plan,)) for place in places]
        for do, what in [*lets_go, *settles] if pins_go_first else [*settles, *lets_go]:
            before = [disk.log_size for disk in self.disks]
            do(*what)
            self._note(before)
        for place in places:
            place.release()

    def _note(self, before: list[int]) -> None:
        """How much of each log is done, after each operation."""
        now = [disk.log_size for disk in self.disks]
        for node in (0, 1):
            for done in range(before[node], now[node] + 1):
                self.moments.append([done if other == node else now[other] for other in (0, 1)])

    def least_pins(self) -> int:
        """In how many places, at the worst moment, the pin is after power loss of both nodes."""
        found = []
        for moment in self.moments:
            for policy in POLICIES:
                left = [disk.crash(at, 0, policy) for disk, at in zip(self.disks, moment, strict=True)]
                found.append(sum(CheckpointMetadataManager(each, "/ckpt").pinned(self.attempt) for each in left))
        return min(found)


@pytest.mark.parametrize(
    "careless", [None, "order", "flush"], ids=["whole", "it goes before it is there", "it is not flushed there"]
)
def test_a_pin_that_moves_to_the_node_of_rank_0_is_on_one_of_them_at_any_moment(careless: str | None) -> None:
    nodes = Nodes()
    assert nodes.managers[0].pin(nodes.attempt)
    nodes.moments.clear()
    if careless == "flush":
        nodes.disks[1].drop("sync_dir", "/ckpt/step_*")
    nodes.start((1, 0), pins_go_first=careless == "order")
    assert [manager.pinned(nodes.attempt) for manager in nodes.managers] == [False, True]
    assert (nodes.least_pins() == 0) is (careless is not None)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "the doubt is forgotten"])
def test_a_node_that_is_in_doubt_of_a_roll_back_keeps_the_record_before(careless: bool) -> None:
    """The record's flush fails there; then old checkpoints are withdrawn, and with them all older records."""
    env = MutantEnv()
    one_branch(Story(env))
    manager = CheckpointMetadataManager(env, "/ckpt")
    ((seq, record),) = manager.inventory().branches.items()
    job: Any = SimpleNamespace(check=lambda: None), SimpleNamespace(epoch=9)
    keeper = Keeper(1, manager, *job)
    env.mutation = Mutation("sync_dir", "/ckpt", "_into_place", forget=False)
    with pytest.raises(InDoubt):
        keeper.keep_branch(encode(record.model_copy(update={"seq": seq + 9})).decode())
    env.mutation = None
    if careless:
        keeper._in_doubt = False
    keeper.handle({"t": "withdraw", "batch": 1, "attempts": []})
    left = [env.crash(env.log_size, seed, "random") for seed in range(40)]
    least = min(len(CheckpointMetadataManager(each, "/ckpt").inventory().branches) for each in left)
    assert (least == 0) is careless
    keeper.keep_branch(encode(record.model_copy(update={"seq": seq + 10})).decode())
    keeper.handle({"t": "withdraw", "batch": 2, "attempts": []})
    assert list(manager.inventory().branches) == [seq + 10], "what is known again to be durable stands for them"
