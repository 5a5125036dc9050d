# SPDX-License-Identifier: Apache-2.0
"""A script that ends without `close()`: in order, with its own exit code, and with nothing lost that could be saved."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from kit.runners import Warm

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


def run(warm: Warm, folder: Path, at_14: str = "pass") -> tuple[int, str]:
    """In a fork of a process that has imported torch, which ends as any interpreter does."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(at_14=at_14, end="train()"))
    done = warm.run(script, 0, folder=folder, check=False, whole_exit=True)
    return done.returncode, done.output


def newest(folder: Path) -> int:
    manifests = CheckpointMetadataManager(PosixEnv(), str(folder / "ckpt")).inventory().manifests.values()
    return max((manifest.step for manifest in manifests), default=0)


def test_a_forgotten_close_is_made_up_for_and_said(warm: Warm, tmp_path: Path) -> None:
    code, told = run(warm, tmp_path)
    assert code == 0 and "close() was not called" in told and newest(tmp_path) == 20


def test_a_forgotten_close_is_made_up_for_though_the_engine_is_there_as_long_as_the_interpreter(tmp_path: Path) -> None:
    script = SCRIPT.format(at_14="pass", end="kept = train()")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "close() was not called" in done.stderr and newest(tmp_path) == 20


@pytest.mark.parametrize(
    ("at_14", "wanted", "words"),
    [
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        ("sys.exit(3)", 3, ""),
        ("raise KeyboardInterrupt", -2, ""),
        # A handler of the script's own runs before the library's, and knows no more of where the iteration was.
        ("import atexit; atexit.register(ckpt.close); sys.exit(3)", 3, ""),
        ("ckpt.wait(14); import os; os._exit(3)", 3, ""),
    ],
    ids=["exception", "exit", "interrupt", "handler", "at once"],
)
def test_a_script_that_is_left_keeps_its_exit_code(
    warm: Warm, tmp_path: Path, at_14: str, wanted: int, words: str
) -> None:
    code, told = run(warm, tmp_path, at_14)
    assert code == wanted and words in told and "terminate called" not in told
    # The iteration that was left is not saved; those before it are on the disk.
    assert newest(tmp_path) == 14


def test_mutation_an_exit_that_seals_what_is_open_is_caught(warm: Warm, tmp_path: Path) -> None:
    sealing = "from layerwise_dist.engine import at_exit; at_exit.begun = lambda: False; sys.exit(3)"
    code, _ = run(warm, tmp_path, sealing)
    assert code == 3 and newest(tmp_path) == 15, "which is half an iteration"


SEVERAL = """
import sys, threading, torch, layerwise_dist as lwd

def make(name):
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, f"{name}/ckpt"

def update(model, optimizer):
    model(torch.randn(4, 100)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

def on_a_thread():
    model, optimizer, folder = make("thread")
    ckpt = lwd.attach(model, optimizer, dir=folder)
    for step in ckpt.steps(3):
        update(model, optimizer)
    update(model, optimizer)

trained, optimizer, folder = make("trainer")
trainer = lwd.LayerwiseCheckpointTrainer(trained, optimizer, checkpoint_dir=folder)
model, other, folder = make("engine")
ckpt = lwd.attach(model, other, dir=folder)
thread = threading.Thread(target=on_a_thread)
thread.start()
thread.join()
for step in ckpt.steps(9):
    trained(torch.randn(4, 100)).square().mean().backward()
    trainer.step()
    update(model, other)
    if step == 4:
        optimizer.step()
        sys.exit(3)
"""


def test_several_engines_a_trainer_and_one_of_a_thread_are_all_left_alike(warm: Warm, tmp_path: Path) -> None:
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    done = warm.run(script, 0, folder=tmp_path, check=False, whole_exit=True)
    assert done.returncode == 3, done.output
    # The trainer's iteration ends with its step(); the others' were open.
    assert [newest(tmp_path / name) for name in ("trainer", "engine", "thread")] == [5, 4, 3], done.output


DROP_IN = """
import os, sys, torch, torch.distributed as dist
import layerwise_dist.deepspeed as deepspeed

os.environ["LOCAL_RANK"] = "0"
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only inference uses it, and it takes a minute to build
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10))
engine, *_ = deepspeed.initialize(model=model, config={
    "train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
    "zero_optimization": {"stage": 1}, "layerwise_checkpoint": {"dir": "ckpt"},
})
for step in engine.layerwise.steps(9):
    engine.backward(engine(torch.randn(2, 10)).square().mean())
    engine.step()
    if step == 3:
        sys.exit(3)
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_drop_in_for_deepspeed_leaves_an_open_iteration_unsaved_as_all_do(zero: Warm, tmp_path: Path) -> None:
    script = tmp_path / "drop_in.py"
    script.write_text(DROP_IN)
    done = zero.run(script, 0, folder=tmp_path, timeout=90, check=False, whole_exit=True)
    assert done.returncode == 3 and "close() was not called" in done.output, done.output
    assert newest(tmp_path) == 3


def test_a_forked_child_leaves_its_parents_engine_alone(warm: Warm, tmp_path: Path) -> None:
    code, told = run(warm, tmp_path, "import os; pid = os.fork(); pid or sys.exit(0); os.waitpid(pid, 0)")
    assert code == 0 and told.count("close() was not called") == 1 and newest(tmp_path) == 20
