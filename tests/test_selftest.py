# SPDX-License-Identifier: Apache-2.0
"""`layerwise selftest`: it passes where all is well, and each of its checks can fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerwise_dist.cli.app import app
from layerwise_dist.selftest.trial import STEPS, Run, Trial, compare

COMMAND = [sys.executable, "-P", "-c", "from layerwise_dist.cli import main; main()", "selftest"]


def test_it_kills_resumes_compares_and_leaves_nothing(tmp_path: Path, traps: Path) -> None:
    """And runs nothing of what lies in the working directory."""
    done = subprocess.run(
        [*COMMAND, str(tmp_path), "--json"], cwd=traps, capture_output=True, text=True, timeout=150, check=False
    )
    assert not (traps / "sprung").exists()
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
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
