# SPDX-License-Identifier: Apache-2.0
"""`layerwise selftest`: it passes where all is well, and each of its checks can fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit.forked import fork_from
from kit.runners import Warm
from typer.testing import CliRunner

from layerwise_dist.cli.app import app
from layerwise_dist.selftest import trial
from layerwise_dist.selftest.trial import STEPS, Run, Trial, compare

COMMAND = [sys.executable, "-P", "-c", "from layerwise_dist.cli import main; main()", "selftest"]


def test_it_kills_resumes_compares_and_leaves_nothing(
    warm: Warm, tmp_path: Path, traps: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """And runs nothing of what lies in the working directory. Without --long the job that goes on is forked from a
    process that has imported torch, and the first one alone is started as users have it.
    """
    if long:
        done = subprocess.run(
            [*COMMAND, str(tmp_path), "--json"], cwd=traps, capture_output=True, text=True, timeout=150, check=False
        )
        code, out, said = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.chdir(traps)
        cold = trial.running
        forked = fork_from(warm, monkeypatch, [trial])
        from_warm, started = trial.running, []

        @contextmanager
        def running(*args: Any) -> Iterator[Any]:
            started.append(cold if not started else from_warm)
            with started[-1](*args) as job:
                yield job

        monkeypatch.setattr(trial, "running", running)
        result = CliRunner().invoke(app, ["selftest", str(tmp_path), "--json"])
        assert (len(started), len(forked)) == (2, 1)
        code, out, said = result.exit_code, result.stdout, result.stderr
    assert not (traps / "sprung").exists()
    assert code == 0, out + said
    told = json.loads(out)
    assert told["good"] and [check["good"] for check in told["checks"]] == [True] * 4
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    job = subprocess.Popen([*COMMAND, str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) != 0
    finally:
        job.kill()
        job.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_watchdog_starts_keeps_nothing_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[threading.Timer] = []
    real = threading.Timer.start

    def interrupted(timer: threading.Timer) -> None:
        real(timer)
        begun.append(timer)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trial(str(tmp_path), say=lambda text: None).run()
    (timer,) = begun
    timer.join(10)
    assert timer.finished.is_set() and not timer.is_alive() and list(tmp_path.iterdir()) == []


def test_each_check_can_fail(tmp_path: Path) -> None:
    losses = {step: float(step).hex() for step in range(1, STEPS + 1)}
    plain = Run(0, losses, 0, ["a", "b"])
    killed = Run(0, {step: losses[step] for step in range(1, 8)}, 6, [])
    resumed = Run(6, {step: losses[step] for step in range(7, STEPS + 1)}, STEPS, ["a", "b"])

    def verdicts(killed: Run = killed, resumed: Run = resumed) -> list[bool]:
        return [check.good for check in compare(plain, killed, resumed)]

    assert verdicts() == [True] * 4
    assert verdicts(killed=replace(killed, losses={**killed.losses, 3: "0x1p+9"})) == [False, True, True, True]
    assert verdicts(resumed=replace(resumed, start=5)) == [True, False, True, True]
    assert verdicts(killed=replace(killed, committed=0)) == [True, False, True, True]
    assert verdicts(resumed=replace(resumed, losses={**resumed.losses, 9: "0x1p+9"})) == [True, True, False, True]
    assert verdicts(resumed=replace(resumed, left=["a", "c"])) == [True, True, True, False]


def test_a_directory_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["selftest", str(tmp_path / "none")])
    assert result.exit_code == 2


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_repeats_the_step(tmp_path: Path, seed: int) -> None:
    one, two = (Trial(str(tmp_path), say=lambda text: None, seed=seed).kill_at for _ in range(2))
    assert one == two
