"""Runs trials (zero_kit.py) and checks (zero_checks.py) of DeepSpeed engines on all ranks; writes what differs.

    zero.py OUT CASE...

OUT/<rank>.json is {case: [differences]}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from kit import process_group
from zero_checks import CHECKS
from zero_kit import trial


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    # The CPU accelerator asks for fast fp16 matrix products; slow ones are as exact.
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    results: dict[str, Any] = {}
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        dist.broadcast_object_list(paths, src=0)
        deepspeed.init_distributed("gloo")
        for case in cases:
            root = f"{paths[0]}/{case}"
            results[case] = CHECKS[case](root) if case in CHECKS else trial(case, root)
        (out / f"{rank}.json").write_text(json.dumps(results))
        dist.barrier()


if __name__ == "__main__":
    main()
