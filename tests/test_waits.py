# SPDX-License-Identifier: Apache-2.0
"""Waits of the training thread end with what they wait for, however slow the disk is: nothing is overwritten meanwhile,
so no deadline but their own ends them, and verdicts that only this thread can give are given while it waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.crash import in_ranks, try_ranks
from kit.waiting import FENCE_S, Job, equal, restored
from torch import nn

from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture.lease import Capture
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import LayerwiseEngine, workings_of

torch.set_num_threads(1)

HELD_S = 20.0  # of each block, until the test lets them go


def by_restore(ckpt: LayerwiseEngine) -> None:
    assert ckpt.restore() == ckpt.completed


WAITS: dict[str, Callable[[LayerwiseEngine], Any]] = {
    "wait": lambda ckpt: ckpt.wait(ckpt.completed),
    "durable": lambda ckpt: ckpt.wait(ckpt.completed, "durable"),
    "save": lambda ckpt: ckpt.save("named"),
    "drain": lambda ckpt: ckpt.drain(),
    "restore": by_restore,
    "close": lambda ckpt: ckpt.close(),
    "end": lambda ckpt: workings_of(ckpt).closing.end(orderly=False),  # as where a process leaves
}


# -- a disk that takes longer than fence_timeout_s ---------------------------------------------------------------------


@pytest.mark.parametrize(("how", "fast"), [*((how, 3) for how in WAITS), ("wait", 0), ("save", 0)])
def test_a_wait_on_a_slow_disk_ends_with_the_checkpoint(tmp_path: Path, how: str, fast: int) -> None:
    """The first checkpoints are compared with the memory once they are written; later ones are not waited for then."""
    job = Job(tmp_path)
    with job.ckpt as ckpt:
        for step in range(1, fast + 1):  # one by one: a busy machine may take longer than FENCE_S to decide on them
            job.to(step)
            ckpt.wait(step)
        job.slow()
        began = time.monotonic()
        job.to(fast + 1)
        held = job.held()
        WAITS[how](ckpt)
        assert time.monotonic() - began > 2 * FENCE_S, "the disk was not slow"
    assert ckpt.committed_step == fast + 1 and ckpt.stats()["checkpoints_aborted"] == 0
    assert equal(restored(tmp_path, fast + 1), held)


def test_a_wait_that_runs_out_ends_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path)
    with job.ckpt as ckpt:
        job.slow(HELD_S)
        job.to(1)
        for name in ("wait", "drain", "save"):
            with pytest.raises(errors.DeadlineError):
                getattr(ckpt, name)(*{"wait": (1,), "save": ("no",)}.get(name, ()), timeout=0.01)
        job.env.clear()
        ckpt.wait(1)
        with pytest.raises(errors.DeadlineError, match="was not committed after"):
            job.slow(HELD_S)
            ckpt.save("late", timeout=0.2)
        job.env.clear()
        ckpt.wait(1)
        assert ckpt.save("named") == 1
    assert ckpt.stats()["checkpoints_aborted"] == 0


@pytest.mark.parametrize("room", [True, False])
def test_an_update_after_a_wait_that_ran_out_fences_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    if not room:
        pool_of_bounce_buffer = 32 << 10
        monkeypatch.setattr("layerwise_dist.engine.attempts.pool_bytes", lambda *_, **__: pool_of_bounce_buffer)
    job = Job(tmp_path, fence_timeout_s=20.0 if room else FENCE_S)
    with job.ckpt as ckpt:
        job.slow(0.03 if room else HELD_S)
        job.to(1)
        with pytest.raises(errors.DeadlineError):
            ckpt.wait(1, timeout=0.01)
        held = job.held()
        job.update()
        job.env.clear()
        if room:
            ckpt.wait(1)
        else:
            with pytest.raises(errors.CommitError, match="fence_timeout_s"):
                ckpt.wait(1)
        job.to(2)
    if room:
        assert equal(restored(tmp_path, 1), held)


def test_what_is_changed_on_a_slow_disk_while_a_wait_runs_out_is_not_committed(tmp_path: Path) -> None:
    """Whether a version counter shows it or not: the first checkpoints are compared whole."""
    for blind in (False, True):
        job = Job(tmp_path / str(blind))
        with job.ckpt as ckpt:
            job.slow(HELD_S)
            job.to(1)
            with pytest.raises(errors.DeadlineError):
                ckpt.wait(1, timeout=0.01)
            with torch.no_grad():
                (job.model.weight.data if blind else job.model.weight).mul_(2)
            job.env.clear()
            with pytest.raises(errors.CommitError):
                ckpt.wait(1)
            job.to(2)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_close_raises_when_the_last_checkpoint_was_given_up_and_names_the_newest(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.to(2)
    job.ckpt.wait(2)
    job.env.fail(operation="create", path_pattern="*step_0000000003*", errno=28)
    job.to(3)
    with pytest.raises(errors.CommitError, match=r"not committed \(the newest that is: step 2\): .*step 3 was aborted"):
        job.ckpt.close()


def test_mutation_a_close_that_does_not_ask_for_the_last_checkpoint_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Participant, "saved", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_close_raises_when_the_last_checkpoint_was_given_up_and_names_the_newest(tmp_path)


def test_close_ends_by_its_own_deadline_and_says_what_is_lacking(tmp_path: Path) -> None:
    job = Job(tmp_path, commit={"timeout_s": 0.5})
    job.slow(HELD_S)
    job.to(1)
    began = time.monotonic()
    with pytest.raises((errors.DeadlineError, errors.CommitError)):
        job.ckpt.close()
    job.env.clear()
    assert time.monotonic() - began < 15


def test_an_exception_on_its_way_is_not_replaced_and_bounds_the_wait(tmp_path: Path) -> None:
    job = Job(tmp_path, commit={"timeout_s": 0.5})
    with pytest.raises(ZeroDivisionError):
        with job.ckpt:
            job.slow(HELD_S)
            job.to(1)
            raise ZeroDivisionError
    job.env.clear()
    assert job.ckpt.committed_step is None


def test_an_iteration_that_cannot_be_ended_does_not_take_those_before_it_along(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.slow()
    job.to(1)
    job.update()
    workings_of(job.ckpt).boundary.close = lambda **_: (_ for _ in ()).throw(  # type: ignore
        errors.BoundaryError("half a window")
    )
    with pytest.raises(errors.BoundaryError, match="half a window"):
        job.ckpt.close()
    assert job.ckpt.committed_step == 1


def test_ranks_of_which_one_has_a_slow_disk_agree_and_number_alike_after_a_save_that_ran_out(tmp_path: Path) -> None:
    def run(transport: LocalTransport) -> None:
        job = Job(tmp_path, transport)
        with job.ckpt as ckpt:
            if transport.rank == 1:
                job.slow(HELD_S)
            job.to(1)
            with pytest.raises(errors.DeadlineError):
                ckpt.save("a", timeout=0.05)
            job.env.clear()
            ckpt.wait(1)
            assert ckpt.save("b") == 1
            assert ckpt.stats()["checkpoints_aborted"] == 0

    in_ranks(run)


def test_close_raises_on_all_ranks_when_one_could_not_begin_the_last_checkpoint(tmp_path: Path) -> None:
    def run(transport: LocalTransport) -> None:
        job = Job(tmp_path, transport)
        job.to(1)
        job.ckpt.wait(1)
        if transport.rank == 1:
            job.env.fail(operation="create", path_pattern="*step_0000000002*", errno=28)
        job.to(2)
        job.ckpt.close()

    for thread in try_ranks(run):
        assert isinstance(thread.error, errors.CommitError) and "step 2 was aborted: rank 1" in str(thread.error)


def test_an_engine_whose_thread_has_ended_is_closed_by_another(tmp_path: Path) -> None:
    """As at the exit of a process that trained on a thread."""
    jobs: list[Job] = []

    def run(transport: LocalTransport) -> None:
        jobs.append(Job(tmp_path, transport))
        jobs[0].slow()
        jobs[0].to(1)

    in_ranks(run, world=1)
    jobs[0].ckpt.close()
    assert jobs[0].ckpt.committed_step == 1


def test_an_engine_whose_thread_goes_on_is_not_closed_by_another(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.to(1)

    def run(transport: LocalTransport) -> None:
        with pytest.raises(errors.BoundaryError, match="while the training thread"):
            job.ckpt.close()

    in_ranks(run, world=1)


def test_a_failed_checkpoint_that_was_rolled_back_past_is_none_that_close_lacks(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.to(2)
    job.ckpt.wait(2)
    job.env.fail(operation="create", path_pattern="*step_0000000003*", errno=28)
    job.to(3)
    assert job.ckpt.restore() == 2
    job.ckpt.close()


# -- room --------------------------------------------------------------------------------------------------------------


SLOW: dict[str, Any] = {
    "fence_timeout_s": 3.0, "pool_mb": 8, "keep_last": 99, "commit": {"timeout_s": 20, "raise_after": 99},
    "writer": {"queue_depth": 1, "block_kb": 16, "backend": "posix"},
}  # fmt: skip


def several(root: Path, *, max_in_flight: int, **config: Any) -> dict[str, Any]:
    """Two optimizers, of which one updates every third iteration: what it did not update only this thread can judge."""
    env = testing.FaultEnv(PosixEnv())
    env.delay("write", "*rank_*", 0.01)
    nets = {"one": nn.Linear(128, 128), "two": nn.Linear(128, 128)}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in nets.items()}
    options: dict[str, Any] = {
        "dir": str(root), "max_in_flight": max_in_flight, **SLOW, **config,
    }  # fmt: skip
    ckpt = assembly.assemble(
        None, None, load_config(options), LocalTransport(LocalHub(1), 0), env, models=nets, optimizers=optimizers
    )
    for step in ckpt.steps(8):
        for name, every in (("one", 1), ("two", 3)):
            if step % every == 0:
                nets[name](torch.ones(2, 128)).square().mean().backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
    ckpt.drain()
    stats = ckpt.stats()
    workings_of(ckpt).closing.end(orderly=False)
    return stats


@pytest.mark.parametrize("capture", ["lease", "stage"])
@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_several_optimizers_on_a_slow_disk_lose_no_checkpoint(tmp_path: Path, max_in_flight: int, capture: str) -> None:
    stats = several(tmp_path, max_in_flight=max_in_flight, capture=capture)
    assert (stats["checkpoints_committed"], stats["checkpoints_aborted"]) == (8, 0)


def test_updates_by_layers_on_a_slow_disk_lose_no_checkpoint(tmp_path: Path) -> None:
    """An attempt is opened within the update, while what it has not come to yet is not judged."""
    env = testing.FaultEnv(PosixEnv())
    env.delay("write", "*rank_*", 0.01)
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {
        "dir": str(tmp_path), "update": "pipelined_step", "max_in_flight": 1, **SLOW,
    }  # fmt: skip
    with assembly.assemble(model, optimizer, load_config(options), LocalTransport(LocalHub(1), 0), env) as ckpt:
        for _ in ckpt.steps(8):
            model(torch.ones(2, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    stats = ckpt.stats()
    assert (stats["checkpoints_committed"], stats["checkpoints_aborted"]) == (8, 0)


def test_mutation_a_wait_that_does_not_judge_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Participant, "judge_by", lambda *_: None)
    stats = several(tmp_path / "room", max_in_flight=1, fence_timeout_s=0.5)
    assert stats["checkpoints_aborted"] > 0
    job = Job(tmp_path / "wait")
    job.to(4)
    job.slow()
    job.to(5)
    with pytest.raises(errors.DeadlineError):
        job.ckpt.wait(5, timeout=1.5)
    workings_of(job.ckpt).closing.end(orderly=False, limit_s=0.1)


def test_mutation_a_wait_that_fences_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another deadline than its own, and nothing that is overwritten."""
    wait = LayerwiseEngine.wait

    def fencing(ckpt: LayerwiseEngine, *args: Any, **options: Any) -> None:
        for capture in workings_of(ckpt).captures.sealed:
            if not capture.wait_read(FENCE_S):
                capture.give_up("too slow")
        wait(ckpt, *args, **options)

    monkeypatch.setattr(LayerwiseEngine, "wait", fencing)
    with pytest.raises(errors.CommitError, match="too slow"):
        test_a_wait_on_a_slow_disk_ends_with_the_checkpoint(tmp_path, "wait", 0)


def test_mutation_a_full_audit_that_is_taken_for_certain_before_it_is_written_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Capture.seal

    def hasty(capture: Capture, survey: Any) -> set[str]:
        found = seal(capture, survey)
        capture._certain = True
        return found

    monkeypatch.setattr(Capture, "seal", hasty)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_what_is_changed_on_a_slow_disk_while_a_wait_runs_out_is_not_committed(tmp_path)
