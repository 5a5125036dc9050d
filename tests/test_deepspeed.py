"""DeepSpeed: training with checkpoints on is training without them, bit for bit, and so is resumed training."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, Warm, torchrun_command

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed (launch/setup.sh does it)", allow_module_level=True)

RANKS = 2
ENVIRONMENT = {"DS_ACCELERATOR": "cpu"}
# A stage and the features of an engine and its loop; tests/jobs/zero.py says what they are.
CASES = [
    "0-fp32-clip-accumulate2", "0-bf16-inferred", "1-fp32-accumulate3-micro", "1-bf16-clip-accumulate2",
    "1-bf16-fp32grads",
    "2-fp32-flat", "2-bf16-clip-recompute", "2-fp16-accumulate2", "2-bf16-offload-flat-reentrant",
    "3-fp32-clip-accumulate2", "3-bf16-subgroups-inferred-accumulate2", "3-fp16-gather", "3-bf16-offloadall-sgd",
]  # fmt: skip
MORE = [
    "-".join([stage, precision, *features])
    for stage, precision, features in itertools.product(
        "0123",
        ("fp32", "bf16", "fp16"),
        [
            (),
            ("clip", "accumulate2"),
            ("accumulate3", "micro"),
            ("flat", "recompute"),
            ("inferred", "sgd"),
            ("overlap", "robin"),
        ],
    )
    if precision != "fp16" or stage in "23"
] + ["2-fp32-offload-clip", "3-fp32-offload", "3-bf16-offload-subgroups-gather", "3-fp16-offload-accumulate2"]


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Starts jobs that need not import DeepSpeed."""
    server = Warm(tmp_path_factory.mktemp("zero"), "deepspeed", env={**ENVIRONMENT, "PYTHONWARNINGS": "ignore"})
    yield server
    server.close()


def results(zero: Warm, out: Path, *cases: str, ranks: int = RANKS, timeout: float = 150) -> list[dict[str, Any]]:
    out.mkdir()
    zero.run("zero.py", ranks, out, *cases, timeout=timeout)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_every_stage_and_precision_trains_and_resumes_bit_for_bit(zero: Warm, tmp_path: Path, long: bool) -> None:
    cases = CASES + MORE if long else CASES
    for found in results(zero, tmp_path / "out", *cases, timeout=3000 if long else 150):
        assert found == {case: [] for case in cases}


def test_three_ranks_pad_and_cut_otherwise_and_resume_as_well(zero: Warm, tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("--long")
    cases = ["0-bf16-clip", "1-bf16-fp32grads", "2-bf16-accumulate2", "3-fp32-clip", "3-bf16-subgroups-gather"]
    for found in results(zero, tmp_path / "out", *cases, ranks=3):
        assert found == {case: [] for case in cases}


NVME = ["3-bf16-nvme", "3-fp32-nvme-pipelined-clip-accumulate2", "3-bf16-nvmeall-inferred"]


def test_what_is_swapped_to_nvme_is_saved_and_restored_bit_for_bit(zero: Warm, tmp_path: Path, long: bool) -> None:
    """--long builds DeepSpeed's operator for it, which takes minutes; otherwise it must have been built before."""
    built = operator("async_io")
    if not built and not long:
        pytest.skip("DeepSpeed's async_io operator is not built here (--long builds it)")
    if not built:
        built = build(tmp_path)
    if isinstance(built, str):
        pytest.skip(built)
    cases = [*(NVME if long else NVME[1:2]), "nvme mutation"]
    for found in results(zero, tmp_path / "out", *cases, timeout=600 if long else 150):
        assert found == {case: [] for case in cases}


def operator(name: str) -> bool:
    """Whether DeepSpeed finds that operator built."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    return any(root.glob(f"**/{name}/{name}.so"))


def build(folder: Path) -> bool | str:
    """Builds async_io as DeepSpeed does at first use; if that cannot be, why."""
    code = (
        "from deepspeed.ops.op_builder import AsyncIOBuilder as Op\n"
        "assert Op().is_compatible(), 'incompatible'\nOp().load()"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja may be in the virtual environment only
    with open(folder / "build.log", "wb") as output:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT, "PATH": path}, timeout=1200,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode == 0:
        return True
    text = (folder / "build.log").read_text(errors="replace")
    assert "incompatible" in text, text[-4000:]
    return "DeepSpeed's async_io operator cannot be built: libaio's header is missing (Debian: libaio-dev)"


def test_what_cannot_be_served_is_refused_by_name_and_misuse_is_an_error(zero: Warm, tmp_path: Path) -> None:
    cases = ["refusals", "window", "stages", "block", "regrouped", "calls", "from DeepSpeed's own"]
    for found in results(zero, tmp_path / "out", *cases):
        assert found == {case: [] for case in cases}


def test_a_restore_that_leaves_something_out_is_seen(zero: Warm, tmp_path: Path) -> None:
    ranks = results(zero, tmp_path / "out", "mutations")
    assert {name: any(found["mutations"][name] for found in ranks) for name in ranks[0]["mutations"]} == {
        name: True for name in ranks[0]["mutations"]
    }


# -- real kills ----------------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parent.parent / "examples" / "deepspeed"
STEPS = 14
SMALL = ["--dim", "32", "--layers", "2", "--heads", "2", "--context", "16", "--batch", "2", "--steps", str(STEPS)]


def losses(output: str) -> list[tuple[int, str]]:
    """(step, loss in hexadecimal) as rank 0 printed them, launch after launch."""
    return [
        (int(step), loss) for step, loss in re.findall(r"^.*?step (\d+): loss \S+ \((\S+)\)$", output, re.MULTILINE)
    ]


def arguments(folder: Path, stage: str) -> list[str]:
    return ["--deepspeed_config", str(EXAMPLE / f"{stage}.json"), "--dir", str(folder), *SMALL]


def kill_one_rank(job: Running, victim: int, after: int) -> None:
    """SIGKILL for one rank, once step `after` was printed."""
    deadline = time.monotonic() + 60
    while not any(step >= after for step, _ in losses(job.output())):
        assert job.poll() is None and time.monotonic() < deadline, job.output()[-6000:]
        time.sleep(0.01)
    pid = job.rank_pid(victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def check(output: str, reference: dict[int, str]) -> None:
    """Every step that was told of has the loss of the run that nobody killed, and the last start was a resume."""
    told = losses(output)
    assert all(loss == reference[step] for step, loss in told), (told, reference)
    assert told[-1][0] == STEPS
    starts = [int(step) for step in re.findall(r"starting at step (\d+)", output)]
    assert len(starts) > 1 and starts[0] == 0 < starts[-1], starts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, str]]:
    """Losses by step of a run of the example with that configuration that nobody killed; each is run once."""
    known: dict[str, dict[int, str]] = {}

    def run(stage: str) -> dict[int, str]:
        if stage not in known:
            script = [*torchrun_command(EXAMPLE / "train.py", RANKS), "--no-checkpoints"]
            job = Running([*script, *arguments(tmp_path_factory.mktemp("none"), stage)], ENVIRONMENT)
            finished = job.wait(90)
            job.close()
            assert finished.returncode == 0, finished.output[-6000:]
            known[stage] = dict(losses(finished.output))
            assert len(known[stage]) == STEPS
        return known[stage]

    return run


def test_a_rank_killed_under_torchrun_restarts_by_itself_and_goes_on_bit_for_bit(
    start: Callable[..., Running], tmp_path: Path, undisturbed: Callable[[str], dict[int, str]]
) -> None:
    chance = random.Random()
    reference = undisturbed("zero2")
    command = torchrun_command(EXAMPLE / "train.py", RANKS, *arguments(tmp_path / "ckpt", "zero2"), max_restarts=1)
    job = start(command, ENVIRONMENT)
    victim, after = chance.randrange(RANKS), chance.randint(2, STEPS - 4)
    kill_one_rank(job, victim, after)
    finished = job.wait(90)
    assert finished.returncode == 0, f"killed rank {victim} after step {after}:\n{finished.output[-6000:]}"
    check(finished.output, reference)


def test_a_job_of_the_deepspeed_launcher_that_lost_a_rank_resumes_bit_for_bit(
    start: Callable[..., Running], tmp_path: Path, undisturbed: Callable[[str], dict[int, str]]
) -> None:
    chance = random.Random()
    stage = "zero3"
    reference = undisturbed(stage)
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        sys.executable, str(launcher), "--num_accelerators", str(RANKS), "--master_port", str(free_port()),
        str(EXAMPLE / "train.py"), *arguments(tmp_path / "ckpt", stage),
    ]  # fmt: skip
    job = start(command, ENVIRONMENT)
    victim, after = chance.randrange(RANKS), chance.randint(2, STEPS - 4)
    kill_one_rank(job, victim, after)
    first = job.wait(60)
    assert first.returncode != 0
    command[command.index("--master_port") + 1] = str(free_port())
    second = start(command, ENVIRONMENT).wait(90)
    assert second.returncode == 0, f"killed rank {victim} after step {after}:\n{second.output[-6000:]}"
    check(first.output + second.output, reference)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
