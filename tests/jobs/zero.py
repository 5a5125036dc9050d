# SPDX-License-Identifier: Apache-2.0
"""Runs trials (zero_kit.py) and checks (zero_checks.py) of DeepSpeed engines on all ranks; writes what differs.

    zero.py OUT CASE...

OUT/<rank>.json is {case: [differences]}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from job_kit import process_group
from zero_checks import CHECKS
from zero_kit import prepare, trial


def main() -> None:
    out, cases = Path(sys.argv[1]), sys.argv[2:]
    prepare()
    results: dict[str, Any] = {}
    with process_group() as rank, tempfile.TemporaryDirectory() as scratch:
        paths = [scratch]
        dist.broadcast_object_list(paths, src=0)
        deepspeed.init_distributed("gloo")
        for case in cases:
            root = f"{paths[0]}/{case}"
            try:
                results[case] = CHECKS[case](root) if case in CHECKS else trial(case, root)
            except BaseException:
                # At once: tearing the group down would wait for the others, and they for this rank.
                traceback.print_exc()
                os._exit(1)
        (out / f"{rank}.json").write_text(json.dumps(results))
        dist.barrier()


if __name__ == "__main__":
    main()
