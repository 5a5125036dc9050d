# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed jobs that lose a rank, under every launcher: they go on bit for bit, and no checkpoint lacks a shard."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.deepspeed_cases import CASES, NVME, operator
from kit.drawing import SEED
from kit.runners import DEEPSPEED, JOBS, Running, Warm

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed (launch/setup.sh does it)", allow_module_level=True)

RANKS = 2
MONITORED = ["2-bf16-clip-monitor", "3-fp32-monitor"]
ROOT = Path(__file__).parent.parent


# -- every mode, killed once -----------------------------------------------------------------------------------------


def lines(out: Path, mode: str, rank: int) -> list[list[str]]:
    return [line.split() for line in (out / f"{mode}.{rank}.log").read_text().splitlines()]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_killed_at_any_step_in_any_mode_changes_no_bit(
    start: Callable[..., Running], zero: Warm, tmp_path: Path, long: bool, launcher: str
) -> None:
    if launcher == "deepspeed" and not long:
        pytest.skip("--long; its script is tried below")
    modes = CASES + MONITORED + (NVME if operator("async_io") else [])
    if not long:
        modes = random.Random(f"{SEED} {launcher}").sample(modes, 1)
    print(f"seed {SEED}, modes {' '.join(modes)}")
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir()
    killed.mkdir()
    zero.run("zero_kill.py", RANKS, "--plain", "--seed", 0, "--out", plain, *modes, timeout=1200 if long else 120)
    arguments, timeout = ["--seed", SEED, "--out", killed, *modes], 2400 if long else 150
    if launcher == "torchrun":  # its agent, as launch/torchrun.sh starts it
        finished = zero.run("zero_kill.py", RANKS, *arguments, max_restarts=len(modes), timeout=timeout)
    else:
        job = launched(start, tmp_path, "deepspeed.sh", *arguments, script=JOBS / "zero_kill.py", restarts=len(modes))
        finished = job.wait(timeout)
    assert finished.returncode == 0 and "all modes are done" in finished.output, finished.output[-8000:]
    for mode in modes:
        assert (killed / f"{mode}.killed").exists()
        for rank in range(RANKS):
            expected = {number: loss for number, loss in lines(plain, mode, rank) if number != "start"}
            told = lines(killed, mode, rank)
            assert all(expected[number] == loss for number, loss in told if number != "start"), (mode, told, expected)
            starts = [int(step) for number, step in told if number == "start"]
            assert len(starts) == 2 and starts[0] == 0 < starts[1], (mode, starts)
            held, wanted = (json.loads((out / f"{mode}.{rank}.json").read_text()) for out in (killed, plain))
            assert [name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name)] == [], mode


# -- in the middle of a save -----------------------------------------------------------------------------------------


def test_a_rank_killed_in_the_middle_of_a_save_leaves_no_checkpoint_without_its_shard(
    zero: Warm, tmp_path: Path, long: bool
) -> None:
    kills = 20 if long else 2
    updates = 4 * kills + 4
    print(f"seed {SEED}")
    zero.run("zero_saves.py", RANKS, tmp_path, SEED, kills, updates, max_restarts=kills, timeout=900 if long else 120)
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == kills and all(each["good"] for each in seen), seen
    assert all(each["steps"] for each in seen), "the first step is committed before anybody is killed"
    logs = [[line.split() for line in (tmp_path / f"{rank}.log").read_text().splitlines()] for rank in range(RANKS)]
    for log in logs:
        assert int(log[-1][0]) == updates
        losses: dict[str, set[str]] = {}
        for step, loss, _ in log:
            losses.setdefault(step, set()).add(loss)
        assert all(len(each) == 1 for each in losses.values()), "a step that was made again was the same"
        for (before, _, committed), (step, _, _) in zip(log, log[1:], strict=False):
            if int(step) != int(before) + 1:
                assert int(step) > int(committed), "the next start goes on at what had been reported, or after it"
    if long:
        assert any(each["unfinished"] for each in seen), "some of the kills came in the middle"


def test_deepspeeds_own_save_names_a_checkpoint_without_the_killed_ranks_part_and_this_one_does_not(
    zero: Warm, tmp_path: Path
) -> None:
    import contrast_deepspeed as contrast

    found = {}
    for name in ("theirs", "ours"):
        job = zero.start(contrast.__file__, RANKS, tmp_path / name, name)
        job.ends_within(60)
        found[name] = contrast.state_of(tmp_path / name, name == "ours")
    tag, files = found["theirs"]
    assert tag == "global_step2" and len(files) == 1, "DeepSpeed's `latest` names what lacks rank 1's part"
    tag, files = found["ours"]
    assert tag == "global_step1" and len(files) == 2


# -- the launchers' scripts ------------------------------------------------------------------------------------------

LAUNCHERS = ["deepspeed.sh", "mpirun.sh", "slurm.sbatch"]
# A stub that starts as many tasks as srun would; docs/integrations/deepspeed.md says how the real one was tried.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
command = [word for number, word in enumerate(sys.argv[1:]) if number or not word.startswith("--")]
ranks = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(ranks)
]
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for task in tasks:
            task.kill()
    time.sleep(0.05)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks)))
"""
ONCE_KILLED = """
import os, pathlib, signal, sys, time
rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
if rank is None:  # mpirun
    rank, size = os.environ["OMPI_COMM_WORLD_RANK"], os.environ["OMPI_COMM_WORLD_SIZE"]
here = pathlib.Path(__file__).parent
start = (here / rank).read_text().count("start") if (here / rank).exists() else 0
with open(here / rank, "a") as told:
    told.write(f"start {start} of {size} ranks, given {' '.join(sys.argv[-2:])}, port {os.environ['MASTER_PORT']}\\n")
if start == 0:
    while rank == "1" and not (here / "0").exists():
        time.sleep(0.01)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


def here() -> list[str]:
    """Those of the launchers that there are."""
    mpi = shutil.which("mpirun") is not None and importlib.util.find_spec("mpi4py") is not None
    return [launcher for launcher in LAUNCHERS if launcher != "mpirun.sh" or mpi]


def launched(start: Callable[..., Running], folder: Path, launcher: str, *arguments: Any, **env: Any) -> Running:
    """One of launch/'s scripts, on two ranks; `env` is of the script, without LAYERWISE_."""
    named = {f"LAYERWISE_{name.upper()}": str(value) for name, value in {"venv": sys.prefix, **env}.items()}
    if launcher != "slurm.sbatch":
        return start(["bash", str(ROOT / "launch" / launcher), *map(str, [RANKS, *arguments])], {**DEEPSPEED, **named})
    stubs = folder / "bin"
    stubs.mkdir()
    (stubs / "srun").write_text(SRUN.format(python=sys.executable))
    (stubs / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    slurm = {
        "SLURM_NTASKS": str(RANKS), "SLURM_JOB_NODELIST": "here", "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{stubs}:{DEEPSPEED['PATH']}",
    }  # fmt: skip
    return start(["bash", str(ROOT / "launch" / launcher), *map(str, arguments)], {**DEEPSPEED, **slurm, **named})


@pytest.mark.parametrize("launcher", ["torchrun.sh", *LAUNCHERS])
def test_each_launchers_script_starts_all_ranks_again_when_one_dies(
    start: Callable[..., Running], tmp_path: Path, launcher: str
) -> None:
    if launcher not in ["torchrun.sh", *here()]:
        pytest.skip("mpirun or mpi4py is not installed (Debian: openmpi-bin; pip: mpi4py)")
    script = tmp_path / "once_killed.py"
    script.write_text(ONCE_KILLED)
    finished = launched(start, tmp_path, launcher, "these", "words", script=script, restarts=1).wait(90)
    assert finished.returncode == 0, finished.output[-6000:]
    told = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(RANKS)]
    assert told[0] == told[1], "the same port, first of all"
    for number, line in enumerate(told[0]):
        assert line.startswith(f"start {number} of {RANKS} ranks, given these words, port "), told
    assert len(told[0]) == 2, told


# -- the example, under the launchers --------------------------------------------------------------------------------

STEPS = 12
SHAPE = ["--dim", "32", "--layers", "2", "--heads", "2", "--context", "16", "--batch", "2", "--steps", str(STEPS)]
EXAMPLE = ROOT / "examples" / "deepspeed"


def losses(output: str) -> list[tuple[int, str]]:
    """(step, loss in hexadecimal) as rank 0 printed them, launch after launch."""
    return [
        (int(step), loss) for step, loss in re.findall(r"^.*?step (\d+): loss \S+ \((\S+)\)$", output, re.MULTILINE)
    ]


def kill_one_rank(job: Running, variable: str, after: int) -> None:
    """SIGKILL for one rank, once step `after` was printed."""
    deadline = time.monotonic() + 60
    while not any(step >= after for step, _ in losses(job.output())):
        assert job.poll() is None and time.monotonic() < deadline, job.output()[-6000:]
        time.sleep(0.01)
    pid = job.rank_pid(random.randrange(RANKS), variable)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_the_example_starts_and_starts_again_under_each_launcher(
    start: Callable[..., Running], zero: Warm, tmp_path: Path, long: bool
) -> None:
    """Each start of DeepSpeed in a process of its own takes seconds a rank."""
    if not long:
        pytest.skip("--long; the launchers' scripts and a rank that is killed in any mode are tried above")
    chance = random.Random(SEED)
    for launcher in here():
        stage = chance.choice(["zero1", "zero2", "zero3", "zero3_offload"])
        after = chance.randint(2, STEPS - 4)
        where = f"seed {SEED}, {launcher}, {stage}, killed after step {after}"
        print(where)
        folder = tmp_path / launcher
        folder.mkdir()
        arguments = ["--deepspeed_config", EXAMPLE / f"{stage}.json", *SHAPE]
        job = launched(start, folder, launcher, *arguments, "--dir", folder / "ckpt", restarts=1)
        kill_one_rank(job, "OMPI_COMM_WORLD_RANK" if launcher == "mpirun.sh" else "RANK", after)
        finished = job.wait(90)
        assert finished.returncode == 0, f"{where}:\n{finished.output[-6000:]}"
        undisturbed = zero.run(str(EXAMPLE / "train.py"), RANKS, "--no-checkpoints", *arguments, timeout=60)
        reference = dict(losses(undisturbed.output))
        told = losses(finished.output)
        assert len(reference) == STEPS and told[-1][0] == STEPS, where
        assert all(loss == reference[step] for step, loss in told), (where, told, reference)
        starts = [int(step) for step in re.findall(r"starting at step (\d+)", finished.output)]
        assert len(starts) == 2 and starts[0] == 0 < starts[1], (where, starts)
