# SPDX-License-Identifier: Apache-2.0
"""`layerwise rehearse`: scripts that resume exactly pass, and of others the fault is named."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.cli import call
from kit.rehearsals import COMMAND, by
from kit.runners import DEEPSPEED, JOBS, QUICK, Warm
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.cli import rehearsing
from layerwise_dist.rehearsal import plan as plans
from layerwise_dist.rehearsal import script, story, trial
from layerwise_dist.rehearsal.contents import restless
from layerwise_dist.rehearsal.plan import VARIABLE, Plan, told
from layerwise_dist.rehearsal.reasons import Reason
from layerwise_dist.rehearsal.running import RunFailed
from layerwise_dist.rehearsal.trial import Trial, Unfit, Verdict
from layerwise_dist.supervision import processes
from layerwise_dist.supervision.processes import births, fields_of, still, terminable, undisturbed

SCRIPT = JOBS / "rehearsed.py"

# Of each fault: what the verdict is, the first step that differs, what the reason is called, and a word of its text.
FAULTS: dict[str, tuple[str, int, str, str]] = {
    "unsaved_generator": ("differs", 7, "generator-outside", "gen in unsaved_generator(), rehearsed.py"),
    "worker_rng": ("differs", 7, "workers", "persistent workers"),
    "loader_outside": ("differs", 7, "loader-outside", "loader in loader_outside(), rehearsed.py"),
    "time_in_data": ("nondeterministic", 1, "data", "a clock"),
    "average_outside": ("differs", 7, "model-outside", "average in average_outside(), rehearsed.py"),
    "dict_order": ("nondeterministic", 1, "hash-order", "the order of a set"),
    "late_set_epoch": ("differs", 7, "set-epoch", "loader 'loader'"),
    "optimizer_outside": ("differs", 7, "optimizer-outside", "other in optimizer_outside(), rehearsed.py"),
    "write_in_place": ("differs", 7, "write", "3.weight"),
    "unsteady_op": ("nondeterministic", 1, "op", "not deterministic"),
}
OTHERS: dict[str, tuple[str, int, str, str]] = {
    "hidden_state": ("differs", 7, "hidden", "1.running"),
    "half_a_state": ("differs", 7, "generator-outside", "source.gen in half_a_state(), rehearsed.py"),
    "schedule_outside": ("differs", 7, "schedule-outside", "scheduler in schedule_outside(), rehearsed.py"),
    "never_restored": ("differs", 7, "not-resumed", "its first step is 1"),
    "raises_when_resumed": ("differs", 7, "restart", "no way on from here"),
}


def rehearsed(warm: Warm, folder: Path, name: str, **options: Any) -> Verdict:
    """In `folder`, where nothing may be left."""
    said: list[str] = []
    given = {"steps": 9, "kill_at": 6, "timeout_s": 60.0, **options}
    whole = Trial([str(SCRIPT), name, str(folder / "own")], str(folder), say=said.append, start=by(warm), **given)
    try:
        verdict, kept = whole.run()
    finally:
        assert list(folder.iterdir()) == [] and said
    assert kept is None
    return verdict


def check(verdict: Verdict, kind: str, step: int, key: str, word: str) -> None:
    assert verdict.reason is not None, verdict
    assert (verdict.kind, verdict.step, verdict.reason.key) == (kind, step, key), verdict
    assert word in verdict.reason.text, verdict.reason.text


@pytest.mark.parametrize("name", ["unsaved_generator", "average_outside", "unsteady_op"])
def test_a_planted_fault_is_named(warm: Warm, tmp_path: Path, name: str) -> None:
    check(rehearsed(warm, tmp_path, name), *FAULTS[name])


def test_mutation_without_a_look_at_variables_an_average_outside_goes_unseen(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "divergences", lambda *_: [])
    assert rehearsed(warm, tmp_path, "average_outside").kind == "exact"


@pytest.mark.parametrize("name", [*FAULTS, *OTHERS])
def test_every_planted_fault_is_named(warm: Warm, tmp_path: Path, name: str, long: bool) -> None:
    if not long:
        pytest.skip("--long")
    if name == "dict_order":  # what Python hashes by is decided where an interpreter begins
        code, told = command(tmp_path, "--steps", 9, "--kill-at", 6, "--", sys.executable, SCRIPT, name)
        assert code == 4 and told["reason"]["key"] == "hash-order" and told["step"] == 1, told
        return
    check(rehearsed(warm, tmp_path, name), *{**FAULTS, **OTHERS}[name])


def command(folder: Path, *arguments: object, timeout: float = 600.0) -> tuple[int, dict[str, Any]]:
    """The exit code and the answer of the command itself, in `folder`."""
    done = subprocess.run(
        [*COMMAND, "--json", *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **QUICK, **DEEPSPEED}, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_script_that_resumes_exactly_passes_and_its_own_directory_stays_as_it_is(
    warm: Warm, tmp_path: Path, long: bool
) -> None:
    """And nothing is left behind. With --long by the command itself, which starts four interpreters."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine").write_text("stays")
    if long:
        code, told = command(tmp_path, "--steps", 4, "--", sys.executable, SCRIPT, "clean", own)
    else:
        given = [str(SCRIPT), "clean", str(own)]
        options: dict[str, Any] = {"steps": 4, "kill_at": None, "timeout_s": 60.0, "keep": False}
        answer = rehearsing.rehearse(given, str(tmp_path), **options, start=by(warm))
        code, told = answer.code, answer.data
    assert code == 0 and told["verdict"] == "exact" and told["good"], told
    assert told["restored"] == 2 and told["compared"] == 4 + 1 + 2 and told["reason"] is None and told["ranks"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["own"] and [each.name for each in own.iterdir()] == ["mine"]


def test_a_script_that_fails_by_itself_is_told_apart(warm: Warm, tmp_path: Path) -> None:
    for name, word in (
        ("raises", "no training today"), ("does_not_attach", "without an enabled attach"),
    ):  # fmt: skip
        with pytest.raises(RunFailed, match=word):
            rehearsed(warm, tmp_path, name)
    with pytest.raises(Unfit, match="ended on its own after step 12"):
        rehearsed(warm, tmp_path, "clean", steps=20, kill_at=11)


def test_exit_codes_of_wrong_usage_and_of_a_command_that_fails(tmp_path: Path) -> None:
    assert call("rehearse")[0] == 2
    assert call("rehearse", "--dir", tmp_path, "--steps", "4", "--kill-at", "3", "--", "true")[0] == 2
    code, said = call("rehearse", "--dir", tmp_path, "--", str(tmp_path / "none"))
    assert code == 2 and "none" in said
    assert call("rehearse", "--dir", tmp_path / "none", "--", "true")[0] == 2
    code, said = call("rehearse", "--dir", tmp_path, "--", "sh", "-c", "echo what is wrong; exit 7")
    assert code == 3 and "exit code 7" in said and "what is wrong" in said
    assert call("rehearse", "--dir", tmp_path, "--", "true")[0] == 3
    code, said = call("rehearse", "--dir", tmp_path, "--timeout", "1", "--", "sleep", "600")
    assert code == 3 and "had not finished after 1 s, before the first step" in said
    assert list(tmp_path.iterdir()) == []


def test_what_a_failed_run_left_is_kept_on_request_and_its_last_words_are_told(tmp_path: Path) -> None:
    talks = "for n in $(seq 200); do echo line $n of a long, long, long, long, long, long, long traceback; done"
    given = ("rehearse", "--dir", tmp_path, "--keep", "--json", "--", "sh", "-c", f"{talks}; echo the error; exit 7")
    code, said = call(*given)
    (kept,) = tmp_path.iterdir()
    found = json.loads(said[said.index("{") :])
    assert code == 3 and found["kept"] == str(kept) and found["error"].endswith("traceback\nthe error")
    assert len(found["error"]) < 4000, "or its end would be cut off where it is shown"
    assert (kept / "first.txt").read_text().startswith("line 1 of")


@pytest.mark.quick
def test_exit_codes_and_words_of_the_verdicts() -> None:
    reason = Reason("generator-outside", "gen in main(), train.py", "name it in attach(state={...})")
    differs = rehearsing.told(Verdict("differs", 4, 1, ["param/w (by 1)"] * 12, reason, 3, 8, 2), "/kept", 1.0)
    assert differs.code == 1 and not differs.good and differs.data["reason"]["key"] == "generator-outside"
    assert differs.parts[:2] == ["the resumed run differs first at step 4, rank 1", "  param/w (by 1)"]
    assert differs.parts[11:] == [
        "  and 2 more (--json)", "likeliest reason: gen in main(), train.py",
        "what to do: name it in attach(state={...})", "kept: /kept",
    ]  # fmt: skip
    unsteady = rehearsing.told(Verdict("nondeterministic", 1, None, [], reason, notes=["seen"]), None, 1.0)
    assert unsteady.code == 4 and unsteady.parts[0] == "two uninterrupted runs differ first at step 1"
    assert unsteady.parts[-1] == "note: seen"
    exact = rehearsing.told(Verdict("exact", restored=3, compared=8, ranks=2), None, 1.0)
    assert exact.code == 0 and exact.good and "after step 3" in exact.parts[0] and "world size 2" in exact.parts[0]


@pytest.mark.quick
def test_a_checkpoint_that_is_damaged_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Trial, folder: Path) -> Verdict:
        raise errors.DamageError("shard 0: block 3 is not what was written")

    monkeypatch.setattr(Trial, "_run", damaged)
    options: dict[str, Any] = {"steps": 4, "kill_at": None, "timeout_s": 60.0, "keep": False}
    answer = rehearsing.rehearse(["true"], str(tmp_path), **options)
    assert answer.code == 3 and "block 3" in answer.data["error"] and list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_a_terminal_that_is_closed_ends_a_command_as_ctrl_c_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), terminable():
            signal.raise_signal(signal.SIGHUP)
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) is signal.SIG_DFL
        with terminable(), undisturbed():  # of nohup
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.quick
def test_a_second_ctrl_c_waits_until_the_cleaning_up_is_over() -> None:
    done = []
    # After `&` a shell lets SIGINT be ignored, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), undisturbed():
            signal.raise_signal(signal.SIGINT)
            done.append(True)
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.quick
def test_a_process_with_the_number_of_one_that_has_ended_is_another() -> None:
    own = births([os.getpid(), 1 << 30])
    assert list(own) == [os.getpid()] and still(own) == [os.getpid()]
    assert still({os.getpid(): "0"}) == []


HELD = """
import ctypes, fcntl, sys, threading, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
threading.Thread(target=time.sleep, args=(60,)).start()
print("held", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit(2) of the first thread alone
"""


def ends(pid: int) -> bool:
    """Whether the first thread of a process is a zombie, in time."""
    deadline = time.monotonic() + 20
    while fields_of(pid)[:1] != ["Z"] and time.monotonic() < deadline:
        time.sleep(0.01)
    return fields_of(pid)[:1] == ["Z"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="exit(2) has another number")
@pytest.mark.parametrize("threads", ["counted", "not counted"])
def test_a_killed_process_has_ended_once_all_its_threads_have_and_not_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    """What it held is free then: a start that follows would be told that its directory has an owner."""
    if threads == "not counted":
        monkeypatch.setattr(processes, "is_over", lambda fields: not fields or fields[0] in "ZX")
    file = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HELD, file], stdout=subprocess.PIPE) as job:
        assert job.stdout is not None and job.stdout.readline() == b"held\n" and ends(job.pid)
        try:
            born = processes.births([job.pid])
            if threads == "not counted":
                assert born == {}, "the mutation must be seen"
                return
            asked = iter([[job.pid], []])  # as a look at environments, which are gone with the first thread
            assert processes.kill_all(lambda: next(asked, [])) == 1
            with open(file, "w") as again:
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            job.kill()


def test_ctrl_c_ends_the_job_and_leaves_no_file(warm: Warm, tmp_path: Path) -> None:
    """Of the job's processes too those that are in a session of their own."""
    pids, own, work, script = (tmp_path / name for name in ("pids", "own", "work", "command.py"))
    work.mkdir()
    script.write_text(
        f"import os\nfrom layerwise_dist.cli import main\nopen({str(own)!r}, 'w').write(f'{{os.getpid()}}')\nmain()\n"
    )
    sleeps = f"setsid sleep 600 & echo $! $$ >{pids}.new; mv {pids}.new {pids}; sleep 600"
    job = warm.start(script, 0, "rehearse", "--dir", work, "--", "sh", "-c", sleeps)
    deadline = time.monotonic() + 60
    while not pids.exists():
        assert time.monotonic() < deadline and job.poll() is None, job.output()
        time.sleep(0.02)
    os.kill(int(own.read_text()), signal.SIGINT)
    assert job.ends_within(30) and job.poll() == 130, job.output()
    assert list(work.iterdir()) == []
    for pid in pids.read_text().split():
        status = Path("/proc", pid, "status")
        assert not status.exists() or "zombie" in status.read_text()


# -- the variable -----------------------------------------------------------------------------------------------------


def attached(tmp_path: Path, **options: Any) -> Any:
    model = nn.Linear(2, 2)
    return lwd.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), dir=str(tmp_path / "own"), **options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"), ("", "not what it writes"), ('{"version": 2}', "version"),
        ('{"version": 1, "more": 1}', "unknown member 'more'"),
        (
            '{"checkpoints": "here", "told": "/t", "every": 1, "stop_at": 2, "kill_after": null, "timeout_s": 1}',
            "absolute",
        ),
        ("[" * (1 << 16) + "]", "longer than"),
    ],
)  # fmt: skip
def test_a_variable_that_was_left_behind_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, said: str
) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(errors.ConfigError, match=VARIABLE) as caught:
        attached(tmp_path)
    assert said in str(caught.value) and "Unset the variable" in str(caught.value)
    assert not (tmp_path / "own").exists()


@pytest.mark.quick
def test_a_plan_behind_a_link_or_that_others_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(checkpoints="/c", told="/t", every=1, stop_at=2, kill_after=None, timeout_s=1.0)
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    path.chmod(0o600)
    monkeypatch.setenv(VARIABLE, str(path))
    assert told() == plan
    path.chmod(0o622)
    with pytest.raises(errors.ConfigError, match="others may write"):
        told()
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "link"))
    with pytest.raises(errors.ConfigError):
        told()
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(errors.ConfigError):
        told()
    monkeypatch.delenv(VARIABLE)
    assert told() is None and plans.redirected("/here") == "/here"


@pytest.mark.quick
def test_a_rehearsal_is_logged_and_saves_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("checkpoints", "told"):
        (tmp_path / name).mkdir()
    plan = Plan(
        checkpoints=str(tmp_path / "checkpoints"), told=str(tmp_path / "told"), every=1, stop_at=5, kill_after=None,
        timeout_s=30.0,
    )  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    path.chmod(0o600)
    monkeypatch.setenv(VARIABLE, str(path))
    telemetry = {"events": str(tmp_path / "of_the_training.jsonl")}
    with attached(tmp_path, telemetry=telemetry) as ckpt:
        assert ckpt.config.dir == plan.place_of(str(tmp_path / "own")) and ckpt.config.keep_last > 1 << 20
    assert f"this is a rehearsal ({VARIABLE})" in caplog.text
    assert not Path(telemetry["events"]).exists(), "events of a training are not mixed with those of a rehearsal"
    assert not (tmp_path / "own").exists() and Path(plan.place_of(str(tmp_path / "own"))).is_dir()


@pytest.mark.quick
def test_a_schedule_that_its_last_epoch_alone_puts_back_is_the_same() -> None:
    """As torchtitan does; a plain one and one of several."""

    def schedule(several: bool) -> Any:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        parts = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)) for _ in range(1 + several)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [50]) if several else parts[0]

    def state(of: Any) -> Any:
        found = script._told(of, script.Known([], [], []))
        assert found is not None and found["kind"] == "schedule"
        return found["hash"]

    for several in (False, True):
        went_on, put_back = schedule(several), schedule(several)
        for _ in range(3):
            went_on.optimizer.step()
            went_on.step()
        assert state(went_on) != state(put_back)
        for mine, theirs in zip(parts_of(went_on), parts_of(put_back), strict=True):
            theirs.last_epoch = mine.last_epoch
        assert state(went_on) == state(put_back) and went_on.state_dict() != put_back.state_dict()


def parts_of(schedule: Any) -> list[Any]:
    return [schedule, *getattr(schedule, "_schedulers", [])]


# -- what the verdict is made from ------------------------------------------------------------------------------------


def rank(**steps: dict[str, Any]) -> story.Rank:
    found = story.Rank()
    for name, seen in steps.items():
        found.take({"t": "passed", "step": int(name[1:]), **seen})
    return found


@pytest.mark.quick
def test_the_first_forward_that_differs_is_the_one_that_is_told_of() -> None:
    same = {"rng": {"torch": "1"}, "in": {"[0]": "2"}, "out": {"": "3"}}
    one = rank(s1={"forwards": [same, same], "weights": {"w": "1"}})
    other = rank(s1={"forwards": [same, {**same, "in": {"[0]": "9"}, "out": {"": "9"}}], "weights": {"w": "1"}})
    found = story.divergence(one, other, 1, 0)
    assert found is not None and (found.forward, found.given, found.gives, found.weights) == (1, ["[0]"], [""], [])
    assert (
        found.stage == 1
        and story.divergence(one, one, 1, 0).stage is None
        and story.divergence(one, other, 2, 0) is None
    )


@pytest.mark.quick
def test_a_generator_that_nothing_seeds_and_nobody_uses_is_no_difference() -> None:
    passes = restless({"boundary.rng['numpy']", "objects['log']['seconds']"})
    assert passes("boundary.rng['numpy']") and passes("objects['log']['seconds']")
    assert passes("boundary.loaders['loader'].start.rng['numpy']") and passes("boundary.loaders['a'].ahead['numpy']")
    assert not passes("boundary.rng['torch']") and not passes("objects['log']['epoch']")
