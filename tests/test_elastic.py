# SPDX-License-Identifier: Apache-2.0
"""Restarts under torchrun's agents with fewer ranks than before, and with more again: the job goes on by itself."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kit.runners import Warm, WarmJob, told

SAMPLES = 100_000  # as in jobs/elastic.py
DEADLINE = 90.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def await_told(out: Path, jobs: list[WarmJob], what: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    deadline = time.monotonic() + DEADLINE
    while not what(told(out, "told")):
        assert time.monotonic() < deadline, "\n".join(job.output()[-3000:] for job in jobs) + f"\n{told(out, 'told')}"
        time.sleep(0.05)
    return told(out, "told")


def agent(warm: Warm, port: int, folder: Path, out: Path, *more: int) -> WarmJob:
    """One of `torchrun --nnodes 1:2`, for one rank."""
    return warm.start(
        "elastic.py", 1, folder, out, *more, max_restarts=3, min_nodes=1, max_nodes=2,
        rdzv_endpoint=f"127.0.0.1:{port}", run_id="elastic",
        rdzv_configs={"timeout": 60, "last_call_timeout": 1, "keep_alive_interval": 1, "keep_alive_max_attempt": 2},
    )  # fmt: skip


def test_a_job_goes_on_with_fewer_ranks_and_with_more(warm: Warm, tmp_path: Path) -> None:
    """Two agents: one is lost with its rank, the other goes on alone, and then both again."""
    (tmp_path / "hold").touch()

    ports: list[int] = []

    def agents(total: int) -> list[WarmJob]:
        ports.append(free_port())
        return [agent(warm, ports[-1], tmp_path / "ckpt", tmp_path, total) for _ in range(2)]

    jobs = agents(0)
    seen = await_told(tmp_path, jobs, lambda lines: sum("committed" in line for line in lines) == 2)
    assert {(line["world"], line["start"]) for line in seen if "start" in line} == {(2, 0)}
    # The first agent to come has the rendezvous's store: it stays. It is the one of which the other's rank is no child.
    lost = next(job for job in jobs if not hosts(job, ports[0]))
    left = next(job for job in jobs if job is not lost)
    lost.kill()
    seen = await_told(tmp_path, jobs, lambda lines: any("committed" in line and line["world"] == 1 for line in lines))
    assert not any("error" in line for line in seen), seen
    (start,) = (line["start"] for line in seen if line["world"] == 1 and "start" in line)
    assert start >= 3, "the newest commit of two ranks"
    (alone,) = (line["committed"] for line in seen if line["world"] == 1 and "committed" in line)
    (tmp_path / "hold").unlink()
    assert left.wait(DEADLINE).returncode == 0, left.output()[-3000:]
    assert "was written by 2 rank(s), this job has 1" in left.output()
    before = len(told(tmp_path, "told"))
    jobs = agents(1)
    for job in jobs:
        assert job.wait(DEADLINE).returncode == 0, job.output()[-3000:]
    after = told(tmp_path, "told")[before:]
    check_samples(told(tmp_path, "told"))
    starts = {line["start"] for line in after if "start" in line}
    assert len(starts) == 1 and min(starts) >= alone, "the newest commit of one rank"
    assert len([line for line in after if "end" in line]) == 2
    for line in (line for line in after if "end" in line):
        assert line["threads"] == line["in_attach"] == ["MainThread"], "the job's process groups are the job's"


def test_a_node_with_an_empty_disk_joins(warm: Warm, tmp_path: Path) -> None:
    """An agent on a node, with a directory there; then that one and another, on a node of its own."""
    job = agent(warm, free_port(), tmp_path / "disk-0", tmp_path, 0, 0)
    assert job.wait(DEADLINE).returncode == 0, job.output()[-3000:]
    (alone,) = (line["end"] for line in told(tmp_path, "told") if "end" in line)
    port = free_port()
    jobs = [agent(warm, port, tmp_path / f"disk-{node}", tmp_path, alone + 5, node) for node in range(2)]
    for job in jobs:
        assert job.wait(DEADLINE).returncode == 0, job.output()[-3000:]
    seen = told(tmp_path, "told")
    assert [line["start"] for line in seen if line["world"] == 2 and "start" in line] == [alone, alone]
    check_samples(seen)
    for disk in (tmp_path / "disk-0", tmp_path / "disk-1"):
        assert list(disk.glob("step_*/rank_*")), "each rank writes to the disk of its node"


def check_samples(lines: list[dict[str, Any]]) -> None:
    """What training has seen, steps that a restart took back not counted: the epoch's order up to there, each once."""
    starts = [(place, line["start"], line["world"]) for place, line in enumerate(lines) if "start" in line]
    sessions = sorted({(start, world) for _, start, world in starts})
    ends = [start for start, _ in sessions[1:]] + [max(line["end"] for line in lines if "end" in line)]
    samples: list[int] = []
    for (start, world), end in zip(sessions, ends, strict=True):
        pids = {lines[place]["pid"] for place, its, of in starts if (its, of) == (start, world)}
        mine = [line for line in lines if line["pid"] in pids and start <= line.get("step", -1) < end]
        assert len(mine) == world * (end - start), "each rank made each of these steps once"
        samples += [sample for line in mine for sample in line["samples"]]
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3)).tolist()
    assert sorted(samples) == sorted(order[: len(samples)])
    assert len({world for _, world in sessions}) == 2, "and the number of ranks changed within the epoch"


def hosts(job: WarmJob, port: int) -> bool:
    """Whether this agent's process listens for the rendezvous; either may also have the store of its ranks."""
    inodes = set()
    for link in Path(f"/proc/{job.pid}/fd").iterdir():
        try:
            inodes.add(str(link.readlink()))
        except OSError:
            continue
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    here = [fields for fields in listening if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
    return any(f"socket:[{fields[9]}]" in inodes for fields in here)
