# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, and go on after a kill as if there had been none."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.runners import Warm

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def fast(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts scripts out of a process that has imported torch, and scikit-learn where it is installed."""
    modules = ["sklearn.datasets"] if importlib.util.find_spec("sklearn") else []
    server = Warm(tmp_path_factory.mktemp("warm"), *modules, out_of=warm)
    yield server
    server.close()


def run(fast: Warm, folder: Path, script: Path, *args: str, timeout: float = 100) -> str:
    """All that it prints."""
    return fast.run(script, 0, *args, folder=folder, timeout=timeout, whole_exit=True).output


def kill(fast: Warm, folder: Path, script: Path, *args: str, once: str, timeout: float = 100) -> str:
    """SIGKILL as soon as there is a file that matches `once`. What it had printed by then."""
    job = fast.start(script, 0, *args, folder=folder)
    deadline = time.monotonic() + timeout
    try:
        while not any(folder.glob(once)):
            assert job.poll() is None and time.monotonic() < deadline, f"no {once}, exit code {job.poll()}"
            time.sleep(0.001)
    finally:
        job.kill()
    return job.output()


def test_the_cnn_goes_on_within_an_epoch_and_ends_as_if_it_had_not_been_killed(fast: Warm, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")
    script = EXAMPLES / "digits_cnn.py"
    whole = run(fast, tmp_path, script, "--dir", "whole")
    accuracy = re.search(r"test accuracy (\S+)", whole)
    assert accuracy and float(accuracy[1]) > 0.8 and whole.count("epoch") == 3
    kill(fast, tmp_path, script, "--dir", "cut", once="cut/step_00000000[2-4]?-*/manifest.json")
    resumed = run(fast, tmp_path, script, "--dir", "cut")
    first = re.search(r"starting after step (\d+)", resumed)
    assert first and 20 <= int(first[1]) < 94
    losses = {line for line in whole.splitlines() if line.startswith("step")}
    assert {line for line in resumed.splitlines() if line.startswith("step")} < losses
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    again = run(fast, tmp_path, script, "--dir", "cut")
    assert again.splitlines()[-1] == whole.splitlines()[-1] and "step  " not in again


def test_the_cnn_trains_one_replica_a_rank_under_torchrun(fast: Warm, tmp_path: Path) -> None:
    """As its docstring says; rank 0 alone evaluates."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")
    told = fast.run(EXAMPLES / "digits_cnn.py", 2, "--dir", tmp_path / "ddp", "--epochs", "1", timeout=100).output
    assert re.search(r"^epoch 1: \d\d.\d% of the test images are right$", told, re.M) and "committed: step 24" in told


@pytest.mark.parametrize("package", ["accelerate", "lightning"])
def test_the_loops_of_accelerate_and_lightning_go_on_within_an_epoch(
    fast: Warm, tmp_path: Path, package: str, long: bool
) -> None:
    for needed in ("sklearn", package):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    if not long:
        pytest.skip("--long")
    script = EXAMPLES / f"digits_{package}.py"
    kill(fast, tmp_path, script, "--dir", "cut", once="cut/step_00000000[2-4]?-*/manifest.json")
    resumed = run(fast, tmp_path, script, "--dir", "cut")
    told = re.findall(r"^step +(\d+)", resumed, re.MULTILINE)
    assert told and 20 < int(told[0]) <= 60 and "committed: step 94" in resumed
    whole = run(fast, tmp_path, script, "--dir", "whole")
    assert {each for each in resumed.splitlines() if each.startswith("step")} < set(whole.splitlines())
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    under = fast.run(script, 2, "--dir", tmp_path / "ddp", "--epochs", "1", timeout=100).output
    assert "of the test images are right" in under and "committed: step 24" in under


def test_the_smallest_script_goes_on_where_it_was_killed(fast: Warm, tmp_path: Path) -> None:
    first = kill(fast, tmp_path, EXAMPLES / "mnist_mlp.py", once="checkpoints/mnist_mlp/step_*/manifest.json")
    assert first.splitlines()[:1] in ([], ["nothing is saved yet: training begins"]), "nothing that looks like an error"
    told = run(fast, tmp_path, EXAMPLES / "mnist_mlp.py")
    done = re.search(r"^going on after step (\d+)$", told, re.MULTILINE)
    assert done and 0 < int(done[1]) < 200 and "step 200" in told


def test_frozen_weights_are_written_once_and_again_when_the_adapters_are_merged(fast: Warm, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")
    script = EXAMPLES / "lora.py"
    whole = run(fast, tmp_path, script, "--dir", "whole", "--steps", "50")
    assert "written 2 time(s)" in whole and re.search(r"step 51; accuracy (\S+)", whole)
    kill(fast, tmp_path, script, "--dir", "cut", "--steps", "50", once="cut/step_00000000[1-3]?-*/manifest.json")
    resumed = run(fast, tmp_path, script, "--dir", "cut", "--steps", "50")
    first = re.search(r"starting after step (\d+)", resumed)
    assert first and 10 <= int(first[1]) < 50
    assert "written 1 time(s)" in resumed  # the merged ones
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]


def test_every_example_has_a_line_in_the_readme() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for path in [*EXAMPLES.glob("*.py"), EXAMPLES / "deepspeed" / "train.py"]:
        if path.name != "gpt_model.py":
            assert f"[{path.relative_to(EXAMPLES)}]" in text, path
