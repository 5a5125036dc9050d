"""A script that ends without `close()`: in order, with its own exit code, and with nothing lost that could be saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.metadata import CheckpointMetadataManager

SCRIPT = """
import sys, torch, layerwise_dist as lwd

def train():
    model = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir="ckpt")
    for step in ckpt.steps(20):
        model(torch.randn(4, 100)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 14:
            {at_14}
    return ckpt

{end}
"""


def run(folder: Path, at_14: str = "pass", end: str = "kept = train()") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(at_14=at_14, end=end)], cwd=folder, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr


def newest(folder: Path) -> int:
    manifests = CheckpointMetadataManager(PosixEnv(), str(folder / "ckpt")).inventory().manifests.values()
    return max((manifest.step for manifest in manifests), default=0)


@pytest.mark.parametrize("end", ["kept = train()", "train()"], ids=["kept", "out of scope"])
def test_a_forgotten_close_is_made_up_for_and_said(tmp_path: Path, end: str) -> None:
    code, told = run(tmp_path, end=end)
    assert code == 0 and "close() was not called" in told and newest(tmp_path) == 20


@pytest.mark.parametrize(
    ("at_14", "wanted", "words"),
    [("raise ValueError('mine')", 1, "ValueError: mine"), ("sys.exit(3)", 3, ""), ("raise KeyboardInterrupt", -2, "")],
    ids=["exception", "exit", "interrupt"],
)
def test_a_script_that_is_left_keeps_its_exit_code(tmp_path: Path, at_14: str, wanted: int, words: str) -> None:
    code, told = run(tmp_path, at_14)
    assert code == wanted and words in told and "terminate called" not in told
    # The iteration that was left is not saved; those before it are on the disk.
    assert newest(tmp_path) == 14


def test_a_forked_child_leaves_its_parents_engine_alone(tmp_path: Path) -> None:
    code, told = run(tmp_path, "pid = __import__('os').fork(); pid or sys.exit(0); __import__('os').waitpid(pid, 0)")
    assert code == 0 and told.count("close() was not called") == 1 and newest(tmp_path) == 20
