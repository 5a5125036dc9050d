# SPDX-License-Identifier: Apache-2.0
"""Many commits in a row, and nothing of the system is held longer than needed; a job in a storm; trials of the soak."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import soak, trial_run, trial_truth
from kit.matrix import RANKS, Layout
from kit.runners import Running, Warm
from kit.trial_plan import ENDS, GOES_ON, MAY_END, TOTAL, UPDATES, Fault, Launch, Plan, draw
from kit.trial_run import Starter
from kit.trial_truth import Course, Told, Truth, Truths, check, check_read


def test_a_thousand_commits_in_a_row_leak_nothing(warm: Warm, tmp_path: Path, long: bool) -> None:
    commits, ranks = (1000, 8) if long else (120, 4)
    shm = set(os.listdir("/dev/shm"))
    warm.run("soak.py", ranks, tmp_path / "ckpt", tmp_path, commits, timeout=600 if long else 150)
    assert set(os.listdir("/dev/shm")) - shm == set()
    for rank in range(ranks):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        seen, where = told["seen"], f"rank {rank}: {told['seen']}"
        assert told["committed"] == commits
        early, late, before, after = seen["4"], seen["10"], seen["before"], seen["after"]
        for what, slack in {"files": 0, "threads": 3, "shared": 0}.items():  # the kernel's io_uring threads come and go
            assert late[what] <= early[what] + slack, f"{what}: {where}"
            assert after[what] <= before[what] + slack, f"{what}: {where}"
        assert late["objects"] - early["objects"] < 300, where
        assert late["bytes"] - early["bytes"] < 2 << 20, where
    names = os.listdir(tmp_path / "ckpt")
    assert sorted(name for name in names if not name.startswith("step_")) == ["identity.json", "owner"]
    assert len(names) == 2 + 2, "the checkpoints that are kept, and no others"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"hash": "other"}, r"launch 00002, rank 0, .*not as plain training at \[7\]"),
        ({"start": 3}, r"launch 00002: ranks started from \{3, 6\}"),
        ({"start": 3, "other": 3}, r"launch 00002 from \{3\}, and 5 was committed"),
    ],
)
def test_what_is_wrong_after_a_storm_is_found(tmp_path: Path, change: dict[str, Any], says: str | None) -> None:
    plain = [[{"step": step, "hash": f"{rank} {step}"} for step in range(9)] for rank in range(2)]
    for launch, begin in ((1, 0), (2, 6)):
        for rank in range(2):
            lines = [{"launched": "0", "pid": 1}, {"start": begin}]
            lines += [{**line, "committed": line["step"] - 1 or None} for line in plain[rank][begin : begin + 7]]
            if launch == 2:
                lines[1]["start"] = change.get("other", begin) if rank else change.get("start", begin)
                lines[3]["hash"] = lines[3]["hash"] if rank else change.get("hash", lines[3]["hash"])
            folder = tmp_path / f"{launch:05d}"
            folder.mkdir(exist_ok=True)
            (folder / f"{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if says is None:
        assert soak.check(tmp_path, plain) == {"launches": 2, "resumed": 1, "steps": 20, "newest": 7}
        return
    with pytest.raises(AssertionError, match=says):
        soak.check(tmp_path, plain)


def own_mounts() -> list[str]:
    """What runs a command where its mounts are its own, and end with it; nothing where that is not allowed."""
    for command in (["unshare", "-m"], ["unshare", "-Urm"]):
        if shutil.which("unshare") and not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return []


def test_a_job_in_a_storm_goes_on_bit_for_bit_and_nothing_ends_or_hangs_by_itself(
    start: Callable[..., Running], tmp_path: Path, soak_minutes: float
) -> None:
    """With `--soak-minutes`; by itself, and with `--long`, as conftest.py says."""
    command = [sys.executable, soak.__file__, str(tmp_path / "soak"), "--minutes", str(soak_minutes)]
    done = start([*own_mounts(), *command]).wait(60 * soak_minutes * 2 + 170)
    assert done.returncode == 0, done.output[-30000:]
    found = json.loads(done.output.splitlines()[-1])
    print(found)
    assert found["launches"] > 1 and found["resumed"] >= 1 and found["watcher"]["looks"] > 0
    if not found["disk"]:
        pytest.skip("no mounts are allowed here, so that the disk never filled; the rest held")
    assert found["filled"] > 0


# -- trials of tests/soak.py ------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_trials_and_all_kinds_of_them_come() -> None:
    plans = [draw(7, number) for number in range(400)]
    assert plans == [draw(7, number) for number in range(400)] and plans[:9] != [draw(8, number) for number in range(9)]
    assert {fault.kind for plan in plans for each in plan.launches for fault in each.faults} == {
        *ENDS, *MAY_END, *GOES_ON
    }  # fmt: skip
    layouts = {each.layout for plan in plans for each in plan.launches}
    assert layouts == {Layout(wrapper, ranks) for wrapper in UPDATES for ranks in RANKS[wrapper] if ranks < 4}
    assert {plan.config["mode"] for plan in plans} == {"direct", "monitor"}
    assert sum(len({each.layout for each in plan.launches}) == 2 for plan in plans) > 100
    assert all(plan.total <= TOTAL and len({each.layout for each in plan.launches}) <= 2 for plan in plans)
    assert not any(fault.kind in (*ENDS, *MAY_END) for plan in plans for fault in plan.launches[-1].faults)


def line(step: int, of: str, **more: Any) -> dict[str, Any]:
    return {"step": step, "hash": f"{of} {step}", "buffers": f"{of} {step}", **more}


class Known(Truths):
    """What plain training would have told, by heart."""

    def __init__(self) -> None:
        pass

    def of(self, course: Course) -> Truth:
        name = f"{course.layout} of {course.origin} {course.since}"
        digests = {step: line(step, name) for step in range(course.since, 10)}
        return Truth(
            [digests] * course.layout.ranks, {step: {f"param/{n}": name for n in range(9)} for step in digests}
        )


TWO, THREE = Layout("ddp", 2), Layout("ddp", 3)


def lines(layout: Layout, of: str, start: int, end: int, committed: int) -> Told:
    begin = {key: value for key, value in line(start, of).items() if key != "step"}
    told = [{"start": start, **begin}, *(line(step, of, committed=committed) for step in range(start + 1, end + 1))]
    return Told(layout, [[dict(each) for each in told] for _ in range(layout.ranks)])


def two_launches() -> list[Told]:
    return [lines(TWO, "ddp:2 of None 0", 0, 5, 3), lines(THREE, "ddp:3 of ddp:2 3", 3, 8, 7)]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda told: None, None),
        (lambda told: told[0].lines[1][4].update(hash="other"), "launch 0 .ddp:2., rank 1, step 4 .*state differ"),
        (lambda told: told[1].lines[2][0].update(hash="other"), "launch 1 .ddp:3., rank 2, step 3 .*state differ"),
        (lambda told: told[1].lines[0][2].update(buffers="other"), "launch 1 .ddp:3., rank 0, step 5 .*buffers differ"),
        (lambda told: told[1].lines[0][0].update(start=4), r"launch 1: ranks started from \[3, 4\]"),
        (lambda told: told[0].lines[0][4].update(committed=4), "launch 1 started from 3, and 4 had been reported"),
    ],
)
def test_what_a_trial_must_not_tell_is_found(spoil: Callable[[list[Told]], None], says: str | None) -> None:
    told = two_launches()
    spoil(told)
    if says is None:
        assert check(told, Known()) == 2 * 6 + 3 * 6
        return
    with pytest.raises(AssertionError, match=says):
        check(told, Known())


@pytest.mark.parametrize(("of", "step", "good"), [("ddp:2 of None 0", 2, True), ("other", 2, False), ("x", 11, False)])
def test_what_a_reader_must_not_see_is_found(of: str, step: int, good: bool) -> None:
    told = two_launches()
    check(told, Known())
    seen = [(step, {f"param/{n}": of for n in range(9)})]
    if good:
        assert check_read(seen, told, Known()) == 1
        return
    with pytest.raises(AssertionError, match=f"a reader saw step {step}"):
        check_read(seen, told, Known())


def test_a_trial_that_is_killed_and_goes_on_with_another_number_of_ranks(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**draw(0, 0).config, "mode": "direct", "update": "auto", "every_n_steps": 1}
    monkeypatch.setattr(trial_run, "PAUSE_S", 0.05)  # so that the kill comes before the end
    monkeypatch.setattr(trial_truth, "TOTAL", 5)
    kill = Fault("SIGKILL to a rank", 2, 0)
    plan = Plan(0, 0, 5, config, (Launch(Layout("ddp", 2), (kill,)), Launch(Layout("ddp", 1), ())))
    starter = Starter(warm, lambda: pytest.fail("nothing of it needs DeepSpeed"))
    for folder in ("truth", "ckpt"):
        (tmp_path / folder).mkdir()
    truths = Truths(starter.start, tmp_path / "truth")
    found = trial_run.run(plan, starter, truths, tmp_path / "told", tmp_path / "ckpt", None, threading.Event())
    # Where the kill finds it is up to the machine; all that it told was compared.
    assert found.launches == 2 and found.steps >= 2 * 2 + 1 and found.resumed == found.other_ranks


def test_interrupted_it_ends_in_order_with_its_counts(start: Callable[..., Running], long: bool) -> None:
    if not long:
        pytest.skip("--long: it starts a process that imports torch for itself")
    job = start([sys.executable, str(Path(__file__).with_name("soak.py")), "5", "--seed", "1", "--wrappers", "plain"])
    deadline = time.monotonic() + 120
    while " s  trial 0 of" not in job.output():
        assert job.poll() is None and time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGINT)
    while job.poll() is None:
        assert time.monotonic() < deadline + 60, job.output()
        time.sleep(0.05)
    assert job.poll() == 130 and " trials in " in job.output() and "0 wrong, 0 hung, 0 dead" in job.output()
    assert job.pids() == []
