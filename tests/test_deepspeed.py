"""DeepSpeed: training with checkpoints on is training without them, bit for bit, and so is resumed training."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit.runners import DEEPSPEED, Warm

from layerwise_dist.bench.deepspeed_modes import operator_is_built

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed (launch/setup.sh does it)", allow_module_level=True)

RANKS = 2
# A stage and the features of an engine and its loop; tests/jobs/zero.py says what they are.
CASES = [
    "0-fp32-clip-accumulate2", "0-bf16-inferred", "1-fp32-accumulate3-micro", "1-bf16-clip-accumulate2",
    "1-bf16-fp32grads",
    "2-fp32-flat", "2-bf16-clip-recompute-base", "2-fp16-accumulate2", "2-bf16-offload-flat-reentrant",
    "3-fp32-clip-accumulate2", "3-bf16-subgroups-inferred-accumulate2", "3-fp16-gather-base", "3-bf16-offloadall-sgd",
    "2-bf16-keyed", "3-fp32-keyed-subgroups",
]  # fmt: skip
IN_BACKWARD = [
    "0-fp32-inbackward-accumulate2", "1-bf16-inbackward", "2-fp32-inbackward-recompute",
    "3-bf16-inbackward-accumulate2",
]  # fmt: skip
MORE_IN_BACKWARD = [
    "0-fp32-sgd-recompute-inbackward", "0-fp32-inbackward-flat-inferred", "1-fp32-overlap-inbackward",
    "2-bf16-fp32grads-inbackward", "2-bf16-flat-inbackward-recompute", "2-bf16-robin-inbackward",
    "2-fp32-overlap-inbackward", "1-bf16-inbackward-cyclic", "3-bf16-gather-subgroups-inbackward-inferred",
    "3-fp32-sgd-recompute-inbackward", "3-bf16-reentrant-inbackward", "3-fp32-inbackward-accumulate3-micro",
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


def results(zero: Warm, out: Path, *cases: str, ranks: int = RANKS, timeout: float = 150) -> list[dict[str, Any]]:
    out.mkdir()
    zero.run("zero.py", ranks, out, *cases, timeout=timeout)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_every_stage_and_precision_trains_and_resumes_bit_for_bit(zero: Warm, tmp_path: Path, long: bool) -> None:
    cases = CASES + MORE if long else CASES
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
    cases += ["1-bf16-inbackward", "2-bf16-inbackward", "3-bf16-inbackward"]
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
    cases = [*(NVME if long else NVME[1:2]), "nvme mutation", "nvme full", "nvme saved"]
    for found in results(zero, tmp_path / "out", *cases, timeout=600 if long else 150):
        assert found == {case: [] for case in cases}


def operator(name: str) -> bool:
    return operator_is_built(DEEPSPEED["TORCH_EXTENSIONS_DIR"], name)


def build(folder: Path) -> bool | str:
    """Builds async_io as DeepSpeed does at first use; if that cannot be, why."""
    code = (
        "from deepspeed.ops.op_builder import AsyncIOBuilder as Op\n"
        "assert Op().is_compatible(), 'incompatible'\nOp().load()"
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
    return "DeepSpeed's async_io operator cannot be built: libaio's header is missing (Debian: libaio-dev)"


def test_what_cannot_be_served_is_refused_by_name_and_misuse_is_an_error(zero: Warm, tmp_path: Path) -> None:
    cases = ["refusals", "window", "in backward", "stages", "block", "regrouped", "frozen layers"]
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
