# SPDX-License-Identifier: Apache-2.0
"""Monitor mode, with real processes: what was acknowledged is committed whoever dies, and nobody stays behind."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.drawing import drawn
from kit.runners import Warm, WarmJob, told

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.engine.engine import workings_of

DEADLINE = 60.0


def values(out: Path, key: str, ranks: int) -> list[Any]:
    return [line[key] for rank in range(ranks) for line in told(out, rank) if line.get(key) is not None]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def await_that(what: Callable[[], Any], why: Callable[[], str] = lambda: "", timeout: float = DEADLINE) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)
    return found


def all_end(out: Path, ranks: int, timeout: float = 20.0) -> None:
    """Every monitor that was told of ends by itself, in time; so its ports, descriptors and memory are gone with it."""
    pids = values(out, "monitor", ranks)
    assert pids
    await_that(lambda: not any(map(alive, pids)), lambda: f"monitors {[*filter(alive, pids)]} stay behind", timeout)


def newest(root: Path) -> int:
    lineage = CheckpointMetadataManager(PosixEnv(), str(root)).inventory().lineage()
    return lineage[0].step if lineage else 0


def nothing_half_done(root: Path) -> None:
    """Only commits, each whole."""
    for folder in root.glob("step_*"):
        names = sorted(each.name for each in folder.iterdir())
        assert names[0] == "manifest.json" and not any(name.endswith(".partial") for name in names), names


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """No named memory, and no monitor of this test's."""
    before = set(os.listdir("/dev/shm"))
    yield
    for path in tmp_path.glob("**/*.jsonl"):
        for line in path.read_text().split("\n")[:-1]:
            if (pid := json.loads(line).get("monitor")) is not None and alive(pid):
                os.kill(pid, signal.SIGKILL)  # of a test that failed, or of a mutation that is to leave one
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "layerwise" in name]


@pytest.fixture(scope="module")
def references(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[dict[int, str]]]:
    """What each rank holds at each step of a run in direct mode; step 0 is the start."""
    known: dict[tuple[str, int], list[dict[int, str]]] = {}

    def reference(wrapper: str, ranks: int) -> list[dict[int, str]]:
        if (wrapper, ranks) not in known:
            out = tmp_path_factory.mktemp("reference")
            warm.run("monitored.py", ranks, wrapper, out / "ckpt", out, "--mode", "direct", "--total", 20)
            known[wrapper, ranks] = [
                {line.get("step", 0): line["hash"] for line in told(out, rank) if "hash" in line}
                for rank in range(ranks)
            ]
        return known[wrapper, ranks]

    return reference


# -- training is the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrapper", "ranks"), [("plain", 1), ("ddp", 2), ("fsdp2", 2)])
def test_training_with_monitors_is_bit_identical_and_so_is_what_they_saved(
    warm: Warm, tmp_path: Path, references: Any, wrapper: str, ranks: int
) -> None:
    wanted = references(wrapper, ranks)
    for total in (7, 12):
        warm.run("monitored.py", ranks, wrapper, tmp_path / "ckpt", tmp_path, "--total", total)
    for rank in range(ranks):
        lines = told(tmp_path, rank)
        assert [line["start"] for line in lines if "start" in line] == [0, 7]
        assert all(wanted[rank][line["step"]] == line["hash"] for line in lines if "step" in line)
        assert [line["hash"] for line in lines if line.get("start") == 7] == [wanted[rank][7]]
        assert lines[-1] == {"end": 12, "committed": 12}
    assert not any(map(alive, values(tmp_path, "monitor", ranks))), "close() waits for the monitor's end"
    nothing_half_done(tmp_path / "ckpt")
    if wrapper == "ddp":  # and into another number of ranks
        other = tmp_path / "other"
        other.mkdir()
        warm.run("monitored.py", 1, wrapper, tmp_path / "ckpt", other, "--total", 13)
        assert [line["hash"] for line in told(other, 0) if line.get("start") == 12] == [wanted[0][12]]
        assert told(other, 0)[-1] == {"end": 13, "committed": 13}


def test_frozen_parameters_are_in_each_shard_and_a_roll_back_makes_a_branch(warm: Warm, tmp_path: Path) -> None:
    run = ("monitored.py", 1, "plain", tmp_path / "ckpt", tmp_path, "--frozen")
    warm.run(*run, "--total", 6)
    warm.run(*run, "--total", 3, "--roll", 3)
    warm.run(*run, "--total", 5)
    assert [line["start"] for line in told(tmp_path) if "start" in line] == [0, 3, 3]
    assert not (tmp_path / "ckpt" / "base").exists()
    hashes = {line["step"]: line["hash"] for line in told(tmp_path) if "step" in line and line["step"] <= 3}
    assert all(line["hash"] == hashes[3] for line in told(tmp_path) if line.get("start") == 3)


# -- the promise ------------------------------------------------------------------------------------------------------


def kill_trainers(job: WarmJob) -> None:
    """SIGKILL for the agent and all ranks; monitors have sessions of their own."""
    job.kill()


def restores(warm: Warm, out: Path, wrapper: str, ranks: int, wanted: list[dict[int, str]], least: int) -> int:
    """A new start goes on from `least` or a newer step, the same on all ranks, with what they held then."""
    warm.run("monitored.py", ranks, wrapper, out / "ckpt", out, "--total", 0, timeout=DEADLINE)
    starts = [next(line for line in reversed(told(out, rank)) if "start" in line) for rank in range(ranks)]
    step = starts[0]["start"]
    assert step >= least, f"step {least} was acknowledged, and {step} is what there is"
    assert all(line["start"] == step for line in starts)
    assert [line["hash"] for line in starts] == [wanted[rank][step] for rank in range(ranks)]
    return int(step)


@pytest.mark.timeout(1800)
def test_a_step_that_was_staged_is_committed_though_all_trainers_are_killed_at_any_moment(
    warm: Warm, tmp_path: Path, references: Any, long: bool
) -> None:
    seed = drawn(range(1 << 32), __name__)
    print(f"seed {seed}")
    dice = random.Random(seed)
    saved = 0
    for number in range(50 if long else 3):
        wrapper, ranks = [("ddp", 2), ("fsdp2", 2), ("plain", 1)][number % 3]
        wanted = references(wrapper, ranks)
        out = tmp_path / f"trial-{number}"
        out.mkdir()
        slow = ("--odd", "slow") if dice.random() < 0.3 else ()
        job = warm.start("monitored.py", ranks, wrapper, out / "ckpt", out, "--total", 20, "--end", "wait", *slow)
        await_that(lambda out=out, ranks=ranks: values(out, "staged", ranks), job.output)
        time.sleep(dice.uniform(0.0, 0.6))
        kill_trainers(job)
        staged, committed = max(values(out, "staged", ranks)), max([0, *values(out, "committed", ranks)])
        saved += staged > committed
        if dice.random() < 0.5:  # else the new start waits for the old monitors
            all_end(out, ranks)
            assert newest(out / "ckpt") >= staged, f"seed {seed}, trial {number}: step {staged} was acknowledged"
            nothing_half_done(out / "ckpt")
        try:
            restores(warm, out, wrapper, ranks, wanted, staged)
            all_end(out, ranks)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, trial {number} ({wrapper}, {ranks} ranks): {error}") from error
    print(f"{saved} kills came while a step was staged and not reported as committed")


def killed_once_staged(warm: Warm, out: Path, odd: str) -> int:
    """Two ranks are killed when the last step is staged, and not committed yet; the step that is there then."""
    job = warm.start("monitored.py", 2, "ddp", out / "ckpt", out, "--total", 2, "--end", "wait", "--odd", odd)
    await_that(lambda: 2 in values(out, "staged", 2), job.output)
    kill_trainers(job)
    assert 2 not in values(out, "committed", 2)
    all_end(out, 2)
    return newest(out / "ckpt")


def test_what_was_staged_right_before_the_kill_is_committed_and_the_next_start_waits_for_that(
    warm: Warm, tmp_path: Path, references: Any
) -> None:
    assert killed_once_staged(warm, tmp_path, "slow") == 2
    again = tmp_path / "again"
    again.mkdir()
    job = warm.start("monitored.py", 2, "ddp", again / "ckpt", again, "--total", 2, "--end", "wait", "--odd", "held")
    await_that(lambda: 2 in values(again, "staged", 2), job.output)
    kill_trainers(job)
    job = warm.start("monitored.py", 2, "ddp", again / "ckpt", again, "--total", 0)
    await_that(lambda: "waiting at most 22.5 s for the monitor (pid" in job.output(), job.output)
    (again / "go").touch()
    finished = job.wait(DEADLINE)
    assert finished.returncode == 0, finished.output
    assert [told(again, rank)[-2]["start"] for rank in range(2)] == [2, 2]
    assert [told(again, rank)[-2]["hash"] for rank in range(2)] == [references("ddp", 2)[r][2] for r in range(2)]


def test_a_monitor_that_ends_with_its_trainer_is_found(warm: Warm, tmp_path: Path) -> None:
    assert killed_once_staged(warm, tmp_path, "hasty") < 2


def paused(warm: Warm, out: Path, *odd: str, until: int = 2) -> list[int]:
    """Rank 1 stops short of sealing step 3, which rank 0 has sealed; then all are killed, once step `until` has been
    acknowledged. What was acknowledged.
    """
    job = warm.start("monitored.py", 2, "plain", out / "ckpt", out, "--total", 6, "--pause", "2,1", *odd)
    await_that(lambda: values(out, "paused", 2), job.output)
    await_that(lambda: 2 in values(out, "committed", 1) or "staged" in told(out, 1)[-1], job.output)
    time.sleep(0.4)

    def acknowledged() -> list[int]:
        return [line["staged"] for line in told(out, 1) if line.get("staged") is not None]

    await_that(lambda: max(acknowledged(), default=0) >= until, job.output)
    kill_trainers(job)
    return acknowledged()


def test_a_step_that_one_rank_had_not_sealed_is_never_acknowledged_and_aborted(warm: Warm, tmp_path: Path) -> None:
    assert max(paused(warm, tmp_path)) == 2
    all_end(tmp_path, 2, 8)
    assert newest(tmp_path / "ckpt") == 2
    nothing_half_done(tmp_path / "ckpt")


@pytest.mark.parametrize("odd", ["early", "first"])
def test_acknowledging_what_not_all_hold_is_found(warm: Warm, tmp_path: Path, odd: str) -> None:
    assert max(paused(warm, tmp_path, "--odd", odd, until=3)) > 2


def test_leaving_what_was_not_sealed_undecided_is_found(warm: Warm, tmp_path: Path) -> None:
    paused(warm, tmp_path, "--odd", "lenient")
    time.sleep(1)
    with pytest.raises(AssertionError):
        nothing_half_done(tmp_path / "ckpt")


def test_a_monitor_that_stays_behind_is_found(warm: Warm, tmp_path: Path) -> None:
    paused(warm, tmp_path, "--odd", "immortal")
    with pytest.raises(AssertionError, match="stay behind"):
        all_end(tmp_path, 2, 1)


# -- other deaths -----------------------------------------------------------------------------------------------------


def test_one_killed_trainer_ends_the_job_at_one_step_and_nobody_stays(warm: Warm, tmp_path: Path) -> None:
    job = warm.start("monitored.py", 2, "plain", tmp_path / "ckpt", tmp_path, "--total", 100000)
    await_that(lambda: len(values(tmp_path, "step", 2)) > 8, job.output)
    os.kill(told(tmp_path, 1)[0]["pid"], signal.SIGKILL)
    job.ends_within(40)
    all_end(tmp_path, 2)
    staged = max(values(tmp_path, "staged", 2))
    assert newest(tmp_path / "ckpt") >= staged
    nothing_half_done(tmp_path / "ckpt")


@pytest.mark.parametrize(("wrapper", "rank"), [("plain", 0), ("ddp", 1)])
def test_when_a_monitor_dies_all_trainers_raise_and_name_it(
    warm: Warm, tmp_path: Path, wrapper: str, rank: int
) -> None:
    job = warm.start("monitored.py", 2, wrapper, tmp_path / "ckpt", tmp_path, "--total", 100000)
    await_that(lambda: len(values(tmp_path, "step", 2)) > 8, job.output)
    os.kill(values(tmp_path, "monitor", 2)[rank], signal.SIGKILL)
    assert job.ends_within(40), job.output()
    errors = [line for each in range(2) for line in told(tmp_path, each) if "error" in line]
    assert any("gone" in line["message"] and f"rank {rank}" in line["message"] for line in errors), errors
    # Where one rank's last grant was on its way when its monitor died, it stops before the others, whose collective
    # then fails. That is rare.
    assert all(line["error"] in ("CommitError", "RuntimeError") for line in errors), errors
    if errors[0]["error"] == errors[-1]["error"] == "CommitError" and wrapper == "ddp":
        assert errors[0]["at"] == errors[1]["at"], errors
    all_end(tmp_path, 2)
    assert newest(tmp_path / "ckpt") >= max(values(tmp_path, "committed", 2))


def test_a_stopped_trainer_and_a_stopped_monitor_cost_deadlines_and_no_more(warm: Warm, tmp_path: Path) -> None:
    run = ("monitored.py", 2, "plain", tmp_path / "ckpt", tmp_path, "--total", 100000, "--timeout", 2)
    for variable in ("pid", "monitor"):
        job = warm.start(*run)
        known = len(values(tmp_path, "step", 2))
        await_that(lambda known=known: len(values(tmp_path, "step", 2)) > known + 8, job.output)
        stopped = [line[variable] for line in told(tmp_path, 1) if variable in line][-1]
        os.kill(stopped, signal.SIGSTOP)
        before = len([line for line in told(tmp_path) if "error" in line])
        await_that(lambda before=before: len([line for line in told(tmp_path) if "error" in line]) > before, job.output)
        assert [line for line in told(tmp_path) if "error" in line][-1]["error"] in ("CommitError", "DeadlineError")
        job.ends_within(1)  # the agent's SIGTERM does not reach who is stopped; SIGKILL does
        if variable == "pid":
            all_end(tmp_path, 2)
        elif alive(stopped):
            os.kill(stopped, signal.SIGCONT)
            all_end(tmp_path, 2)


@pytest.mark.parametrize("how", ["close", "raise", "exit", "SIGTERM", "SIGINT", "SIGKILL", "monitor", "stopped"])
def test_whatever_ends_a_job_nothing_of_it_stays(warm: Warm, tmp_path: Path, how: str) -> None:
    end = how if how in ("close", "raise", "exit") else "wait"
    job = warm.start(
        "monitored.py", 1, "plain", tmp_path / "ckpt", tmp_path, "--total", 5, "--end", end, "--timeout", 6
    )
    if end == "wait":
        await_that(lambda: 5 in values(tmp_path, "staged", 1), job.output)
        (monitor,), (trainer,) = values(tmp_path, "monitor", 1), values(tmp_path, "pid", 1)
        if how.startswith("SIG"):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(monitor, number)  # as a signal for all processes of the job does
            os.kill(trainer, getattr(signal, how))
        elif how == "monitor":
            os.kill(monitor, signal.SIGKILL)
            os.kill(trainer, signal.SIGKILL)
        else:
            os.kill(monitor, signal.SIGSTOP)
            os.kill(trainer, signal.SIGKILL)
            await_that(lambda: not alive(trainer))
            os.kill(monitor, signal.SIGCONT)  # who is stopped cannot end by itself
        await_that(lambda: not alive(trainer), job.output)
        job.kill()
    assert job.ends_within(20) or end == "wait", job.output()
    all_end(tmp_path, 1)
    if how == "monitor":
        assert newest(tmp_path / "ckpt") >= max([0, *values(tmp_path, "committed", 1)])
        return
    assert newest(tmp_path / "ckpt") == (4 if how == "raise" else 5)
    nothing_half_done(tmp_path / "ckpt")


def test_saves_under_a_tag_traces_and_updates_by_layers_are_as_in_direct_mode(tmp_path: Path) -> None:
    def trained(mode: str, folder: str, steps: int) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(7)
        model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 100))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = {"big": {"table": torch.arange(150_000)}}  # more than goes through the pool at once
        with lwd.attach(
            model, optimizer, dir=str(tmp_path / folder), mode=mode, update="pipelined_step", every_n_steps=2,
            state=state, audit="always", writer={"block_kb": 64}, keep_last=20, save_last=False,
        ) as engine:  # fmt: skip
            if engine.restore(tag="best", on_missing="fresh"):
                assert engine.client_state == {"score": 0.5} and torch.equal(
                    state["big"]["table"], torch.arange(150_000)
                )
            if mode == "monitor" and not engine.completed:
                engine.trace(tmp_path / "trace.json")
            for _ in engine.steps(steps):
                model(torch.randn(4, 300)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if steps == 5:
                state["big"]["table"] = torch.arange(150_000)
                assert engine.save("best", {"score": 0.5}) == 5
            assert engine.stats()["checkpoints_aborted"] == 0
            return engine.completed, {name: value.clone() for name, value in model.state_dict().items()}

    for steps in (5, 9):
        direct, monitored = trained("direct", "direct", steps), trained("monitor", "monitor", steps)
        assert direct[0] == monitored[0] == steps
        assert all(torch.equal(direct[1][name], monitored[1][name]) for name in direct[1])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event for event in events if event["ph"] == "X" and event["tid"] == 4 and event["dur"] > 0], "no writes"
    for name in ("direct", "monitor"):
        found = CheckpointMetadataManager(PosixEnv(), str(tmp_path / name)).inventory().lineage()
        assert [(each.step, each.tag) for each in reversed(found)] == [
            (2, None), (4, None), (5, "best"), (6, None), (8, None)
        ]  # fmt: skip


def test_close_gives_back_every_descriptor_and_ends_a_monitor_that_is_stopped(tmp_path: Path) -> None:
    def trained(name: str, stop: bool) -> int:
        model = torch.nn.Linear(20, 20)
        optimizer = torch.optim.AdamW(model.parameters())
        engine = lwd.attach(
            model, optimizer, dir=str(tmp_path / name), mode="monitor", commit={"timeout_s": 2.0},
            writer={"block_kb": 64},
        )  # fmt: skip
        for _ in engine.steps(3):
            model(torch.randn(2, 20)).square().mean().backward()
            optimizer.step()
        engine.wait(3, timeout=20)
        pid = workings_of(engine).adapter.link.process.pid
        if stop:
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(errors.DeadlineError, match="not committed"):
                engine.wait(4, timeout=0.3)
        engine.close()
        return int(pid)

    trained("warm-up", False)  # what torch opens once
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    for stop in (False, True):
        assert not alive(trained(f"stop-{stop}", stop))
        gc.collect()
        assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("mode", ["2-bf16-clip-monitor", "3-fp32-monitor"])
def test_under_deepspeed_a_killed_rank_changes_no_bit(
    request: pytest.FixtureRequest, tmp_path: Path, long: bool, mode: str
) -> None:
    if not long:
        pytest.skip("full sweep only (--long); test_deepspeed_kill.py draws these modes among others")
    zero: Warm = request.getfixturevalue("zero")
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir(), killed.mkdir()
    zero.run("zero_kill.py", 2, "--plain", "--seed", 1, "--out", plain, mode, timeout=120)
    zero.run("zero_kill.py", 2, "--seed", 1, "--out", killed, mode, timeout=120, max_restarts=1)
    for rank in range(2):
        assert (killed / f"{mode}.{rank}.json").read_text() == (plain / f"{mode}.{rank}.json").read_text()
        starts = [line for line in (killed / f"{mode}.{rank}.log").read_text().splitlines() if "start" in line]
        assert len(starts) == 2 and starts[0] == "start 0" != starts[1]


def test_a_forked_child_of_the_trainer_does_not_keep_its_monitor_alive(warm: Warm, tmp_path: Path) -> None:
    """As a worker of a data loader, which may live for seconds longer."""
    job = warm.start("monitored.py", 1, "plain", tmp_path / "ckpt", tmp_path, "--total", 3, "--end", "fork")
    (child,) = await_that(lambda: values(tmp_path, "child", 1), job.output)
    os.kill(values(tmp_path, "pid", 1)[0], signal.SIGKILL)
    try:
        all_end(tmp_path, 1, 10)
        assert alive(child)
    finally:
        os.kill(child, signal.SIGKILL)
