"""Killed at any moment, one rank or all: one committed step on all ranks, and from there the very same run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, Warm, torchrun_command

WORLDS = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("ddp", 3), ("fsdp2", 3)]
TOTAL, KEEP = 20, 2
DEADLINE = 90.0


def read(out: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """What each rank told; a line that a kill cut short is left out."""
    told = []
    for rank in range(ranks):
        path = out / f"{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        told.append([json.loads(line) for line in text.split("\n")[:-1]])
    return told


def launches(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One rank's lines, launch by launch."""
    parts: list[list[dict[str, Any]]] = []
    for line in lines:
        if "launched" in line:
            parts.append([])
        parts[-1].append(line)
    return parts


def reference(warm: Warm, folder: Path, wrapper: str, ranks: int) -> tuple[list[dict[int, str]], list[str], float]:
    """Losses by step and the final hash of each rank of a run that nobody killed, and the seconds it took."""
    folder.mkdir()
    began = time.monotonic()
    warm.run("kill.py", ranks, wrapper, folder / "ckpt", folder, "--total", TOTAL, "--keep", KEEP, timeout=DEADLINE)
    took = time.monotonic() - began
    told = read(folder, ranks)
    return (
        [{line["step"]: line["loss"] for line in lines if "step" in line} for lines in told],
        [lines[-1]["hash"] for lines in told],
        took,
    )


def check(out: Path, ranks: int, losses: list[dict[int, str]], finals: list[str]) -> int:
    """What must be true of a job that was killed and at last ended. Returns how many restarts resumed."""
    told = read(out, ranks)
    assert [lines[-1].get("end") for lines in told] == [TOTAL] * ranks
    assert [lines[-1]["hash"] for lines in told] == finals
    for rank, lines in enumerate(told):
        wrong = [line for line in lines if "step" in line and line["loss"] != losses[rank][line["step"]]]
        assert not wrong, f"rank {rank}: losses differ: {wrong}"
    # A rank that was killed before it could say `launched` has one launch fewer: launches are matched by their number.
    starts: dict[str, set[int]] = {}
    seen: dict[str, int] = {}
    order: list[str] = []
    for lines in told:
        for part in launches(lines):
            number = part[0]["launched"]
            order.append(number)
            starts.setdefault(number, set()).update(line["start"] for line in part if "start" in line)
            known = [line["committed"] for line in part if line.get("committed") is not None]
            seen[number] = max([seen.get(number, 0), *known])
    assert all(len(found) <= 1 for found in starts.values()), f"ranks started from different steps: {starts}"
    newest = resumed = 0
    for number in sorted(set(order), key=lambda text: [int(part) for part in text.split(".")]):
        for step in starts[number]:
            assert step >= newest, (
                f"launch {number} started from step {step}, but {newest} had been reported as committed"
            )
            resumed += step > 0
        newest = max(newest, seen[number])
    check_folder(out / "ckpt", ranks, KEEP)
    return resumed


def check_folder(root: Path, ranks: int, keep: int) -> None:
    """Exactly the committed checkpoints that are kept, and nothing of dead attempts."""
    names = sorted(path.name for path in root.iterdir())
    folders = [name for name in names if name.startswith("step_")]
    assert [name for name in names if name not in folders] == ["identity.json", "owner"]
    assert [int(re.match(r"step_(\d+)-", name)[1]) for name in folders] == list(range(TOTAL - keep + 1, TOTAL + 1))
    wanted = sorted(["manifest.json", *(f"rank_{rank:05d}.safetensors" for rank in range(ranks))])
    assert all(sorted(os.listdir(root / name)) == wanted for name in folders)


def kill_rank(out: Path, rank: int, alive: list[int]) -> bool:
    """SIGKILL to one rank, found by what it told; False when it is not there."""
    path = out / f"{rank}.jsonl"
    if not path.exists():
        return False
    pids = [json.loads(line)["pid"] for line in path.read_text().split("\n")[:-1] if '"pid"' in line]
    if not pids or pids[-1] not in alive:
        return False
    os.kill(pids[-1], signal.SIGKILL)
    return True


@pytest.mark.timeout(3600)
def test_a_job_killed_at_any_moment_goes_on_from_one_committed_step(warm: Warm, tmp_path: Path, long: bool) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    known = {(w, n): reference(warm, tmp_path / f"reference-{w}-{n}", w, n) for w, n in WORLDS}
    kills = resumed = 0
    for number in range(200 if long else 20):
        wrapper, ranks = WORLDS[number % len(WORLDS)]
        losses, finals, took = known[wrapper, ranks]
        out = tmp_path / f"trial-{number}"
        out.mkdir()
        planned = dice.choice([1, 1, 1, 2])
        done = 0
        for launch in range(planned + 1):
            arguments = ("kill.py", ranks, wrapper, out / "ckpt", out, "--total", TOTAL, "--keep", KEEP)
            job = warm.start(*arguments, env={"LAUNCH": str(launch)})
            if launch == planned:
                finished = job.wait(DEADLINE)
                assert finished.returncode == 0, f"seed {seed}, trial {number}: {finished.output[-6000:]}"
                break
            time.sleep(dice.uniform(0.1, 1.0) * took)
            if dice.random() < 0.5 and kill_rank(out, dice.randrange(ranks), job.pids()):
                # The agent ends the others, with SIGTERM and 30 s later SIGKILL; if it takes longer, all are killed.
                job.ends_within(40)
            else:
                job.kill()
            done += 1
        kills += done
        try:
            resumed += check(out, ranks, losses, finals)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, trial {number} ({wrapper}, {ranks} ranks): {error}") from error
    print(f"{kills} kills, {resumed} resumes from a step above 0")
    assert resumed >= kills / 4, "most kills came before the first commit: the test does not test what it says"


@pytest.mark.parametrize(("wrapper", "ranks"), [("ddp", 2), ("fsdp2", 2)])
def test_torchrun_restarts_a_killed_rank_and_later_the_whole_killed_job(
    warm: Warm, start: Callable[..., Running], tmp_path: Path, wrapper: str, ranks: int
) -> None:
    """The command line itself: one rank dies, --max-restarts brings all back; then everything dies."""
    losses, finals, _ = reference(warm, tmp_path / "reference", wrapper, ranks)
    out = tmp_path / "trial"
    out.mkdir()
    command = torchrun_command(
        "kill.py", ranks, wrapper, out / "ckpt", out, "--total", TOTAL, "--keep", KEEP, max_restarts=1
    )

    def wait_for(what: Callable[[list[dict[str, Any]]], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not what(read(out, ranks)[0]):
            assert job.poll() is None and time.monotonic() < deadline, job.output()[-6000:]
            time.sleep(0.01)

    job = start(command, env={"LAUNCH": "0"})
    wait_for(lambda lines: any(line.get("step", 0) >= 5 for line in lines))
    assert kill_rank(out, ranks - 1, job.pids())
    wait_for(lambda lines: len([line for line in lines if "start" in line]) == 2)
    first, second = ([line["start"] for line in lines if "start" in line] for lines in read(out, ranks))
    job.kill()
    finished = start(command, env={"LAUNCH": "1"}).wait(DEADLINE)
    assert finished.returncode == 0, finished.output[-6000:]
    told = read(out, ranks)
    assert [lines[-1]["hash"] for lines in told] == finals
    for rank, lines in enumerate(told):
        assert all(line["loss"] == losses[rank][line["step"]] for line in lines if "step" in line)
        begun = [line["start"] for line in lines if "start" in line]
        assert begun[0] == 0 and 3 <= begun[1] <= begun[-1]
    # The last launch's start is the same on all ranks; so is the restart's, unless the kill came before a rank said it.
    assert len({[line["start"] for line in lines if "start" in line][-1] for lines in told}) == 1
    assert len(first) < 2 or len(second) < 2 or first[1] == second[1]
    check_folder(out / "ckpt", ranks, KEEP)


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
