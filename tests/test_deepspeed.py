# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: training with checkpoints on is training without them, bit for bit, and so is resumed training."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit.deepspeed_cases import CASES, IN_BACKWARD, MORE, MORE_IN_BACKWARD, NVME, operator
from kit.drawing import SEED
from kit.runners import DEEPSPEED, Warm

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed (launch/setup.sh does it)", allow_module_level=True)

RANKS = 2
NODES = ["0-fp32-nodes", "2-bf16-nodes", "3-fp32-nodes-base"]  # a disk on each, and ranks swap nodes at the restart


def results(zero: Warm, out: Path, *cases: str, ranks: int = RANKS, timeout: float = 150) -> list[dict[str, Any]]:
    out.mkdir()
    zero.run("zero.py", ranks, out, *cases, timeout=timeout)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def sample() -> list[str]:
    """A case of each stage, and at least one with strings and one in fp16."""
    chance = random.Random(SEED)
    found = [chance.choice([each for each in CASES if each[0] == stage]) for stage in "0123"]
    for feature in ("keyed", "fp16"):
        if not any(feature in case for case in found):
            found.append(chance.choice([case for case in CASES if feature in case]))
    return [*found, chance.choice(NODES)]


def test_every_stage_and_precision_trains_and_resumes_bit_for_bit(zero: Warm, tmp_path: Path, long: bool) -> None:
    cases = [*CASES, *MORE, *NODES] if long else sample()
    for found in results(zero, tmp_path / "out", *cases, timeout=3000 if long else 150):
        assert found == {case: [] for case in cases}


def test_updates_in_the_backward_are_what_deepspeeds_own_step_makes_bit_for_bit(
    zero: Warm, tmp_path: Path, long: bool
) -> None:
    cases = [*IN_BACKWARD, *(MORE_IN_BACKWARD if long else ()), "in backward mutation"]
    for found in results(zero, tmp_path / "out", *cases, timeout=1200 if long else 150):
        assert found == {case: [] for case in cases}


def test_three_ranks_pad_and_cut_otherwise_and_resume_as_well(zero: Warm, tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("--long")
    cases = ["0-bf16-clip", "1-bf16-fp32grads", "2-bf16-accumulate2", "3-fp32-clip", "3-bf16-subgroups-gather"]
    cases += ["1-bf16-inbackward", "2-bf16-inbackward", "3-bf16-inbackward", *NODES]
    for found in results(zero, tmp_path / "out", *cases, ranks=3):
        assert found == {case: [] for case in cases}


def test_what_is_swapped_to_nvme_is_saved_and_restored_bit_for_bit(zero: Warm, tmp_path: Path, long: bool) -> None:
    """--long builds DeepSpeed's operator for it, which takes minutes; otherwise it must have been built before."""
    built = operator("async_io")
    if not built and not long:
        pytest.skip("DeepSpeed's async_io operator is not built here (--long builds it)")
    if not built:
        built = build(tmp_path)
    if isinstance(built, str):
        pytest.skip(built)
    cases = [*(NVME if long else NVME[1:2]), "nvme mutation", "nvme full", "nvme saved"]
    for found in results(zero, tmp_path / "out", *cases, timeout=600 if long else 150):
        assert found == {case: [] for case in cases}


def build(folder: Path, builder: str = "AsyncIOBuilder") -> bool | str:
    """Builds an operator as DeepSpeed does at first use; if that cannot be, why."""
    code = (
        f"from deepspeed.accelerator import get_accelerator\nop = get_accelerator().create_op_builder({builder!r})\n"
        "assert op.is_compatible(), 'incompatible'\nop.load()"
    )
    with open(folder / "build.log", "wb") as output:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **DEEPSPEED}, timeout=1200, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode == 0:
        return True
    text = (folder / "build.log").read_text(errors="replace")
    assert "incompatible" in text, text[-4000:]
    return f"DeepSpeed's {builder} cannot build its operator here; async_io needs libaio's header (Debian: libaio-dev)"


OWN_ADAMS = {"equal fused": ("fused_adam", "FusedAdamBuilder"), "equal cpu": ("cpu_adam", "CPUAdamBuilder")}


@pytest.mark.parametrize("case", OWN_ADAMS)
def test_deepspeed_s_own_adams_and_torch_s_go_on_from_one_another(
    zero: Warm, tmp_path: Path, long: bool, case: str
) -> None:
    """--long builds DeepSpeed's operators for it; otherwise they must have been built before."""
    name, builder = OWN_ADAMS[case]
    built: bool | str = operator(name)
    if not built and not long:
        pytest.skip(f"DeepSpeed's {name} operator is not built here (--long builds it)")
    built = built or build(tmp_path, builder)
    if isinstance(built, str):
        pytest.skip(built)
    cases = [case, "cpuadam", "cpuadam mutation"] if case == "equal cpu" else [case]
    for found in results(zero, tmp_path / "out", *cases):
        assert found == {case: [] for case in cases}


def test_what_cannot_be_served_is_refused_by_name_and_misuse_is_an_error(zero: Warm, tmp_path: Path) -> None:
    cases = ["refusals", "window", "in backward", "stages", "block", "regrouped", "frozen layers"]
    for found in results(zero, tmp_path / "out", *cases):
        assert found == {case: [] for case in cases}


def test_an_engine_s_scheduler_and_loss_scale_and_a_script_s_own_stand_for_each_other(
    zero: Warm, tmp_path: Path
) -> None:
    cases = ["stand-ins", "stand-ins that differ", "stand-ins mutation"]
    for found in results(zero, tmp_path / "out", *cases):
        assert found == {case: [] for case in cases}


def test_scripts_save_and_load_by_deepspeeds_own_calls_as_they_are(zero: Warm, tmp_path: Path, long: bool) -> None:
    cases = ["two directories, monitored"] if long else []
    cases += ["calls", "two directories", "second engine", "untrained", "from DeepSpeed's own", "block alone"]
    for found in results(zero, tmp_path / "out", *cases):
        assert found == {case: [] for case in cases}


def test_a_part_of_a_checkpoint_leaves_the_rest_as_it_was(zero: Warm, tmp_path: Path, long: bool) -> None:
    more = ["0-fp32", "0-bf16", "1-bf16-fp32grads"] if long else []
    cases = [f"parts {case}" for case in ["2-bf16", "3-bf16", *more]]
    for found in results(zero, tmp_path / "out", *cases, "parts mutation"):
        assert found == {case: [] for case in [*cases, "parts mutation"]}


def test_masters_and_state_that_were_given_other_memory_are_saved_from_there(zero: Warm, tmp_path: Path) -> None:
    cases = ["other memory 2", "other memory 3"]
    for found in results(zero, tmp_path / "out", *cases):
        assert found == {case: [] for case in cases}


def test_what_is_left_out_of_a_checkpoint_or_a_restore_is_seen(zero: Warm, tmp_path: Path) -> None:
    ranks = results(zero, tmp_path / "out", "mutations")
    assert {name: any(found["mutations"][name] for found in ranks) for name in ranks[0]["mutations"]} == {
        name: True for name in ranks[0]["mutations"]
    }
