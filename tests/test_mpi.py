# SPDX-License-Identifier: Apache-2.0
"""The transport over MPI, in jobs that a real mpirun started."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit.clusters import can_make_nodes
from kit.mpi import command, needs_mpi, told, uninterrupted
from kit.runners import Running, Warm

from layerwise_dist.commit.transports import mpi
from layerwise_dist.errors import ConfigError, DeadlineError

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


# -- an MPI, acted -----------------------------------------------------------------------------------------------------


class Request:
    """Done at the so many-eth look."""

    def __init__(self, looks: float = 1) -> None:
        self.looks = looks

    def Test(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


class Comm:
    """Of two ranks, of which this is the first; what it sends is there after a second look."""

    def __init__(self, places: list[int], duplicating: Request) -> None:
        self.places, self.duplicating = places, duplicating
        self.sent: list[tuple[bytes, int]] = []

    def Get_size(self) -> int:
        return len(self.places)

    def Get_rank(self) -> int:
        return 0

    def Idup(self) -> tuple[Comm, Request]:
        return self, self.duplicating

    def Set_errhandler(self, handler: object) -> None:
        pass

    def Iallgather(self, mine: list[Any], every: list[Any]) -> Request:
        every[0][:] = b"".join(place.to_bytes(8, "little") for place in self.places)
        return Request()

    def Isend(self, message: list[Any], to: int, tag: int) -> Request:
        self.sent.append((message[0], to))
        return Request(looks=2)

    def Improbe(self, source: int, tag: int, status: object) -> None:
        return None


def acted(monkeypatch: pytest.MonkeyPatch, places: list[int], looks: float = 1) -> SimpleNamespace:
    found = SimpleNamespace(
        THREAD_SINGLE=0, THREAD_FUNNELED=1, THREAD_SERIALIZED=2, BYTE=None, ERRORS_RETURN=None, ANY_SOURCE=-1,
        COMM_WORLD=Comm(places, Request(looks)), Query_thread=lambda: 3, Status=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(mpi, "_mpi", lambda: found)
    return found


def test_ranks_that_are_not_those_of_mpi_and_a_rank_that_never_comes_are_named_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acted(monkeypatch, [0, 1])
    with pytest.raises(ConfigError, match="torch.distributed has 4 ranks, MPI_COMM_WORLD 2"):
        mpi.open_mpi(0, 4, 20.0)
    acted(monkeypatch, [0, 0])
    with pytest.raises(ConfigError, match="torch.distributed's ranks are not one for each of MPI's"):
        mpi.open_mpi(0, 2, 20.0)
    acted(monkeypatch, [0, 1], looks=float("inf"))
    with pytest.raises(DeadlineError, match="attach: waited 0.05 s for all ranks of MPI_COMM_WORLD to call it"):
        mpi.open_mpi(0, 2, 0.05)


def test_a_message_thread_that_breaks_says_why_here_and_its_end_to_those_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def boom() -> None:
        raise RuntimeError("of nobody's")

    there = acted(monkeypatch, [0, 1])
    connections = mpi.MpiConnections(there, there.COMM_WORLD, {5: 1})
    broken: list[str] = []
    over = threading.Event()

    def on_broken(why: str) -> None:
        broken.append(why)
        connections.send(5, b"the last words")
        over.set()

    connections.start(lambda key, body: None, lambda key, why: None, on_broken)
    connections.call(boom)
    assert over.wait(10)
    connections.close(10.0)
    assert broken == ["thread layerwise-messages: RuntimeError: of nobody's"]
    assert there.COMM_WORLD.sent == [(b"the last words", 1), (b"", 1)]
    connections.send(5, b"to one that has ended")
    assert len(there.COMM_WORLD.sent) == 2


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
        "try:\n"
        "    lwd.attach(model, torch.optim.SGD(model.parameters()), mode='monitor')\n"
        "except lwd.errors.UnsupportedError as error:\n"
        "    print('refused', error)\n"
    )
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "here").mkdir()
    done = warm.run(tmp_path / "script.py", 0, folder=tmp_path / "here", env={"OMPI_COMM_WORLD_SIZE": "2"})
    auto, asked, store, monitors = done.lines("refused ")
    for line in (auto, asked):
        assert "needs mpi4py" in line and "pip install 'layerwise_dist[mpi]'" in line and "init_process_group()" in line
    assert "mpirun started 2 processes" in store and "'mpi' or 'auto'" in store
    assert "mode = 'monitor'" in monitors and "init_process_group()" in monitors and "mode 'direct'" in monitors
    assert not os.listdir(tmp_path / "here")
