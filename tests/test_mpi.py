# SPDX-License-Identifier: Apache-2.0
"""The transport over MPI, in jobs that a real mpirun started."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.clusters import can_make_nodes
from kit.mpi import command, needs_mpi, told, uninterrupted
from kit.runners import Running, Warm

from layerwise_dist.commit.transports import mpi

DEADLINE = 90.0


def run(start: Callable[..., Running], out: Path, ranks: int, *args: Any) -> list[dict[str, Any]]:
    for rank in range(ranks):
        (out / f"{rank}.json").unlink(missing_ok=True)
    finished = start(command(ranks, *args)).wait(DEADLINE)
    assert finished.returncode == 0, finished.output[-6000:]
    return told(out, ranks)


def test_every_rank_but_the_first_is_right_below_one_that_speaks_for_it() -> None:
    for size in (1, 2, 9, 10, 73, 74, 1000):
        for rank in range(size):
            below = mpi.ranks_below(rank, size)
            assert list(below) == [other for other in range(1, size) if (other - 1) // mpi.FANOUT == rank]
            for child, ranks in below.items():
                under = mpi.ranks_below(child, size)
                assert sorted(ranks) == sorted([child, *(other for each in under.values() for other in each)])


@needs_mpi
def test_messages_over_mpi_arrive_once_and_in_order_and_nothing_is_left(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    for result in run(start, tmp_path, 10, "messages", tmp_path, tmp_path):  # two levels below rank 0
        assert result == {"good": [True, True], "threads": ["MainThread"]}


@needs_mpi
def test_a_job_under_mpirun_that_loses_a_rank_ends_and_resumes_bit_for_bit(
    start: Callable[..., Running], tmp_path: Path, long: bool
) -> None:
    if not long and can_make_nodes():
        pytest.skip("test_namespaces.py tries it on two nodes; both with --long")
    began = time.monotonic()
    job = start(command(2, "train", tmp_path / "ckpt", tmp_path, 9, 4))
    assert job.wait(DEADLINE).returncode != 0, "mpirun says that a rank died"
    assert time.monotonic() - began < 60
    found = run(start, tmp_path, 2, "train", tmp_path / "ckpt", tmp_path, 9, -1)
    assert [each["start"] for each in found] == [4, 4]
    assert [each["hash"] for each in found] == [uninterrupted(rank, 9) for rank in range(2)]


@needs_mpi
def test_a_stopped_rank_gives_the_others_errors_within_the_deadline(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    job = start(command(3, "stopped", tmp_path / "ckpt", tmp_path))
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"{rank}.json").exists() for rank in (0, 2)):
            assert time.monotonic() < deadline and job.poll() is None, job.output()[-6000:]
            time.sleep(0.05)
    finally:
        job.kill()
    for rank in (0, 2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "rank(s) 1" in result["error"] or "rank 0's coordinator to let it" in result["error"], result
        assert result["seconds"] < 3 * 2.0 + 5


@needs_mpi
@pytest.mark.parametrize("wanted", ["serialized", "single"])
def test_an_mpi_without_threads_is_a_clear_error_on_all_ranks(
    start: Callable[..., Running], tmp_path: Path, wanted: str
) -> None:
    for result in run(start, tmp_path, 2, "level", tmp_path / "ckpt", tmp_path, wanted):
        assert result["error"].startswith(f"commit.transport = 'mpi': MPI runs with MPI_THREAD_{wanted.upper()}")


def test_without_mpi4py_a_job_under_mpirun_is_told_what_to_install_or_to_call(warm: Warm, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "import torch, layerwise_dist as lwd\n"
        "model = torch.nn.Linear(1, 1)\n"
        "for wanted in ('auto', 'mpi', 'store'):\n"
        "    try:\n"
        "        lwd.attach(model, torch.optim.SGD(model.parameters()), commit={'transport': wanted})\n"
        "    except lwd.errors.ConfigError as error:\n"
        "        print('refused', wanted, error)\n"
    )
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "here").mkdir()
    done = warm.run(tmp_path / "script.py", 0, folder=tmp_path / "here", env={"OMPI_COMM_WORLD_SIZE": "2"})
    auto, asked, store = done.lines("refused ")
    for line in (auto, asked):
        assert "needs mpi4py" in line and "pip install 'layerwise_dist[mpi]'" in line and "init_process_group()" in line
    assert "mpirun started 2 processes" in store and "'mpi' or 'auto'" in store
    assert not os.listdir(tmp_path / "here")
