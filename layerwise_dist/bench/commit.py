# SPDX-License-Identifier: Apache-2.0
"""`bench commit`: what commits cost as the number of ranks grows.

Simulated: rank 0 is one process, as it is in a job (connections, coordinator, manifests, retention); all other ranks
are one more process, which keeps their connections and says what they would say. Real: a process for each rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise_dist.bench import machine
from layerwise_dist.bench.failure import BenchFailed
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.progress import bar
from layerwise_dist.bench.workplace import workplace
from layerwise_dist.percentiles import percentile
from layerwise_dist.supervision.processes import running

_WORKER = "layerwise_dist.bench.commit_worker"


@dataclass(frozen=True, slots=True)
class CommitBench:
    """`ranks` are simulated, `processes` real ranks of a job; `on_node` of them share a node; `commits` a round."""

    ranks: list[int]
    processes: list[int]
    on_node: int
    commits: int
    rounds: int


def run(bench: CommitBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError, and BenchFailed with what a process said last."""
    largest = max([*bench.ranks, *bench.processes])
    space = workplace(directory, disk_bytes=(64 << 20) + 4096 * largest, memory_bytes=(1 << 29) + (20 << 10) * largest)
    with space as folder, bar(bench.rounds * (len(bench.ranks) + len(bench.processes))) as progress:
        about = machine.describe(str(folder))
        simulated: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in bench.ranks}
        real: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in bench.processes}
        for number in range(bench.rounds):
            for ranks, found in simulated.items():
                progress.now(f"{ranks} simulated ranks")
                found.append(_simulate(bench, ranks, folder / f"simulated-{ranks}-{number}"))
                progress.advance()
            for ranks, found in real.items():
                progress.now(f"{ranks} processes")
                found.append(_real(bench, ranks, folder / f"real-{ranks}-{number}"))
                progress.advance()
    return _findings(bench, command, about, simulated, real)


def _simulate(bench: CommitBench, ranks: int, folder: Path) -> dict[str, Any]:
    spec = {"ranks": ranks, "on_node": bench.on_node, "commits": bench.commits}
    with ExitStack() as stack:
        root = _Process(stack, "root", {**spec, "folder": str(folder / "checkpoints")}, folder)
        crowd = _Process(stack, "crowd", {**spec, **root.line()}, folder)
        return {**crowd.line(), **root.line()}


def _real(bench: CommitBench, ranks: int, folder: Path) -> dict[str, Any]:
    spec = {"ranks": ranks, "on_node": bench.on_node, "commits": bench.commits, "folder": str(folder / "checkpoints")}
    with ExitStack() as stack:
        return _Process(stack, "job", spec, folder).line()


class _Process:
    """One worker, and the JSON lines that it says."""

    def __init__(self, stack: ExitStack, role: str, spec: dict[str, Any], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._errors = folder / f"{role}.txt"
        command = [sys.executable, "-m", _WORKER, role, json.dumps(spec)]
        errors = stack.enter_context(open(self._errors, "wb"))
        self._job = stack.enter_context(running(command, errors, {"OMP_NUM_THREADS": "1"}))

    def line(self) -> dict[str, Any]:
        assert self._job.stdout is not None
        text = self._job.stdout.readline()
        if not text:
            code = self._job.wait()
            tail = self._errors.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise BenchFailed("\n".join([f"a process ended with exit code {code}:", *tail]))
        return json.loads(text)


_TRAFFIC = ("frames_in", "frames_out", "bytes_in", "bytes_out")


def _findings(
    bench: CommitBench, command: str, about: dict[str, Any], simulated: dict[int, list[dict[str, Any]]],
    real: dict[int, list[dict[str, Any]]],
) -> Findings:  # fmt: skip
    rows = [_simulated_row(bench, ranks, found) for ranks, found in simulated.items()]
    jobs = [_real_row(ranks, found) for ranks, found in real.items()]
    charts = [
        Chart(
            f"Simulated ranks, {bench.on_node} on a node",
            ["ranks", "connections", "rank 0's CPU, ms", "µs a rank", "of that: messages, ms", "coordinator, ms",
             "messages to rank 0", "KB in", "KB out", "to committed, ms"],
            1, [list(_simulated_cells(row)) for row in rows],
        ),
        Chart(
            f"Processes, {bench.on_node} on a pretended node",
            ["ranks", "to committed, ms", "p99, ms", "rank 0's CPU, ms"], 1,
            [[str(row["ranks"]), _text(row["committed_s"]), f"{1e3 * row['committed_p99_s']:.1f}", _text(row["cpu_s"])]
             for row in jobs],
        ),
    ]  # fmt: skip
    notes = [
        f"for one commit, the mean of {bench.commits} in a row, each begun when the last was committed; "
        "median (least to greatest) of the rounds",
        "simulated: from the first `staged` to the last node that heard `committed`; the other ranks' process takes "
        "about as much CPU as rank 0, so with few cores the time says more of that than of rank 0",
        "processes: from the boundary until rank 0 knows of the commit, the shard's flushes included; one 60 byte "
        "file a rank",
    ]
    data = {"on_node": bench.on_node, "commits": bench.commits, "simulated": rows, "processes": jobs}
    return Findings(command, about, data, [chart for chart in charts if chart.rows], notes)


def _simulated_row(bench: CommitBench, ranks: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return Spread.of(values).data()

    near = min(bench.on_node, ranks) - 1
    return {
        "ranks": ranks,
        "connections": near + max(0, -(-(ranks - bench.on_node) // bench.on_node)),
        "cpu_s": spread([one["all"] for one in found]),
        "messages_cpu_s": spread([one["layerwise-messages"] for one in found]),
        "coordinator_cpu_s": spread([one["layerwise-coordinator"] for one in found]),
        "committed_s": spread([sum(one["checkpoint_s"]) / len(one["checkpoint_s"]) for one in found]),
        "decided_s": spread([sum(one["decide_s"]) / len(one["decide_s"]) for one in found]),
        "messages_in": 2 * ranks,
        **{name: spread([one[name] for one in found]) for name in _TRAFFIC},
    }


def _simulated_cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['ranks']:,}"
    yield f"{row['connections']:,}"
    yield _text(row["cpu_s"])
    yield f"{1e6 * row['cpu_s']['median'] / row['ranks']:.0f}"
    yield _text(row["messages_cpu_s"])
    yield _text(row["coordinator_cpu_s"])
    yield f"{row['messages_in']:,}"
    yield f"{row['bytes_in']['median'] / 1e3:.0f}"
    yield f"{row['bytes_out']['median'] / 1e3:.0f}"
    yield _text(row["committed_s"])


def _real_row(ranks: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    every = [seconds for one in found for seconds in one["checkpoint_s"]]
    return {
        "ranks": ranks,
        "committed_s": Spread.of([sum(one["checkpoint_s"]) / len(one["checkpoint_s"]) for one in found]).data(),
        "committed_p99_s": percentile(every, 99),
        "cpu_s": Spread.of([one["all"] for one in found]).data(),
    }


def _text(seconds: dict[str, float]) -> str:
    return Spread.read(seconds).text(1e3, 1)
