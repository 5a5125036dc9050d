# SPDX-License-Identifier: Apache-2.0
"""Jobs of `jobs/mpi.py`: how they are started by a real mpirun, and what one that nobody interrupts ends with."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.runners import JOBS

MPIRUN = shutil.which("mpirun")
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="mpirun or mpi4py is missing (Debian: apt-get install openmpi-bin; pip install mpi4py)",
)


def command(ranks: int, *args: Any) -> list[str]:
    options = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    assert MPIRUN is not None
    return [MPIRUN, *options, "-n", str(ranks), sys.executable, str(JOBS / "mpi.py"), *map(str, args)]


def told(out: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def uninterrupted(rank: int, total: int) -> str:
    """What a rank of tests/jobs/mpi.py holds at the end, without the engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(JOBS))
        from job_kit import digest, odd_model
    before = torch.get_num_threads()
    model, optimizer = odd_model(rank)
    for _ in range(total):
        model(torch.randn(4, 33)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(before)
    return digest(model, optimizer)
