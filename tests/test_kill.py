# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, one rank or all: one committed step on all ranks, and from there the very same run."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.drawing import drawn
from kit.kill import DEADLINE, KEEP, check, check_folder, kill_rank, launches, read, reference
from kit.runners import Running, Warm, WarmJob, torchrun_command

ALL = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("ddp", 3), ("fsdp2", 3)]
TOTAL = 20


def manifests(out: Path) -> set[Path]:
    return set((out / "ckpt").glob("step_*/manifest.json"))


@pytest.mark.timeout(3600)
def test_a_job_killed_at_any_moment_goes_on_from_one_committed_step(warm: Warm, tmp_path: Path, long: bool) -> None:
    seed = drawn(range(1 << 32), __name__)
    print(f"seed {seed}")
    dice = random.Random(seed)
    worlds = ALL if long else [ALL[0], *dice.choice([ALL[1:3], ALL[3:]])]
    known = {(w, n): reference(warm, tmp_path / f"reference-{w}-{n}", w, n, TOTAL) for w, n in worlds}
    kills = resumed = number = 0
    trials = 200 if long else 3
    # Half of the kills wait for a commit, and all if most came before the first one: the test would not have tested yet
    # what it says.
    while number < trials or (resumed < kills / 4 and number < 3 * trials):
        wrapper, ranks = worlds[number % len(worlds)]
        losses, finals, took = known[wrapper, ranks]
        out = tmp_path / f"trial-{number}"
        out.mkdir()
        planned = dice.choice([1, 1, 1, 2])
        done = 0
        for launch in range(planned + 1):
            arguments = ("kill.py", ranks, wrapper, out / "ckpt", out, "--total", TOTAL, "--keep", KEEP)
            before = manifests(out)
            job = warm.start(*arguments, env={"LAUNCH": str(launch)})
            if launch == planned:
                finished = job.wait(DEADLINE)
                assert finished.returncode == 0, f"seed {seed}, trial {number}: {finished.output[-6000:]}"
                break
            if dice.random() < 0.5 or number >= trials:
                deadline = time.monotonic() + DEADLINE
                while manifests(out) <= before and job.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(dice.uniform(0.0, 0.3) * took)
            else:
                time.sleep(dice.uniform(0.1, 1.0) * took)
            if dice.random() < 0.5 and kill_rank(out, dice.randrange(ranks), job.pids()):
                # The agent ends the others, with SIGTERM and 30 s later SIGKILL; if it takes longer, all are killed.
                job.ends_within(40)
            else:
                job.kill()
            done += 1
        kills += done
        try:
            resumed += check(out, ranks, losses, finals, TOTAL)
            check_folder(out / "ckpt", range(ranks), TOTAL)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, trial {number} ({wrapper}, {ranks} ranks): {error}") from error
        number += 1
    print(f"{kills} kills, {resumed} resumes from a step above 0")
    assert resumed >= kills / 4, "most kills came before the first commit, however often it was tried"


@pytest.mark.parametrize(("wrapper", "ranks"), [("ddp", 2), ("fsdp2", 2)])
def test_torchrun_restarts_a_killed_rank_and_later_the_whole_killed_job(
    warm: Warm, start: Callable[..., Running], tmp_path: Path, long: bool, wrapper: str, ranks: int
) -> None:
    """One rank dies, --max-restarts brings all back; then everything dies. By --long under torchrun's command, else by
    its agent alone: test_selftest.py and test_deepspeed_kill.py have the command.
    """
    if wrapper == "ddp" and not long:
        pytest.skip("--long")
    losses, finals, _ = reference(warm, tmp_path / "reference", wrapper, ranks, TOTAL)
    out = tmp_path / "trial"
    out.mkdir()
    arguments = ("kill.py", ranks, wrapper, out / "ckpt", out, "--total", TOTAL, "--keep", KEEP)

    def wait_for(what: Callable[[list[dict[str, Any]]], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not what(read(out, ranks)[0]):
            assert job.poll() is None and time.monotonic() < deadline, job.output()[-6000:]
            time.sleep(0.01)

    job: Running | WarmJob = (
        start(torchrun_command(*arguments, max_restarts=1), env={"LAUNCH": "0"})
        if long
        else warm.start(*arguments, max_restarts=1, env={"LAUNCH": "0"})
    )
    wait_for(lambda lines: any(line.get("step", 0) >= 5 for line in lines))
    assert kill_rank(out, ranks - 1, job.pids())
    wait_for(lambda lines: len([line for line in lines if "start" in line]) == 2)
    first, second = ([line["start"] for line in lines if "start" in line] for lines in read(out, ranks))
    job.kill()
    warm.run(*arguments, env={"LAUNCH": "1"}, timeout=DEADLINE)
    told = read(out, ranks)
    assert [lines[-1]["hash"] for lines in told] == finals
    for rank, lines in enumerate(told):
        assert all(line["loss"] == losses[rank][line["step"]] for line in lines if "step" in line)
        begun = [line["start"] for line in lines if "start" in line]
        assert begun[0] == 0 and 3 <= begun[1] <= begun[-1]
    # The last launch's start is the same on all ranks; so is the restart's, unless the kill came before a rank said it.
    assert len({[line["start"] for line in lines if "start" in line][-1] for lines in told}) == 1
    assert len(first) < 2 or len(second) < 2 or first[1] == second[1]
    check_folder(out / "ckpt", range(ranks), TOTAL)


@pytest.mark.parametrize(("wrapper", "ranks"), [("plain", 1), ("ddp", 2)])
def test_after_a_roll_back_and_a_crash_the_new_branch_is_restored(
    warm: Warm, tmp_path: Path, wrapper: str, ranks: int
) -> None:
    run = ("kill.py", ranks, wrapper, tmp_path / "ckpt", tmp_path, "--keep", 20)
    warm.run(*run, "--total", 10, timeout=DEADLINE)
    # Back to 5 with another learning rate, so that the branches cannot be taken for one another; SIGKILL in step index
    # 7.
    crashed = warm.run(*run, "--total", 10, "--restore", 5, "--lr", 0.5, "--die-at", 7, timeout=DEADLINE, check=False)
    assert crashed.returncode != 0
    warm.run(*run, "--total", 9, timeout=DEADLINE)
    for lines in read(tmp_path, ranks):
        first, branch, after = launches(lines)
        assert branch[1]["start"] == 5 and branch[1]["hash"] == next(
            line["hash"] for line in first if line.get("step") == 4
        )
        assert branch[-1].get("step", 7) == 7
        assert after[1]["start"] == 7, (
            "the newest commit of the branch, which had been reported, and not the abandoned step 10"
        )
        assert after[1]["hash"] == next(line["hash"] for line in branch if line.get("step") == 6)
        assert after[1]["hash"] != next(line["hash"] for line in first if line.get("step") == 6)


def test_a_crash_right_after_a_roll_back_keeps_the_roll_back(warm: Warm, tmp_path: Path) -> None:
    run = ("kill.py", 1, "plain", tmp_path / "ckpt", tmp_path, "--keep", 20)
    warm.run(*run, "--total", 6, timeout=DEADLINE)
    warm.run(*run, "--total", 3, "--restore", 3, timeout=DEADLINE)  # restores, steps nothing, ends
    warm.run(*run, "--total", 4, timeout=DEADLINE)
    assert [line["start"] for line in read(tmp_path, 1)[0] if "start" in line] == [0, 3, 3]


def test_a_stopped_rank_0_gives_errors_within_the_deadline_and_no_hang(warm: Warm, tmp_path: Path) -> None:
    timeout = 2.0
    job = warm.start("stopped.py", 2, tmp_path / "ckpt", tmp_path, timeout)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "result.json").exists():
            assert time.monotonic() < deadline and job.poll() is None, job.output()[-6000:]
            time.sleep(0.05)
        result = json.loads((tmp_path / "result.json").read_text())
    finally:
        job.kill()
    assert set(result) == {"the grant horizon", "wait()", "close()"}
    for where, (kind, message, seconds) in result.items():
        assert kind in ("DeadlineError", "CommitError"), f"{where}: {kind}: {message}"
        assert "rank 0" in message or "not committed" in message, f"{where}: {message}"
        assert seconds < 3 * timeout + 5, f"{where} took {seconds} s"
