# SPDX-License-Identifier: Apache-2.0
"""FSDP1, HSDP, tensor parallelism under FSDP2, ZeroRedundancyOptimizer: exact, and each element where it belongs."""

from __future__ import annotations

import json
from pathlib import Path

from kit.drawing import drawn
from kit.runners import Warm

# Of each line one is drawn; all are tried with --long.
EITHER_THREE = [
    ("trial:fsdp1:adamw-fused:all", "trial:fsdp1:sgd-momentum:closure"),
    ("trial:ddp:adamw-fused:bare:in_backward", "trial:ddp:sgd-momentum:batchnorm:in_backward"),
    ("trial:fsdp1:adamw-fused:bare:in_backward", "trial:fsdp1:adamw-foreach:clipping:pipelined_step"),
]  # fmt: skip
THREE = [
    "trial:fsdp1-flat:adamw-foreach:all", "trial:zero:adamw-fused:all",
    "written:fsdp1", "written:fsdp1-flat", "written:zero", "rollback:fsdp1-flat",
    "mutation:fsdp1", "refusals",
    "recut:fsdp2",
    "replaced:ddp", "replaced:fsdp1-hand", "replaced:fsdp2", "replaced:fsdp2-hand", "follows:fsdp2",
]  # fmt: skip
EITHER_FOUR = [
    ("trial:hsdp:adamw-fused:all", "trial:hsdp:sgd-momentum:bare:in_backward"),
    ("trial:tp:adamw-foreach:unused", "trial:tp:sgd-momentum:accumulation"),
    ("takes:hsdp>fsdp2", "takes:fsdp2>hsdp"),
]  # fmt: skip
FOUR = ["written:hsdp", "written:tp", "written:fsdp1-hybrid"]
OPTIMIZERS = ("sgd-momentum", "adamw-foreach", "adamw-fused")
# Clipping over two meshes is an error of torch's, and a tied weight cannot be in two.
ON_MESHES = ("bare", "accumulation", "schedule", "batchnorm", "unused", "closure")
MORE_THREE = [
    f"trial:{wrapper}:{optimizer}:{feature}"
    for wrapper in ("fsdp1", "fsdp1-flat", "fsdp1-gradients", "fsdp1-flat-gradients", "fsdp1-whole", "zero")
    for optimizer in OPTIMIZERS
    for feature in (*ON_MESHES, "clipping", "tied", "all")
]
MORE_FOUR = [
    f"trial:{wrapper}:{optimizer}:{feature}"
    for wrapper in ("hsdp", "tp", "fsdp1-hybrid", "fsdp1-flat-hybrid")
    for optimizer in OPTIMIZERS
    for feature in ON_MESHES
]


def chosen(cases: list[str], either: list[tuple[str, str]], more: list[str], long: bool) -> list[str]:
    if long:
        return [*cases, *(case for line in either for case in line), *more]
    return [*cases, *(drawn(line, line[0]) for line in either)]


def check(warm: Warm, folder: Path, ranks: int, cases: list[str], timeout: float) -> None:
    warm.run("wrappers.py", ranks, folder, *cases, timeout=timeout)
    for rank in range(ranks):
        assert json.loads((folder / f"{rank}.json").read_text()) == {case: [] for case in cases}


def test_fsdp1_and_zero_redundancy_train_and_resume_bit_for_bit_and_write_each_element_once(
    warm: Warm, tmp_path: Path, long: bool
) -> None:
    check(warm, tmp_path, 3, chosen(THREE, EITHER_THREE, MORE_THREE, long), 2000 if long else 150)


def test_hsdp_and_tensor_parallelism_train_and_resume_bit_for_bit_and_write_each_element_once(
    warm: Warm, tmp_path: Path, long: bool
) -> None:
    check(warm, tmp_path, 4, chosen(FOUR, EITHER_FOUR, MORE_FOUR, long), 2000 if long else 150)
