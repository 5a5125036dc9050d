# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/loops.md run as they stand, and go on where the run before ended."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import pytest
from kit.runners import Finished, Warm

TITAN = Path(__file__).parent.parent / "examples" / "torchtitan_way.py"
sys.path.insert(0, str(Path(__file__).parent / "jobs"))
from loops import blocks  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "loops.md"


def sections() -> list[str]:
    return re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("which", ["Your own loop", "DistributedDataParallel", "FSDP2"])
def test_a_loop_of_ones_own_goes_on(warm: Warm, tmp_path: Path, which: str) -> None:
    ranks = 1 if which == "Your own loop" else 2
    warm.run("loops.py", ranks, tmp_path, which, timeout=60)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)] == [[3, 3, 5]] * ranks


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeeds_goes_on(zero: Warm, tmp_path: Path) -> None:
    zero.run("loops.py", 2, tmp_path, "DeepSpeed", timeout=150)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[3, 3, 5]] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_torchtitans_way_goes_on_as_if_it_had_not_been_killed(warm: Warm, tmp_path: Path, ranks: int) -> None:
    def run(name: str) -> Finished:
        return warm.run(TITAN, agent, "--dir", tmp_path / name, "--steps", "40", timeout=60)

    agent = 0 if ranks == 1 else ranks
    whole = run("whole").lines("step ")
    assert len(whole) == 40
    job, deadline = warm.start(TITAN, agent, "--dir", tmp_path / "cut", "--steps", "40"), time.monotonic() + 60
    while not any(tmp_path.glob("cut/step_00000000[1-3]?-*/manifest.json")):
        assert job.poll() is None and time.monotonic() < deadline, job.output()[-3000:]
        time.sleep(0.001)
    job.kill()
    resumed = run("cut")
    (first,) = map(int, resumed.lines("training starts at step "))
    assert 11 <= first <= 41 and resumed.lines("step ") == whole[first - 1 :]


@pytest.mark.quick
def test_every_section_is_run_by_a_test() -> None:
    elsewhere = {"Hugging Face's Trainer", "Accelerate", "Lightning"}  # in the tests of each
    assert {*blocks()} - elsewhere == {"Your own loop", "DistributedDataParallel", "FSDP2", "DeepSpeed"}
    assert {*sections()} - {*blocks()} == {"torchtitan"}
