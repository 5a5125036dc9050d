# SPDX-License-Identifier: Apache-2.0
"""A rank, or rank 0 with its coordinator, fails at any stage of an attempt: what the others do, and what is on disk.

Real processes and connections, without models (tests/jobs/failing.py). A sample by default, the whole table with
--long.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kit.runners import Warm, told

from layerwise_dist._native import PosixEnv
from layerwise_dist.bench.light import shard_bytes
from layerwise_dist.commit.metadata import CheckpointMetadataManager

RANKS, TIMEOUT, ATTEMPT, TOTAL = 3, 1.5, 3, 6
AT_ONCE = 3  # cases
SHARD = ("open", "write", "rename", "flush", "report", "after")
MANIFEST = ("manifest_write", "manifest_rename", "manifest_flush", "retire")
BEFORE_REPORT = SHARD[:-1]


class Case(NamedTuple):
    kind: str
    rank: int
    stage: str
    on_failure: str = "raise"

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.rank}-{self.stage}-{self.on_failure}"


def table() -> list[Case]:
    cases = [Case(*case) for case in itertools.product(("kill", "stop", "cut"), (0, 2), SHARD)]
    cases += [Case(*case) for case in itertools.product(("slow", "late"), (0, 2), SHARD[1:5], ("raise", "warn"))]
    cases += [Case(*case) for case in itertools.product(("full",), (0, 2), SHARD[:4], ("raise", "warn"))]
    cases += [Case(*case) for case in itertools.product(("kill", "stop", "slow", "cut"), (0,), MANIFEST)]
    cases += [Case(*case) for case in itertools.product(("full",), (0,), MANIFEST[:2], ("raise", "warn"))]
    cases += [Case(*case) for case in itertools.product(("broken",), (0,), MANIFEST, ("raise", "warn"))]
    return [case for case in cases if not (case.kind == "cut" and case.rank == 0)]  # it has its coordinator within


SAMPLE = [
    Case("kill", 2, "write"), Case("kill", 2, "after"), Case("kill", 0, "manifest_rename"), Case("stop", 2, "flush"),
    Case("stop", 0, "manifest_write"), Case("cut", 2, "rename"), Case("late", 2, "flush", "warn"),
    Case("full", 2, "write", "warn"), Case("full", 0, "manifest_write", "raise"),
    Case("broken", 0, "manifest_flush", "warn"),
]  # fmt: skip


def spec(out: Path, **more: Any) -> str:
    base = {
        "dir": str(out / "ckpt"),
        "out": str(out),
        "ranks": RANKS,
        "total": TOTAL,
        "timeout": TIMEOUT,
        "on_failure": "raise",
    }
    return json.dumps({**base, **more})


def ended(out: Path, rank: int) -> bool:
    return any("end" in line or "left" in line for line in told(out, rank))


def pids(out: Path) -> dict[int, int]:
    return {rank: next((line["pid"] for line in told(out, rank) if "pid" in line), 0) for rank in range(RANKS)}


def check_disk(root: Path) -> int:
    """Every manifest's shards are whole. The newest step."""
    manager = CheckpointMetadataManager(PosixEnv(), str(root))
    inventory = manager.inventory()
    assert not inventory.damaged
    for manifest in inventory.manifests.values():
        for rank in range(RANKS):
            assert Path(manager.shard_path(manifest, rank)).read_bytes() == shard_bytes(manifest.attempt_id, rank)
    lineage = inventory.lineage()
    return lineage[0].step if lineage else 0


def run(case: Case, out: Path, warm: Warm) -> None:
    out.mkdir()
    job = warm.start(
        "failing.py",
        0,
        spec(out, rank=case.rank, stage=case.stage, kind=case.kind, attempt=ATTEMPT, on_failure=case.on_failure),
    )
    others = [rank for rank in range(RANKS) if rank != case.rank or case.kind not in ("kill", "stop")]
    deadline = time.monotonic() + 30
    while not all(ended(out, rank) for rank in others):
        assert time.monotonic() < deadline, (
            f"{case}: {[told(out, rank)[-3:] for rank in range(RANKS)]}\n{job.output()[-3000:]}"
        )
        time.sleep(0.01)
    job.kill()
    try:
        judge(case, out, others)
        newest = check_disk(out / "ckpt")
        committed = max(
            (line["committed"] for rank in range(RANKS) for line in told(out, rank) if "committed" in line), default=0
        )
        assert newest >= committed >= ATTEMPT - 1, f"step {committed} was committed, {newest} is there"
        again = warm.start("failing.py", 0, spec(out, total=2)).wait(30)
        assert again.returncode == 0, again.output[-3000:]
        for rank in range(RANKS):
            assert [line["start"] for line in told(out, rank) if "start" in line][-1] == newest
            assert told(out, rank)[-1] == {"end": 2}
        assert check_disk(out / "ckpt") == newest + 2
    except AssertionError as error:
        raise AssertionError(
            f"{case}: {error}\n{[told(out, rank) for rank in range(RANKS)]}\n{job.output()[-2000:]}"
        ) from error


def judge(case: Case, out: Path, others: list[int]) -> None:
    """What the ranks that can still act did: gone on to the end, or raised together and in time."""
    lines = {rank: told(out, rank) for rank in others}
    raised = {rank: next((line for line in lines[rank] if "raised" in line), None) for rank in others}
    aborted = {rank: [line["aborted"] for line in lines[rank] if "aborted" in line] for rank in others}
    goes_on = case.kind == "slow" or (case.kind, case.stage) in (("broken", "retire"), ("cut", "retire"))
    goes_on |= case.kind in ("late", "full", "broken") and case.on_failure == "warn" and case.stage != "manifest_flush"
    if goes_on:
        assert not any(raised.values()) and all({"end": TOTAL} in lines[rank] for rank in others)
        wanted = [] if case.kind == "slow" or case.stage == "retire" else [ATTEMPT]
        if case.kind != "late":  # how many are late after a late one is not said
            assert all(aborted[rank] == wanted for rank in others)
        else:
            assert all(ATTEMPT in aborted[rank] for rank in others)
        return
    assert all(raised.values()), "somebody went on as if nothing had happened"
    slowest = max(line["seconds"] for line in raised.values() if line is not None)
    assert slowest < 4 * TIMEOUT + 1, f"it took {slowest} s"
    if case.kind in ("kill", "cut") and case.stage in SHARD:
        assert slowest < TIMEOUT, "a rank that is gone is noticed without any deadline"
    told_to = {
        line["raised"] for line in raised.values() if line is not None and "stopped on all ranks" in line["error"]
    }
    assert len(told_to) <= 1, "ranks stop at one boundary"
    for rank, line in raised.items():
        assert line is not None
        if case.kind == "stop":
            assert "DeadlineError" in line["error"] or "waited" in line["error"], line
        elif case.rank == 0 and case.kind == "kill" or (case.kind == "cut" and rank == case.rank):
            assert "the connection to rank 0 is gone" in line["error"], line
        elif case.kind in ("kill", "cut"):
            assert f"rank {case.rank} is gone" in line["error"], line
    for rank in others:
        assert next(line["left"] for line in lines[rank] if "left" in line) < 6 * TIMEOUT + 3


def test_whatever_fails_at_whatever_stage_the_others_go_on_or_stop_in_time(
    warm: Warm, tmp_path: Path, long: bool
) -> None:
    """Some at a time: they wait for deadlines more than they compute."""
    cases = table() if long else SAMPLE
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda case: run(case, tmp_path / case.id, warm), cases):
            pass


@pytest.fixture
def far_place() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """A network namespace with a cable to this one: (its name, this end's address, what cuts the cable)."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and iproute2")
    name, here, there = f"lw{os.getpid()}", f"lwa{os.getpid() % 100000}", f"lwb{os.getpid() % 100000}"

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, timeout=20, capture_output=True)

    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there)
        ip("link", "set", there, "netns", name)
        ip("addr", "add", "10.213.77.1/24", "dev", here)
        ip("link", "set", here, "up")
        ip("netns", "exec", name, "ip", "addr", "add", "10.213.77.2/24", "dev", there)
        ip("netns", "exec", name, "ip", "link", "set", there, "up")
        ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
        yield name, "10.213.77.1", lambda: ip("link", "set", here, "down")
    finally:
        ip("link", "del", here, check=False)
        ip("netns", "del", name, check=False)


def test_a_machine_that_vanishes_without_a_word_is_noticed(
    warm: Warm, tmp_path: Path, far_place: tuple[str, str, Callable[[], None]]
) -> None:
    """Rank 2 is on another network, whose cable is cut: no reset, no end, just nothing any more."""
    name, address, cut = far_place
    more = {"namespace": name, "total": 10_000, "timeout": 30.0, "silence": 3}
    job = warm.start("failing.py", 0, spec(tmp_path, **more), env={"MASTER_ADDR": address})
    deadline = time.monotonic() + 40
    while not all(sum("committed" in line for line in told(tmp_path, rank)) >= 3 for rank in range(RANKS)):
        assert time.monotonic() < deadline and job.poll() is None, job.output()[-3000:]
        time.sleep(0.02)
    cut()
    began = time.monotonic()
    while not all(any("raised" in line for line in told(tmp_path, rank)) for rank in range(RANKS)):
        assert time.monotonic() < began + 20, f"{[told(tmp_path, rank)[-2:] for rank in range(RANKS)]}"
        time.sleep(0.02)
    job.kill()
    errors = [next(line["error"] for line in told(tmp_path, rank) if "raised" in line) for rank in range(RANKS)]
    assert all("rank 2 is gone" in error for error in errors[:2]) and "the connection to rank 0 is gone" in errors[2]
    check_disk(tmp_path / "ckpt")
