# SPDX-License-Identifier: Apache-2.0
"""Stages of DeepSpeed with features of an engine and its loop, as tests/jobs/zero.py takes them."""

from __future__ import annotations

import itertools

from kit.runners import DEEPSPEED
from layerwise_dist.bench.deepspeed_modes import operator_is_built

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

NVME = ["3-bf16-nvme", "3-fp32-nvme-pipelined-clip-accumulate2", "3-bf16-nvmeall-inferred"]


def operator(name: str) -> bool:
    return operator_is_built(DEEPSPEED["TORCH_EXTENSIONS_DIR"], name)
