# SPDX-License-Identifier: Apache-2.0
"""The repository's examples resume exactly, as `layerwise rehearse` sees it, under every launcher that they name."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit.commands import ROOT
from kit.mpi import needs_mpi
from kit.rehearsals import COMMAND, by
from kit.runners import DEEPSPEED, Warm

from layerwise_dist.rehearsal.trial import Trial

EXAMPLES = ROOT / "examples"
ONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHER = [f"{Path(sys.executable).parent}/deepspeed", "--num_accelerators", "2"]
ACCELERATE = [
    # With --cpu it would start one process, whatever --num_processes says.
    f"{Path(sys.executable).parent}/accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
MPIRUN = [
    "mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1",
    *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "-n", "2", sys.executable,
]  # fmt: skip
GPT = ["--dir", "own", "--dim", "32", "--layers", "2", "--heads", "2", "--context", "16", "--batch", "2"]

# By name: the launcher, the script below examples/, and what it is given.
CLEAN: dict[str, tuple[list[str], str, list[str]]] = {
    "mnist_mlp": (ONE, "mnist_mlp.py", []),
    "digits_cnn": (ONE, "digits_cnn.py", ["--dir", "own"]),
    "digits_cnn, DDP": (TORCHRUN, "digits_cnn.py", ["--dir", "own"]),
    "digits_hf": (ONE, "digits_hf.py", ["--dir", "own"]),
    "digits_hf, DDP": (TORCHRUN, "digits_hf.py", ["--dir", "own"]),
    "digits_accelerate": (ONE, "digits_accelerate.py", ["--dir", "own"]),
    "digits_accelerate, DDP": (TORCHRUN, "digits_accelerate.py", ["--dir", "own"]),
    "digits_accelerate, accelerate launch": (ACCELERATE, "digits_accelerate.py", ["--dir", "own"]),
    "digits_lightning": (ONE, "digits_lightning.py", ["--dir", "own"]),
    "digits_lightning, DDP": (TORCHRUN, "digits_lightning.py", ["--dir", "own"]),
    "lora": (ONE, "lora.py", ["--dir", "own"]),
    "torchtitan_way": (ONE, "torchtitan_way.py", ["--dir", "own"]),
    "torchtitan_way, FSDP2": (TORCHRUN, "torchtitan_way.py", ["--dir", "own"]),
    "train_gpt": (ONE, "train_gpt.py", GPT),
    "train_gpt, DDP": (TORCHRUN, "train_gpt.py", [*GPT, "--wrapper", "ddp"]),
    "train_gpt, FSDP2, restarts": ([*TORCHRUN, "--max-restarts", "3"], "train_gpt.py", GPT),
    "lora, mpirun": (MPIRUN, "lora.py", ["--dir", "own"]),
    "deepspeed, ZeRO-1, torchrun": (TORCHRUN, "deepspeed/train.py", ["--deepspeed_config", "zero1.json", *GPT]),
    "deepspeed, ZeRO-2": (LAUNCHER, "deepspeed/train.py", ["--deepspeed_config", "zero2.json", *GPT]),
    "deepspeed, ZeRO-3": (LAUNCHER, "deepspeed/train.py", ["--deepspeed_config", "zero3.json", *GPT]),
    "deepspeed, ZeRO-3, offload": (
        LAUNCHER, "deepspeed/train.py", ["--deepspeed_config", "zero3_offload.json", *GPT]
    ),
    "deepspeed, ZeRO-3, mpirun": (MPIRUN, "deepspeed/train.py", ["--deepspeed_config", "zero3.json", *GPT]),
}  # fmt: skip
NOT_TRAINED = {"gpt_model.py", "read_checkpoint.py"}  # a model, and a reader


def needed(name: str) -> list[str]:
    """Packages that an example imports, or its launcher."""
    script = CLEAN[name][1]
    found = {"digits_hf.py": "transformers", "digits_accelerate.py": "accelerate", "digits_lightning.py": "lightning"}
    digits = ["sklearn"] if script.startswith("digits") or script == "lora.py" else []
    return [*digits, *(["deepspeed"] if "deepspeed" in script else [found[script]] if script in found else [])]


@pytest.mark.quick
def test_every_example_that_trains_is_rehearsed() -> None:
    scripts = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    assert {script for _, script, _ in CLEAN.values()} == scripts - NOT_TRAINED
    configurations = {path.name for path in (EXAMPLES / "deepspeed").glob("*.json")}
    assert configurations == {each for *_, given in CLEAN.values() for each in given if each.endswith(".json")}


def test_the_smallest_example_resumes_exactly(warm: Warm, tmp_path: Path) -> None:
    """The others by the command itself, with --long."""
    script = str(EXAMPLES / "mnist_mlp.py")
    options: dict[str, Any] = {"steps": 3, "kill_at": 1, "timeout_s": 60.0}
    verdict, _ = Trial([script], str(tmp_path), say=lambda text: None, start=by(warm), **options).run()
    assert verdict.kind == "exact" and verdict.restored is not None, verdict
    assert list(tmp_path.iterdir()) == []


def test_mutation_an_example_that_seeds_nothing_is_found(warm: Warm, tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("--long")
    text = (EXAMPLES / "mnist_mlp.py").read_text()
    script, folder = tmp_path / "unseeded.py", tmp_path / "runs"
    script.write_text(text.replace("torch.manual_seed(0)\n", ""))
    assert script.read_text() != text
    folder.mkdir()
    options: dict[str, Any] = {"steps": 3, "kill_at": 1, "timeout_s": 60.0}
    verdict, _ = Trial([str(script)], str(folder), say=lambda text: None, start=by(warm), **options).run()
    assert verdict.kind == "nondeterministic" and verdict.reason is not None and verdict.reason.key == "unseeded"


@pytest.mark.parametrize("name", [pytest.param(each, marks=needs_mpi if "mpirun" in each else ()) for each in CLEAN])
def test_the_examples_resume_exactly(tmp_path: Path, name: str, long: bool) -> None:
    """With as many threads as the machine has, since a user's run has them too."""
    if not long:
        pytest.skip("--long")
    for package in needed(name):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    launcher, script, given = CLEAN[name]
    if not (os.path.isabs(launcher[0]) or shutil.which(launcher[0])):
        pytest.skip(f"{launcher[0]} is not installed")
    given = [str(EXAMPLES / "deepspeed" / each) if each.endswith(".json") else each for each in given]
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        port = str(ear.getsockname()[1])
    if launcher is LAUNCHER:
        launcher = [*launcher, "--master_port", port]  # it sets MASTER_PORT itself
    environment = {
        **os.environ,
        "MASTER_PORT": port,
        "RES_OPTIONS": "timeout:1 attempts:1",
        **(DEEPSPEED if "deepspeed" in script else {}),
    }
    done = subprocess.run(
        [*COMMAND, "--json", "--timeout", "300", "--", *launcher, str(EXAMPLES / script), *given],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told.get("ranks") == (1 if launcher is ONE else 2), json.dumps(told, indent=1) + done.stderr[-3000:]
    assert done.returncode == 0 and told["verdict"] == "exact", json.dumps(told, indent=1) + done.stderr[-3000:]
    assert [each.name for each in tmp_path.iterdir() if "rehearsal" in each.name] == []
