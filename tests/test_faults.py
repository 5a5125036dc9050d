# SPDX-License-Identifier: Apache-2.0
"""One operation of a save fails: training goes on or stops as the config says, and nothing that was committed is lost.

Two ranks write through a FaultEnv to a real file system; every operation of one whole save fails in turn.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import (
    Story,
    build,
    native_threads,
    open_files,
    settings,
    tensors_of,
    thread_names,
    train,
    try_ranks,
)
from kit.drawing import drawn
from kit.mutant_env import MutantEnv, Mutation

import layerwise_dist as lwd
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.errors import CommitError

FAULTY = 2  # the step whose save is disturbed


@dataclass
class Outcome:
    """What one job of two ranks did. `raised` are the steps completed when CommitError was raised, by rank."""

    story: Story = field(repr=False)
    first: int = 0
    last: int = 0
    committed: set[int] = field(default_factory=set)
    raised: dict[int, int] = field(default_factory=dict)
    survived: int = 0


def settle(env: Any) -> int:
    """Waits until the background does nothing any more; returns the number of operations done.

    A thread that is about to remove an aborted attempt may not get the processor for a while on a busy machine.
    """
    count, since = env.operations, time.monotonic()
    while time.monotonic() - since < 0.1:
        time.sleep(0.001)
        if env.operations != count:
            count, since = env.operations, time.monotonic()
    return count


def disturbed_job(
    env: Any, root: str, total: int, disturb: Callable[[], None], repair: Callable[[], None], **config: Any
) -> Outcome:
    """Trains to step `total`; `disturb` is called before the update of step FAULTY, `repair` when that is decided."""
    outcome = Outcome(Story(env, root))
    story, meet = outcome.story, threading.Barrier(2, timeout=30)

    def run(transport: LocalTransport) -> None:
        rank = transport.rank
        model, optimizer = build(rank, 1)
        place = {"phase": 0, "step": 0}
        engine = assembly.assemble(model, optimizer, settings(root, **config), transport, env, state={"place": place})
        try:
            with engine:
                engine.restore()
                for step in engine.steps(total):
                    if 1 <= step <= FAULTY + 1:
                        decided(engine, step, rank)
                    if step in (FAULTY - 1, FAULTY):
                        meet.wait()
                        if rank == 0 and step == FAULTY - 1:
                            outcome.first = settle(env)
                            disturb()
                        elif rank == 0:
                            outcome.last = settle(env)
                            repair()
                            outcome.survived = story.check(env, (1, FAULTY - 1))[1]
                        meet.wait()
                    train(model, optimizer, rank, 1, step)
                    place["phase"], place["step"] = 1, step + 1
                    with story.lock:
                        story.states.setdefault((1, step + 1), {})[rank] = tensors_of(model, optimizer)
                decided(engine, total, rank)
        except CommitError:
            outcome.raised[rank] = engine.completed

    def decided(engine: Any, step: int, rank: int) -> None:
        try:
            engine.wait(step)
        except CommitError:
            return
        if rank == 0:
            outcome.committed.add(step)

    for thread in try_ranks(run):
        if thread.error is not None:
            raise thread.error
    return outcome


@pytest.fixture(autouse=True)
def _short_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step at which all ranks stop lies seconds of training ahead; these loops take milliseconds."""
    monkeypatch.setattr("layerwise_dist.commit.grants._GRANT_SECONDS", 0.01)


def left_behind(root: str) -> list[str]:
    """Attempt folders without a manifest."""
    there = [name for name in os.listdir(root) if name.startswith("step_")]
    return [
        name
        for name in there
        if not os.path.exists(f"{root}/{name}/manifest.json") and os.path.exists(f"{root}/{name}")
    ]


def trial(root: Path, index: int | None, number: int, short: bool, on_failure: str, total: int) -> tuple[Outcome, Any]:
    """A job whose operation `index` of the save of step FAULTY fails, the start after it, and a look for leaks."""
    gc.collect()
    files, threads = open_files(), native_threads()
    env = testing.FaultEnv(PosixEnv())

    def disturb() -> None:
        if index is not None:
            env.fail(index=env.operations + index, errno=number, short=short)

    outcome = disturbed_job(
        env, str(root), total, disturb, env.clear, keep_last=1, commit={"timeout_s": 20.0, "on_failure": on_failure}
    )
    gc.collect()
    deadline = time.monotonic() + 10
    while native_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # of a thread that was joined, the kernel may still be ending what is left
    assert (open_files(), native_threads()) == (files, threads), f"open files or threads are left: {thread_names()}"
    newest = outcome.story.check(PosixEnv(), (1, max(outcome.committed)))
    restored = outcome.story.restart(PosixEnv(), go_on=index is not None and index % 4 == 0)
    assert restored == newest[1]
    assert not left_behind(str(root)), "the next start left attempts without a manifest"
    return outcome, env


def is_flush_of_manifest(trace: list[str], at: int) -> bool:
    """Whether operation `at` is the directory flush after a manifest's rename."""
    operation, _, folder = trace[at].partition(" ")
    before = [line.partition(" ")[2] for line in trace[:at] if line.startswith("rename ")]
    return operation == "sync_dir" and any(line.endswith(f"{folder}/manifest.json") for line in before)


def operations_of_a_save(root: Path) -> int:
    # The first job of a process starts what stays: a thread that the next ones find.
    disturbed_job(testing.FaultEnv(PosixEnv()), f"{root}-first", 1, lambda: None, lambda: None)
    outcome, env = trial(root, None, 0, False, "warn", 3)
    assert outcome.committed == {1, 2, 3} and not outcome.raised and env.injected == 0
    return outcome.last - outcome.first


def test_training_goes_on_and_nothing_is_lost_whichever_operation_of_a_save_fails(tmp_path: Path, long: bool) -> None:
    """Of so many operations one, from one that is drawn; all of them with --long."""
    count = operations_of_a_save(tmp_path / "clean")
    assert count > 40
    kinds = {(errno.EIO, False): 9, (errno.ENOSPC, False): 17, (errno.ENOSPC, True): 17}  # odd: see `go_on`
    cases = [
        (index, code, short)
        for (code, short), every in kinds.items()
        for index in (range(count) if long else range(drawn(range(every), f"{code} {short}"), count, every))
    ]
    injected = 0
    for number, (index, code, short) in enumerate(cases):
        root = tmp_path / str(number)
        outcome, env = trial(root, index, code, short, "warn", 3)
        injected += env.injected
        if not env.injected:
            continue
        failed = env.trace()[outcome.first + index]
        what = (
            f"operation {index}, {failed}: {errno.errorcode[code]}{' after half a write' if short else ''}: {outcome}"
        )
        if is_flush_of_manifest(env.trace(), outcome.first + index) and FAULTY not in outcome.committed:
            assert outcome.raised[0] == outcome.raised[1], what
            assert outcome.committed == {1}, what
        else:
            assert not outcome.raised, what
            assert outcome.committed >= {1, 3}, what
        assert outcome.survived in (1, 2), what
    assert injected > 0.7 * len(cases)


def test_with_on_failure_raise_all_ranks_stop_at_the_same_step(tmp_path: Path, long: bool) -> None:
    count = operations_of_a_save(tmp_path / "clean")
    stopped = 0
    for index in range(0, count, 1 if long else 6):
        outcome, env = trial(tmp_path / str(index), index, errno.EIO, False, "raise", 4)
        if FAULTY in outcome.committed:
            assert not outcome.raised  # it hit what follows a commit: retention
            continue
        assert outcome.committed == {1}
        assert set(outcome.raised) == {0, 1} and outcome.raised[0] == outcome.raised[1], env.trace()[
            outcome.first + index
        ]
        stopped += 1
    assert stopped > 2


def test_a_failed_flush_of_a_shard_is_never_tried_again(tmp_path: Path) -> None:
    env = testing.FaultEnv(PosixEnv())
    root = str(tmp_path / "ckpt")
    outcome = disturbed_job(
        env, root, 3, lambda: env.fail(operation="sync", path_pattern="*step_0000000002*rank_00001*"), env.clear
    )
    assert env.injected == 1 and outcome.committed == {1, 3}
    of_shard = [line for line in env.trace() if "step_0000000002" in line and "rank_00001" in line]
    operations = [line.split()[0] for line in of_shard]
    assert operations.count("sync") == 1
    assert set(operations[operations.index("sync") + 1 :]) == {"unlink"}
    assert not [
        line for line in env.trace() if "step_0000000002" in line and "manifest" in line and line.startswith("rename")
    ]


DOUBT = Mutation("sync_dir", "*/step_0000000002*", "_into_place", forget=False)


def test_a_commit_in_doubt_deletes_nothing_and_stops_the_session() -> None:
    env = MutantEnv(DOUBT)
    story = Story(env)
    with pytest.raises(CommitError, match="step 2 is in doubt"):
        story.session(1, 40, keep_last=1)
    assert env.mutated == 1
    log = [env.log_entry(i) for i in range(env.log_size)]
    renamed = max(i for i, line in enumerate(log) if line.startswith("rename") and "step_0000000002" in line)
    assert log[renamed].endswith("manifest.json")
    assert not [
        line for line in log[renamed:] if line.startswith(("unlink", "remove_dir")) and "step_000000000" in line
    ]
    assert not [line for line in log[renamed + 1 :] if line.startswith("rename")]
    env.mutation = None
    assert story.restart(env, go_on=True) == 2


def test_close_raises_on_all_ranks_when_the_last_checkpoint_was_aborted_whatever_on_failure_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env, root = testing.FaultEnv(PosixEnv()), str(tmp_path / "ckpt")
    env.fail(operation="rename", path_pattern="*/manifest.json", errno=errno.EROFS)

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(transport.rank, 1)
        with assembly.assemble(model, optimizer, settings(root), transport, env) as engine:
            for step in engine.steps(1):
                train(model, optimizer, transport.rank, 1, step)

    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        for thread in try_ranks(run):
            assert isinstance(thread.error, CommitError) and "none is): the checkpoint of step 1" in str(thread.error)
    assert env.injected == 1
    assert any("step 1 aborted" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("why", ["raise", "doubt"])
def test_close_raises_on_all_ranks_when_the_last_checkpoint_stopped_the_session(why: str) -> None:
    mutation = (
        DOUBT if why == "doubt" else Mutation("rename", "*/step_0000000002*/manifest.json", "_into_place", forget=False)
    )
    env = MutantEnv(mutation)
    commit = {"timeout_s": 20.0, "on_failure": "raise" if why == "raise" else "warn"}

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(transport.rank, 1)
        with assembly.assemble(model, optimizer, settings(commit=commit), transport, env) as engine:
            for step in engine.steps(2):
                train(model, optimizer, transport.rank, 1, step)

    for thread in try_ranks(run):
        assert isinstance(thread.error, CommitError) and "step 2" in str(thread.error), repr(thread.error)
    assert env.mutated == 1


def test_retention_that_cannot_remove_a_file_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    env, root = testing.FaultEnv(PosixEnv()), str(tmp_path / "ckpt")
    with caplog.at_level(logging.WARNING, "layerwise_dist"):
        outcome = disturbed_job(
            env,
            root,
            5,
            lambda: env.fail(operation="unlink", path_pattern="*step_0000000001*rank_*", times=-1),
            lambda: None,
            keep_last=1,
            writer={"recycle": False},
        )
    assert env.injected >= 1 and outcome.committed >= {1, 2, 3, 5} and not outcome.raised
    assert [
        record
        for record in caplog.records
        if "could not be removed" in record.message and "step_0000000001" in record.message
    ]
    assert outcome.story.restart(PosixEnv(), root=root, keep_last=1) == 5
    assert not left_behind(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    if os.geteuid() != 0:
        pytest.skip("a small tmpfs can be mounted by root only")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True, timeout=20
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)


def test_a_full_disk_fails_one_checkpoint_and_later_ones_work_once_there_is_room(small_disk: Path) -> None:
    root, ballast = small_disk / "ckpt", small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        os.truncate(ballast, max(0, ballast.stat().st_size - 65536))

    env = testing.FaultEnv(PosixEnv())
    outcome = disturbed_job(env, str(root), 6, fill, lambda: os.unlink(ballast), keep_last=1)
    assert outcome.committed >= {1, 3, 6} and 2 not in outcome.committed and not outcome.raised
    assert outcome.survived == 1
    assert outcome.story.restart(PosixEnv(), root=str(root), keep_last=1, go_on=False) == 6
    assert not left_behind(str(root))


@pytest.mark.parametrize("mode", ["direct", "monitor"])
def test_what_a_failed_attempt_took_of_a_full_disk_is_given_back_at_once(small_disk: Path, mode: str) -> None:
    """No start in between: another job's file comes and goes, and each time a checkpoint does not fit."""
    root, ballast = small_disk / "ckpt", small_disk / "ballast"
    model = torch.nn.Linear(200, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    commit = {"raise_after": 100, "timeout_s": 30}
    with lwd.attach(
        model, optimizer, dir=str(root), keep_last=1, mode=mode, commit=commit, writer={"recycle": False}
    ) as ckpt:
        ckpt.explicit()
        for step in range(1, 10):
            full = step % 2 == 0
            if full:
                ballast.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096 - 65536))
            model(torch.ones(1, 200)).sum().backward()
            optimizer.step()
            ckpt.end_step()
            with pytest.raises(CommitError, match="No space left") if full else nullcontext():
                ckpt.wait(step)
            deadline = time.monotonic() + 20
            while len(list(root.glob("step_*"))) > 1 and time.monotonic() < deadline:
                time.sleep(0.01)  # what failed, and what retention retires, is removed in the background
            assert len(list(root.glob("step_*"))) == 1 and not left_behind(str(root))
            ballast.unlink(missing_ok=True)
    assert ckpt.stats()["checkpoints_aborted"] == 4


def test_a_disk_that_stays_full_stops_nothing_until_raise_after(small_disk: Path) -> None:
    root, ballast = small_disk / "ckpt", small_disk / "ballast"

    def fill() -> None:
        ballast.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * 4096 - 65536))

    env = testing.FaultEnv(PosixEnv())
    commit = {"timeout_s": 20.0, "raise_after": 3}
    outcome = disturbed_job(env, str(root), 60, fill, lambda: None, keep_last=1, commit=commit)
    assert outcome.committed == {1} and 4 <= outcome.raised[0] == outcome.raised[1] < 60
    ballast.unlink()
    assert outcome.story.restart(PosixEnv(), root=str(root), keep_last=1, go_on=True) == 1


def test_the_manager_reads_what_the_faulty_disk_kept(tmp_path: Path) -> None:
    """A read error while the next start looks at the directory is raised as such, and changes nothing."""
    root = str(tmp_path / "ckpt")
    story = Story(PosixEnv(), root)
    story.session(1, 2)
    env = testing.FaultEnv(PosixEnv())
    env.fail(operation="read", path_pattern="*/manifest.json")
    with pytest.raises(OSError, match="manifest.json"):
        CheckpointMetadataManager(env, root).inventory()
    assert story.restart(env, root=root) == 2
