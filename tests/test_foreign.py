"""`tests/foreign/deepspeed.py` tells right from wrong: shown on a small tree of tests of its own kind."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.runners import DEEPSPEED, Running

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed (launch/setup.sh does it)", allow_module_level=True)

SCRIPT = Path(__file__).parent / "foreign" / "deepspeed.py"
COMMON = """
class DistributedExec:
    def _dist_run(self, local_rank, *args):
        self.run()
"""
# What DeepSpeed's tests do: save, look at what was saved or load it, skip, and hang.
TESTS = """
import time
import deepspeed, pytest, torch
from unit.common import DistributedExec

def engine():
    net = torch.nn.Linear(3, 2)
    config = {"train_batch_size": 1, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), config=config)[0]

@pytest.fixture(autouse=True)
def one_rank(tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    deepspeed.init_distributed("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

def test_round(tmp_path):
    engine().save_checkpoint(str(tmp_path / "saved"), tag="one", client_state={"at": 1})
    assert engine().load_checkpoint(str(tmp_path / "saved"), tag="one")[1]["at"] == 1

def test_files(tmp_path):
    engine().save_checkpoint(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "latest").exists()

def test_wrong():
    assert False, "so it is alone"

def test_skipped():
    pytest.skip("not here")

"""
ENDLESS = """
def test_endless():
    time.sleep(1000)
"""


def tree(root: Path, tests: str) -> Path:
    unit = root / "tests" / "unit"
    (unit / "checkpoint").mkdir(parents=True)
    (unit / "__init__.py").touch()
    (unit / "common.py").write_text(COMMON)
    (unit / "checkpoint" / "test_small.py").write_text(tests)
    return root


def test_the_runner_of_deepspeeds_tests_tells_what_passes_what_fails_what_hangs_and_leaves_nothing(
    tmp_path: Path, start: Callable[..., Running], long: bool
) -> None:
    source, out, scratch = tree(tmp_path / "tree", TESTS + ENDLESS * long), tmp_path / "out.json", tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(path for path in source.rglob("*"))
    job = start(
        [sys.executable, str(SCRIPT), str(source), "--json", str(out), "--deadline", "15" if long else "40"],
        env={**DEEPSPEED, "TMPDIR": str(scratch)},
    )
    finished = job.wait(150)
    results: dict[str, Any] = {each["test"].rpartition("::")[2]: each for each in json.loads(out.read_text())}
    outcomes = {
        test: [each[kind]["outcome"] for kind in ("plain", "drop_in") if kind in each] for test, each in results.items()
    }
    assert outcomes == {
        "test_round": ["passed", "passed"], "test_files": ["passed", "failed"], "test_wrong": ["failed"],
        "test_skipped": ["skipped"], **({"test_endless": ["failed"]} if long else {}),
    }, finished.output  # fmt: skip
    if long:
        assert results["test_endless"]["plain"]["reason"] == "it did not end within 15 s"
    assert finished.returncode == 1
    assert "FAILS: test_small.py::test_files" in finished.output
    assert "1 pass, 0 cannot pass, 1 fail" in finished.output
    assert sorted(path for path in source.rglob("*")) == before, "the tree stays as it is"
    assert list(scratch.glob("layerwise_*")) == []
    assert job.pids() == [], "nor is a process left of the test that hangs"
