# SPDX-License-Identifier: Apache-2.0
"""Calls to the disk that do not return: training goes on, every wait ends in time and names the call, and the process
ends as its script says.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import try_ranks
from kit.runners import Warm
from kit.waiting import Job, equal, restored
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from layerwise_dist import _native, errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.storage.adapter import PCCheckAdapter

STUCK_S = 600.0
TIMEOUT_S = 0.5
# Which call, on which path of step 5: (operation, its path, how it is called to the user).
CALLS = {
    "folder": ("make_dir", "*step_0000000005*", "make directory"),
    "file": ("create", "*step_0000000005*rank_*", "create"),
    "space": ("allocate", "*step_0000000005*", "allocate"),
    "block": ("write", "*step_0000000005*rank_*", "write"),
    "flush": ("sync", "*step_0000000005*rank_*", "flush"),
    "name": ("rename", "*step_0000000005*rank_*", "rename"),
    "folder's flush": ("sync_dir", "*step_0000000005*", "flush directory"),
    "manifest": ("create", "*step_0000000005*manifest*", "write file"),
    "manifest's name": ("rename", "*step_0000000005*manifest*", "rename"),
}


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    monkeypatch.setattr("layerwise_dist.engine.closing._LAST_S", 0.1)
    made: list[Job] = []

    def make(**config: Any) -> Job:
        made.append(Job(tmp_path, **{"commit": {"timeout_s": TIMEOUT_S, "raise_after": 9}, **config}))
        return made[-1]

    yield make
    for job in made:
        job.env.clear()
        if job.ckpt is not None:
            workings_of(job.ckpt).closing.end(orderly=False)


def stick(job: Job, call: str) -> None:
    operation, path, _ = CALLS[call]
    job.env.delay(operation, path, STUCK_S)


def timed_steps(job: Job, total: int) -> float:
    """The longest one."""
    longest, began = 0.0, time.monotonic()
    for _ in job.ckpt.steps(total):
        job.update()
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
    return max(longest, time.monotonic() - began)


@pytest.mark.parametrize("call", CALLS)
def test_steps_go_on_and_close_ends_in_time_and_names_the_call(jobs: Callable[..., Job], call: str) -> None:
    job = jobs()
    job.to(4)
    job.ckpt.wait(4)
    stick(job, call)
    assert timed_steps(job, 6) < TIMEOUT_S, "a step waited for the disk"
    began = time.monotonic()
    with pytest.raises((errors.DeadlineError, errors.CommitError)) as raised:
        job.ckpt.close()
    assert time.monotonic() - began < TIMEOUT_S + 2.0
    operation, _, said = CALLS[call]
    assert re.search(rf"{said} \S*step_0000000005\S* for \d", str(raised.value)), raised.value
    assert job.ckpt.committed_step == 4


def test_mutation_a_close_that_waits_for_what_is_stuck_is_caught(
    jobs: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    close = PCCheckAdapter.close
    monkeypatch.setattr(PCCheckAdapter, "close", lambda adapter, _: close(adapter, 3.0))
    with pytest.raises(AssertionError, match="time"):
        test_steps_go_on_and_close_ends_in_time_and_names_the_call(jobs, "block")


def test_what_a_stuck_call_may_use_outlives_the_engine(jobs: Callable[..., Job]) -> None:
    job = jobs()
    job.to(4)
    job.ckpt.wait(4)
    stick(job, "block")
    job.to(5)
    leased = [StorageWeakRef(param.untyped_storage()) for param in job.model.parameters()]
    with pytest.raises(errors.DeadlineError):
        job.ckpt.close()
    workings = workings_of(job.ckpt)
    for part in [*vars(workings).values(), workings]:
        if type(part).__module__.startswith("layerwise_dist.engine."):
            vars(part).clear()
    del job.model, job.optimizer, workings, part
    job.ckpt = None
    gc.collect()
    assert not any(ref.expired() for ref in leased)
    job.env.clear()  # the call returns, to memory that is still there
    deadline = time.monotonic() + 10
    while _native.calls_under_way():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- files are made beside training ------------------------------------------------------------------------------------

MAKING = {"make directory", "create", "allocate", "reuse"}  # as calls under way are named


def making(directory: Path) -> bool:
    """Whether a file or folder there is being made right now."""
    return any(name in MAKING and str(path).startswith(str(directory)) for name, path, _ in _native.calls_under_way())


@pytest.mark.parametrize("operation", ["make_dir", "create", "allocate", "reuse"])
def test_a_step_does_not_wait_for_its_file_and_its_checkpoint_is_right(
    tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch, slow_s: float = 20.0
) -> None:
    job = Job(tmp_path, keep_last=2)
    with job.ckpt as ckpt:
        job.to(5)
        ckpt.wait(5)
        recycler = workings_of(ckpt).adapter.recycler
        if operation == "reuse":
            deadline = time.monotonic() + 10
            while not recycler.waiting():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        else:
            monkeypatch.setattr(recycler, "take", lambda: None)
        job.env.delay(operation, "*step_0000000006*", slow_s)
        job.to(6)
        held = job.held()
        job.to(7)  # what was captured is overwritten before there is a file for it
        deadline = time.monotonic() + 10  # the thread that makes files may not have run yet
        while not making(tmp_path):
            assert ckpt.committed_step < 6, "a step waited for its file"
            assert time.monotonic() < deadline, "nobody makes the file"
            time.sleep(0.01)
        job.env.clear()
        ckpt.wait(6)
        assert ckpt.stats()["checkpoints_aborted"] == 0
    assert equal(restored(tmp_path, 6), held)


def test_mutation_a_file_that_is_made_on_the_training_thread_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = PCCheckAdapter.shard_writer

    def waiting(adapter: PCCheckAdapter, *args: Any, **options: Any) -> Any:
        writer = order(adapter, *args, **options)
        writer.wait(10)
        return writer

    monkeypatch.setattr(PCCheckAdapter, "shard_writer", waiting)
    with pytest.raises(AssertionError, match="a step waited for its file"):
        test_a_step_does_not_wait_for_its_file_and_its_checkpoint_is_right(
            tmp_path, "create", pytest.MonkeyPatch(), slow_s=0.2
        )


def test_a_file_that_cannot_be_made_ends_its_attempt_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path)
    with job.ckpt as ckpt:
        job.to(1)
        ckpt.wait(1)
        for step, operation in enumerate(("make_dir", "create", "allocate"), start=2):
            job.env.fail(operation=operation, path_pattern=f"*step_{step:010}*", errno=28)
            job.to(step)
            with pytest.raises(errors.CommitError, match=rf"rank 0: \[Errno 28\] {operation}"):
                ckpt.wait(step)
        job.to(5)
        ckpt.wait(5)
    assert equal(restored(tmp_path, 5), job.held())
    left = [path.name[:15] for path in tmp_path.glob("step_*")]
    assert sorted(left) == ["step_0000000001", "step_0000000005"]


# -- the process's end -------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
import torch
import layerwise_dist as lwd
import layerwise_native_testing as testing
from layerwise_dist._native import PosixEnv, WriterPool
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly

torch.set_num_threads(1)

def run(call, operation, path, backend, end):
    env = testing.FaultEnv(PosixEnv())
    config = load_config({
        "dir": f"{backend}-{end}-{call}", "fence_timeout_s": 0.2, "commit": {"timeout_s": 2.0, "raise_after": 99},
        "writer": {"backend": backend, "recycle": False},  # over a retired file none is created
    })
    engines = []
    for name in ("one", "two") if end == "two" else ("one",):
        model = torch.nn.Linear(100, 100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = config.model_copy(update={"dir": config.dir + name})
        engines.append((model, optimizer, assembly.assemble(
            model, optimizer, config, LocalTransport(LocalHub(1), 0), env)))
    for model, optimizer, ckpt in engines:
        for step in ckpt.steps(6):
            if step == 4:
                ckpt.wait(4)
                env.delay(operation, path, 600.0)
            model(torch.ones(2, 100)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    if end != "atexit":
        for *_, ckpt in engines:
            try:
                ckpt.close()
            except lwd.errors.LayerwiseError as error:
                print("RAISED", error, file=sys.stderr)
    globals()["kept"] = engines
    sys.exit(3)

torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # the first one imports what takes as long as torch itself
cases = CASES
children = {}
for number, case in enumerate(cases):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(f"log{number}", os.O_CREAT | os.O_WRONLY, 0o600), 2)
        run(*case)
    children[pid] = number
for pid, number in children.items():
    began = time.monotonic()
    _, status = os.waitpid(pid, 0)
    print("ended", number, os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_process_with_a_stuck_call_keeps_its_exit_code_however_it_ends(warm: Warm, tmp_path: Path) -> None:
    cases = [
        (call, *CALLS[call][:2], backend, end)
        for call, backend, end in [
            ("block", "posix", "close"), ("block", "uring", "close"), ("flush", "posix", "close"),
            *((call, "posix", "atexit") for call in ("block", "file", "manifest")), ("block", "uring", "two"),
        ]
        if backend == "posix" or _native.WriterPool.probe_uring() is None
    ]  # fmt: skip
    (tmp_path / "script.py").write_text(SCRIPT.replace("CASES", repr(cases)))
    done = warm.run(tmp_path / "script.py", 0, folder=tmp_path, timeout=100, whole_exit=True)
    codes = [tuple(map(int, line.split())) for line in done.lines("ended ")]
    assert len(codes) == len(cases), done.output
    for number, code in codes:
        said = (tmp_path / f"log{number}").read_text()
        assert code == 3, (cases[number], said)
        assert re.search(r"calls that have not returned: [^)]*step_0000000005", said), (cases[number], said)


# -- what all ranks do together ----------------------------------------------------------------------------------------

STARTS = {
    "lock": ("lock", "*owner"),
    "look": ("list_dir", "*"),
    "record": ("rename", "*identity*"),
}


@pytest.mark.parametrize("call", STARTS)
def test_a_start_on_a_stuck_disk_ends_in_time_on_all_ranks_and_names_the_call(tmp_path: Path, call: str) -> None:
    jobs: list[Any] = []

    def run(transport: LocalTransport) -> None:
        env = testing.FaultEnv(PosixEnv())
        jobs.append(env)
        if transport.rank == 0:
            env.delay(*STARTS[call], STUCK_S)
        model = nn.Linear(4, 4)
        config = load_config({"dir": str(tmp_path), "commit": {"timeout_s": 1.2}})
        assembly.assemble(model, torch.optim.SGD(model.parameters(), lr=0.1), config, transport, env)

    began = time.monotonic()
    try:
        for thread in try_ranks(run):
            assert isinstance(thread.error, errors.LayerwiseError), thread.error
            assert re.search(rf"{tmp_path}\S* for \d", str(thread.error)), thread.error
        assert time.monotonic() - began < 30
    finally:
        for env in jobs:
            env.clear()


RESTORES = {
    "record": ("read", "*manifest.json"),
    "file": ("open", "*rank_*"),
    "bytes": ("read", "*rank_*"),
}


@pytest.mark.parametrize("call", RESTORES)
def test_a_restore_from_a_stuck_disk_ends_in_time_and_names_the_file(tmp_path: Path, call: str) -> None:
    job = Job(tmp_path)
    job.to(2)
    job.ckpt.close()
    again = Job(tmp_path, commit={"timeout_s": 1.2})
    again.env.delay(*RESTORES[call], STUCK_S)
    began = time.monotonic()
    try:
        with pytest.raises((errors.DeadlineError, OSError), match=rf"{tmp_path}/step_000000000\d"):
            again.ckpt.restore()
        assert time.monotonic() - began < 30, "the restore waited for the disk"
    finally:
        workings_of(again.ckpt).closing.end(orderly=False)
        again.env.clear()


def test_mutation_a_look_at_records_without_a_deadline_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise_dist.engine.restores.within", lambda timeout_s, what, action: action())
    monkeypatch.setattr("test_stuck.STUCK_S", 1.0)
    with pytest.raises(AssertionError, match="waited 1.2 s for rank 0's decision"):
        test_a_restore_from_a_stuck_disk_ends_in_time_and_names_the_file(tmp_path, "record")
