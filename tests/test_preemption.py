# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: one common step is committed, all leave with the code that was configured, and nothing hangs.

And `save()`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.crash import build, in_ranks, settings, tensors_of, train
from kit.runners import Warm, WarmJob, told

import layerwise_dist as lwd
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly, preemption
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.engine.preemption import Preemption
from layerwise_dist.errors import ConfigError

RANKS, DEADLINE = 2, 60.0


def await_step(out: Path, job: WarmJob, step: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while not all(any(line.get("step", -1) >= step for line in told(out, rank)) for rank in range(RANKS)):
        assert time.monotonic() < deadline and job.poll() is None, job.output()[-4000:]
        time.sleep(0.01)


@pytest.mark.parametrize(("signalled", "mode"), [("one rank", ""), ("the agent", ""), ("one rank", "monitor")])
def test_all_ranks_commit_one_step_and_leave_when_one_is_told_to(
    warm: Warm, tmp_path: Path, signalled: str, mode: str
) -> None:
    job = warm.start("preempt.py", RANKS, tmp_path / "ckpt", tmp_path, 100_000, 20, mode)
    await_step(tmp_path, job, 5)
    began = time.monotonic()
    os.kill(told(tmp_path, 1)[0]["pid"] if signalled == "one rank" else job.pid, signal.SIGTERM)
    job.wait(DEADLINE)
    assert time.monotonic() - began < 15
    left = [told(tmp_path, rank)[-1] for rank in range(RANKS)]
    at = left[0]["at"]
    for rank in range(RANKS):
        assert left[rank]["left"] == 77 and left[rank]["at"] == left[rank]["committed"] == at >= 5, left
        assert told(tmp_path, rank)[-2]["step"] == at - 1, "nothing was trained after it"
        assert left[rank]["restored"] and left[rank]["wakeup"] == -1
    assert left[1]["calls"] == [signal.SIGTERM], "the script's own handler ran too"
    assert CheckpointMetadataManager(PosixEnv(), str(tmp_path / "ckpt")).inventory().lineage()[0].step == at
    if signalled == "one rank" and not mode:
        plain = tmp_path / "plain"
        plain.mkdir()
        warm.run("preempt.py", RANKS, plain / "ckpt", plain, at + 3, 20)
        warm.run("preempt.py", RANKS, tmp_path / "ckpt", tmp_path, at + 3, 20)
        for rank in range(RANKS):
            lines = told(tmp_path, rank)
            assert [line["start"] for line in lines if "start" in line] == [0, at]
            assert lines[-1]["end"] == told(plain, rank)[-1]["end"], "bit for bit the run that was never told to leave"


@pytest.mark.parametrize(
    ("signalled", "how"),
    [
        ("the group", "workers"), ("the agent", "workers persistent"), ("one rank", "workers persistent"),
        ("one rank", "asyncio"),
    ],
)  # fmt: skip
def test_workers_of_loaders_and_event_loops_do_not_keep_the_checkpoint_from_being_committed(
    warm: Warm, tmp_path: Path, signalled: str, how: str
) -> None:
    """Whoever signals the group signals the workers too: they make the batches that the last iteration needs."""
    job = warm.start("preempt.py", RANKS, tmp_path / "ckpt", tmp_path, 100_000, 20, *how.split())
    await_step(tmp_path, job, 23)  # within an epoch
    began = time.monotonic()
    ranks = [told(tmp_path, rank)[0]["pid"] for rank in range(RANKS)]
    everybody = job.pids()
    if "workers" in how:
        assert len(everybody) >= RANKS + 2 * RANKS
    targets = {"one rank": ranks[1:], "the agent": [job.pid]}
    for pid in targets.get(signalled, [*(pid for pid in everybody if pid not in ranks), *ranks]):
        os.kill(pid, signal.SIGTERM)
    job.wait(DEADLINE)
    assert time.monotonic() - began < 15
    left = [told(tmp_path, rank)[-1] for rank in range(RANKS)]
    at = left[0].get("at")
    for rank in range(RANKS):
        assert left[rank].get("left") == 77 and left[rank]["at"] == left[rank]["committed"] == at >= 23, (
            left, job.output()[-3000:]
        )  # fmt: skip
    assert job.pids() == [], "the workers are gone too"


def test_a_rank_in_a_dead_collective_leaves_at_its_deadline(warm: Warm, tmp_path: Path) -> None:
    job = warm.start("preempt.py", RANKS, tmp_path / "ckpt", tmp_path, 100_000, 2, "stop")
    await_step(tmp_path, job, 3)
    time.sleep(0.5)  # rank 0 is in the all-reduce of step 4 by now
    pid = told(tmp_path, 0)[0]["pid"]
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    while pid in job.pids():
        assert time.monotonic() - began < 2 + 6
        time.sleep(0.02)
    assert time.monotonic() - began > 1.5
    deadline = time.monotonic() + 10
    while "77" not in job.output() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.kill()
    assert "the process exits now (exit code 77)" in job.output()
    assert "step" in told(tmp_path, 0)[-1], "the main thread never came out of it"


def test_when_one_rank_dies_the_others_leave_in_time(warm: Warm, tmp_path: Path) -> None:
    """torchrun then sends SIGTERM to the rest, and SIGKILL 30 seconds later."""
    job = warm.start("preempt.py", RANKS, tmp_path / "ckpt", tmp_path, 100_000, 5)
    await_step(tmp_path, job, 3)
    began = time.monotonic()
    os.kill(told(tmp_path, 1)[0]["pid"], signal.SIGKILL)
    assert job.wait(DEADLINE).returncode != 0
    assert time.monotonic() - began < 5 + 8


# -- save() -----------------------------------------------------------------------------------------------------------


def steps_saved(root: Path, body: Callable[[Any, int, int], None], total: int, **config: Any) -> list[int]:
    """Trains two ranks to `total`; `body(engine, rank, step)` runs in each iteration. The steps that were committed."""
    held: dict[tuple[int, int], Any] = {}

    def run(transport: LocalTransport) -> None:
        model, optimizer = build(transport.rank)
        options = settings(str(root), **{"every_n_steps": 1000, "keep_last": 100, "save_last": False, **config})
        with assembly.assemble(model, optimizer, options, transport, PosixEnv()) as engine:
            for step in engine.steps(total):
                body(engine, transport.rank, step)
                train(model, optimizer, transport.rank, 0, step)
                held[transport.rank, step + 1] = tensors_of(model, optimizer)

    in_ranks(run)
    found = CheckpointMetadataManager(PosixEnv(), str(root)).inventory().lineage()
    return sorted(manifest.step for manifest in found)


def test_save_on_all_ranks_commits_the_end_of_that_iteration(tmp_path: Path) -> None:
    def body(engine: Any, rank: int, step: int) -> None:
        if step in (2, 7):
            time.sleep(0.05 * rank)
            assert engine.save() is None
            engine.save()  # once more changes nothing

    assert steps_saved(tmp_path, body, 12) == [3, 8]


def test_save_on_one_rank_makes_all_commit_one_boundary_soon_after(tmp_path: Path) -> None:
    asked: list[int] = []

    def body(engine: Any, rank: int, step: int) -> None:
        committed = engine.committed_step
        if rank == 1 and step == 3 or rank == 0 and len(asked) == 1 and committed is not None:
            asked.append(step)
            engine.save()
        elif len(asked) < 2 or committed is None or committed <= asked[1]:
            time.sleep(0.005)  # so that the other thread's word comes within so many steps

    first, second = steps_saved(tmp_path, body, 400)
    assert 4 <= first <= asked[1] < second


def test_save_of_a_step_that_is_due_commits_it_once(tmp_path: Path) -> None:
    def body(engine: Any, rank: int, step: int) -> None:
        if step in (2, 3):
            engine.save()

    assert steps_saved(tmp_path / "each", body, 5, every_n_steps=1) == [1, 2, 3, 4, 5]
    assert steps_saved(tmp_path / "fourth", body, 9, every_n_steps=4) == [3, 4, 8]


def test_save_waits_for_room_though_when_full_is_skip(tmp_path: Path) -> None:
    def body(engine: Any, rank: int, step: int) -> None:
        engine.save()

    assert steps_saved(tmp_path, body, 6, when_full="skip", max_in_flight=1) == [1, 2, 3, 4, 5, 6]


def test_save_takes_a_state_only_with_a_tag_and_nothing_once_closed(tmp_path: Path) -> None:
    model, optimizer = build(0)
    engine = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(ValueError, match="under a tag"):
        engine.save(client_state={"epoch": 1})
    engine.close()
    with pytest.raises(lwd.errors.BoundaryError, match="after close"):
        engine.save()


# -- the signal -------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the other ranks were asked for. The process, which is the tests', does not end."""
    ended: list[int] = []
    made: list[Preemption] = []
    begin = Preemption.__init__

    def noted(self: Preemption, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(preemption, "end_process", ended.append)
    monkeypatch.setattr(Preemption, "__init__", noted)
    yield []
    for each in made:
        each.close()
        each.grace.join(30)
        preemption._native.stop_hearing(each.bell)
    assert ended == [each.exit_code for each in made if each.begun]


def watch(heard: list[str]) -> Preemption:
    return Preemption(3, grace_s=0.3, exit_code=9, ask=heard.append, failed=heard.append)


def await_heard(heard: list[str]) -> None:
    deadline = time.monotonic() + 10
    while not heard:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_signal_is_heard_while_the_main_thread_runs_no_python(heard: list[str]) -> None:
    before, calls = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    ours, far = socket.socketpair()
    ours.setblocking(False)
    wakeup = signal.set_wakeup_fd(ours.fileno())
    try:
        watching = watch(heard)
        killer = threading.Thread(target=lambda: (time.sleep(0.1), os.kill(os.getpid(), signal.SIGTERM)))
        killer.start()
        deaf = torch.randn(900, 900)
        while killer.is_alive():
            deaf = (deaf @ deaf).clamp(-1, 1)
        await_heard(heard)
        assert heard == ["SIGTERM on rank 3"] and watching.begun
        assert 0 <= watching.remaining_s <= 0.3
        far.settimeout(5)
        assert far.recv(1) == bytes([signal.SIGTERM]), "who listened before still hears"
        assert calls == [signal.SIGTERM]
        watching.close()
        watching.close()
        assert signal.getsignal(signal.SIGTERM)(1, None) is None and calls == [signal.SIGTERM, 1]
        assert signal.set_wakeup_fd(-1) == ours.fileno()
        with pytest.raises(SystemExit) as left:
            watching.leave()
        assert left.value.code == 9
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(wakeup)
        ours.close(), far.close()


def test_a_forked_child_dies_of_its_own_sigterm_and_the_parent_does_not_hear_of_it(heard: list[str]) -> None:
    watching = watch(heard)
    try:
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(tell, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert not heard and not watching.begun
        os.close(ready), os.close(tell)
    finally:
        watching.close()


def test_a_bell_that_is_closed_is_not_rung_any_more(heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread may be about to take its place in front of other handlers again when it is closed: its descriptor's
    number will be another file's.
    """
    real, about, goes_on = preemption._native.hear_signal, threading.Event(), threading.Event()

    def slowly(number: int, bell: int) -> None:
        if threading.current_thread().name == "layerwise-signals":
            about.set()
            assert goes_on.wait(10)
        real(number, bell)

    monkeypatch.setattr(preemption._native, "hear_signal", slowly)
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        watching = watch(heard)
        assert about.wait(10)
        threading.Timer(0.1, goes_on.set).start()
        watching.close()
        others = os.eventfd(0, os.EFD_NONBLOCK)
        assert others == watching.bell, "the number is free"
        os.kill(os.getpid(), signal.SIGTERM)
        while not calls:
            time.sleep(0.005)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(others)
        os.close(others)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_further_signals_do_not_end_a_process_that_leaves(heard: list[str]) -> None:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        watching = watch(heard)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        while not watching.begun:
            time.sleep(0.005)
        watching.close()
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


class Slow(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.01)
        return torch.full((6,), float(index))


def leave_beside_workers(folder: Path) -> int | None:
    """The step that is committed when workers get the signal, the rank after them, and the iteration needs more batches
    than there are.
    """
    model, optimizer = build(0)
    calls: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    engine = lwd.attach(
        model, optimizer, dir=str(folder), every_n_steps=1000,
        preemption={"enabled": True, "grace_s": 8, "exit_code": 77},
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))  # after attach(): ours is in front again
    loader = iter(torch.utils.data.DataLoader(Slow(), batch_size=4, num_workers=2, prefetch_factor=1))
    workers = [worker.pid for worker in loader._workers]
    try:
        with pytest.raises(SystemExit) as left, engine:
            for step in engine.steps(100):
                if step == 3:
                    time.sleep(0.3)
                    # By another process: what its parent sends ends a worker.
                    for pid in (*workers, os.getpid(), os.getpid()):
                        subprocess.run(["sh", "-c", f"kill -TERM {pid}"], check=True)
                for _ in range(4):
                    model(next(loader)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert left.value.code == 77 and calls
    finally:
        signal.signal(signal.SIGTERM, before)
    del loader
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return engine.committed_step


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process, which is the tests', is not ended at the deadline, and hears of its children again."""
    before = signal.getsignal(signal.SIGCHLD)
    bells: list[int] = []
    monkeypatch.setattr(Preemption, "_end_in_time", lambda self: bells.append(self.bell))
    yield
    for bell in bells:
        preemption._native.stop_hearing(bell)
    signal.signal(signal.SIGCHLD, before)


def test_workers_that_are_signalled_first_still_make_the_batches_of_the_last_iteration(
    stays: None, tmp_path: Path
) -> None:
    assert leave_beside_workers(tmp_path) == 4


def test_mutation_workers_that_die_of_the_signal_are_caught(
    stays: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption._native, "outlive_signal", lambda number: None)
    with pytest.raises((RuntimeError, OSError, EOFError)):  # of torch, or of a pipe to one of them
        leave_beside_workers(tmp_path)


def test_an_error_on_the_way_leaves_what_is_sealed_the_time_that_there_is(stays: None, tmp_path: Path) -> None:
    """Not the ten seconds of other errors: a disk may need longer, and `grace_s` may be shorter."""
    for grace_s, least, most in ((25, 20, 25), (5, 2, 5)):
        model, optimizer = build(0)
        with (
            pytest.raises(KeyError),
            lwd.attach(
                model, optimizer, dir=str(tmp_path / str(grace_s)), preemption={"enabled": True, "grace_s": grace_s}
            ) as engine,
        ):
            for step in engine.steps(3):
                train(model, optimizer, 0, 0, step)
                if step == 1:
                    workings = workings_of(engine)
                    closing = workings.closing
                    assert closing.patience_s(orderly=False) == 10
                    assert workings.preemption is not None
                    workings.preemption.leaving("a test")
                    assert least < closing.patience_s(orderly=False) < most
                    raise KeyError
        assert engine.committed_step == 1


def test_attach_on_another_thread_is_an_error(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def run() -> None:
        model, optimizer = build(0)
        try:
            lwd.attach(model, optimizer, dir=str(tmp_path), preemption={"enabled": True})
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert "preemption.enabled needs attach() on the main thread" in str(errors[0])
