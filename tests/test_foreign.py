# SPDX-License-Identifier: Apache-2.0
"""`tests/foreign/deepspeed.py` tells right from wrong: shown on a small tree of tests of its own kind."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.runners import DEEPSPEED, Running, Warm, WarmJob

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
    tmp_path: Path, start: Callable[..., Running], zero: Warm, long: bool
) -> None:
    """By --long as a command, and with a test that hangs; else in a process that has imported DeepSpeed already."""
    source, out, scratch = tree(tmp_path / "tree", TESTS + ENDLESS * long), tmp_path / "out.json", tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(path for path in source.rglob("*"))
    arguments = [str(source), "--json", str(out), "--deadline", "15" if long else "40"]
    env = {"TMPDIR": str(scratch), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # each test's process would import plugins
    job: Running | WarmJob = (
        start([sys.executable, str(SCRIPT), *arguments], env={**DEEPSPEED, **env})
        if long
        else zero.start(SCRIPT, 0, *arguments, env=env, folder=tmp_path)
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


DCP = """
import tempfile, pytest, torch
import torch.distributed.checkpoint as dcp
from torch.testing._internal.common_utils import TestCase

class TestSmall(TestCase):
    def test_round(self):
        with tempfile.TemporaryDirectory() as folder:
            dcp.save({"a": torch.ones(3), "n": 2}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
            state = {"a": torch.zeros(3), "n": 0}
            dcp.load(state, checkpoint_id=folder, no_dist=True)
            self.assertEqual((state["n"], state["a"]), (2, torch.ones(3)))

    def test_files(self):
        with tempfile.TemporaryDirectory() as folder:
            dcp.save({"a": 1}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
            open(folder + "/.metadata").close()

    def test_wrong(self):
        self.assertEqual(1, 2)

    def test_skipped(self):
        self.skipTest("not here")
"""


@pytest.mark.skipif(importlib.util.find_spec("expecttest") is None, reason="PyTorch's tests need expecttest")
def test_the_runner_of_pytorchs_tests_tells_what_passes_and_what_does_not(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    folder, out, scratch = tmp_path / "tree/test/distributed/checkpoint", tmp_path / "out.json", tmp_path / "scratch"
    folder.mkdir(parents=True)
    scratch.mkdir()
    (folder / "test_planner.py").write_text(DCP)
    script = SCRIPT.with_name("dcp.py")
    job = start([sys.executable, str(script), str(tmp_path / "tree"), "--json", str(out)], env={"TMPDIR": str(scratch)})
    finished = job.wait(100)
    outcomes = {
        test.rpartition("::")[2]: [each[kind]["outcome"] for kind in ("plain", "layerwise")]
        for test, each in json.loads(out.read_text()).items()
    }
    assert outcomes == {
        "test_round": ["passed", "passed"], "test_files": ["passed", "failed"], "test_wrong": ["failed", "failed"],
        "test_skipped": ["skipped", "skipped"],
    }, finished.output  # fmt: skip
    assert finished.returncode == 1 and "1 pass, 0 cannot pass, 1 fail" in finished.output
    assert "FAILS: test_planner.py::TestSmall::test_files: " in finished.output
    assert [path.name for path in folder.iterdir()] == ["test_planner.py"], "the tree stays as it is"
    assert list(scratch.iterdir()) == [] and job.pids() == []
