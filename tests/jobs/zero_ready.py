# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed with the operator that it loads at the start of each job on a CPU, for jobs that are forked from here.

    zero_ready.py       compiles it, if it is not there

torch compiles an operator, and each process that loads one looks whether it must. A file is there as long as somebody
does. A process that is killed meanwhile leaves the file, and every later one waits for it without end. Jobs that are
forked from here have the operator already.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from kit.runners import DEEPSPEED

    os.environ.update(DEEPSPEED)

import deepspeed  # noqa: E402, F401

# The first engine of a process imports it: seconds, in each rank of each job.
import torch._inductor.compile_fx  # noqa: E402, F401
from deepspeed.accelerator import get_accelerator  # noqa: E402

OPERATORS = Path(os.environ["TORCH_EXTENSIONS_DIR"])


def held(path: Path) -> bool:
    """Whether a process has this file open. Who compiles has its lock open all the time."""
    wanted = path.stat()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = link.stat()
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def remove_left_locks() -> None:
    """Those of processes that were killed; what they had compiled so far is checked anew by the next."""
    for lock in OPERATORS.glob("**/lock"):
        try:
            if not held(lock):
                lock.unlink()
        except FileNotFoundError:
            continue


def load() -> None:
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and builder.is_compatible(verbose=False):
        builder.load(verbose=False)


OPERATORS.mkdir(parents=True, exist_ok=True)
with open(OPERATORS / "of_tests", "w") as one_at_a_time:
    fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
    remove_left_locks()
    load()
