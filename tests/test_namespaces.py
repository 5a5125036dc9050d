# SPDX-License-Identifier: Apache-2.0
"""Nodes with networks and disks of their own: what happens when one is cut off, or dies, and the job is started again.

Each node is a network namespace with an address and a cable to a switch, a mount namespace in which the job's directory
is a disk of its own, and a host name. torchrun's agent runs on each, as on machines; or mpirun on the first, which
starts what it needs on the others.
"""

from __future__ import annotations

import random
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.clusters import TOTAL, Cluster, why_no_nodes
from kit.drawing import drawn
from kit.kill import check, check_folder, kill_rank, read, reference
from kit.mpi import command, needs_mpi, told, uninterrupted
from kit.runners import Running, Warm, WarmJob

GONE_S = 45.0
LAUNCHED_S = 120.0


@pytest.fixture(params=[2, 3])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if why := why_no_nodes():
        pytest.skip(why)
    nodes = Cluster(request.param)
    try:
        nodes.build()
    except subprocess.CalledProcessError as error:
        nodes.remove()
        pytest.skip(f"no network namespaces can be made here: {error.stderr.decode().strip()}")
    yield nodes
    nodes.remove()


def reached(out: Path, ranks: int, launch: int, step: int) -> bool:
    """Whether every rank has come to this step in this launch, or has ended."""
    last = [lines[-1] if lines else {} for lines in read(out, ranks)]
    begun = [any(line.get("launched") == str(launch) for line in lines) for lines in read(out, ranks)]
    return all(begun) and all("end" in line or line.get("step", -1) >= step for line in last)


def wait_for(what: Callable[[], bool], seconds: float, jobs: list[WarmJob], why: str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            told = "\n".join(f"--- node {node}\n{job.output()[-2500:]}" for node, job in enumerate(jobs))
            pytest.fail(f"{why}\n{told}")
        time.sleep(0.01)


def ranks_left(jobs: list[WarmJob]) -> list[int]:
    return [pid for job in jobs for pid in job.pids() if pid != job.pid]


def hurt(cluster: Cluster, jobs: list[WarmJob], kind: str, node: int, dice: random.Random) -> None:
    if kind == "node":
        jobs[node].kill()
    elif kind == "rank":
        kill_rank(cluster.folder, node, jobs[node].pids())
    else:
        cluster.cable(node, "down")
        if kind == "blink":
            time.sleep(dice.uniform(0.1, 2.0))
            cluster.cable(node, "up")


@pytest.mark.timeout(3600)
def test_nodes_that_die_or_are_cut_off_leave_one_step_on_all_and_nothing_hangs(
    cluster: Cluster, warm: Warm, tmp_path: Path, long: bool
) -> None:
    if cluster.count == 2 and not long:
        pytest.skip("--long")
    seed = drawn(range(1 << 32), __name__)
    dice = random.Random(seed)
    known = reference(warm, tmp_path / "reference", "fsdp2", cluster.count, TOTAL)
    kinds = ["cut", "node", "rank", "blink"]
    for number in range(16 if long else 1):
        kind = kinds[number % 4] if long else dice.choice(kinds)
        node, step = dice.randrange(cluster.count), dice.randrange(2, TOTAL - 5)
        case = f"seed {seed}, trial {number}: {kind} at node {node} from step {step}"
        cluster.use(tmp_path / f"trial-{number}")
        try:
            trial(cluster, warm, kind, node, step, dice, known)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def trial(cluster: Cluster, warm: Warm, kind: str, node: int, step: int, dice: random.Random, known: Any) -> None:
    ranks, out = cluster.count, cluster.folder
    losses, finals, _ = known
    jobs = cluster.torchrun(warm, 0)
    wait_for(lambda: reached(out, ranks, 0, step), LAUNCHED_S, jobs, "it was not reached")
    hurt(cluster, jobs, kind, node, dice)
    # A job whose cable was only out for a moment goes on, and ends as well.
    wait_for(lambda: not ranks_left(jobs), GONE_S, jobs, f"ranks were there after {GONE_S} s")
    for job in jobs:
        job.kill()
    cluster.cable(node, "up")
    again = cluster.torchrun(warm, 1)
    wait_for(lambda: all(job.poll() is not None for job in again), LAUNCHED_S, again, "the restart does not end")
    assert [job.poll() for job in again] == [0] * ranks, again[0].output()[-4000:]
    check(out, ranks, losses, finals, TOTAL)
    for disk in range(ranks):
        check_folder(cluster.disk(disk), [disk], TOTAL)


@needs_mpi
@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_job_of_mpirun_on_two_nodes_loses_a_rank_and_resumes_bit_for_bit(
    cluster: Cluster, start: Callable[..., Running], tmp_path: Path
) -> None:
    cluster.use(tmp_path / "job")
    agent = tmp_path / "agent"  # what mpirun calls in place of ssh: HOST COMMAND...
    there = cluster.inside(1, ["sh", "-c", '"$0"'])
    agent.write_text("#!/bin/sh\nshift\n" + shlex.join(there[:-1]) + ' "$*"\n')
    agent.chmod(0o700)
    hosts = ["--host", f"{cluster.address(0)},{cluster.address(1)}", "--mca", "plm_rsh_agent", str(agent)]
    names = ["--mca", "oob_tcp_if_include", "net0", "--mca", "btl_tcp_if_include", "net0", "--mca", "btl", "self,tcp"]

    def run(die_at: int) -> Running:
        job = command(2, "train", cluster.root, cluster.folder, 9, die_at)
        return start(cluster.inside(0, [job[0], *hosts, *names, *job[1:]]))

    began = time.monotonic()
    assert run(4).wait(90).returncode != 0, "mpirun says that a rank died"
    assert time.monotonic() - began < 60
    finished = run(-1).wait(90)
    assert finished.returncode == 0, finished.output[-4000:]
    found = told(cluster.folder, 2)
    assert [each["start"] for each in found] == [4, 4]
    assert [each["hash"] for each in found] == [uninterrupted(rank, 9) for rank in range(2)]
    for node in range(2):
        shards = [path.name for path in cluster.disk(node).glob("step_*/rank_*")]
        assert set(shards) == {f"rank_{node:05d}.safetensors"}, "each node has its own rank's shards"
