# SPDX-License-Identifier: Apache-2.0
"""`bench restore --ranks 1,2,8`: what attach() and restore() take beside the reading itself, under FSDP2."""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict, dataclass
from typing import Any

from layerwise_dist.bench import machine
from layerwise_dist.bench.figures import Chart, Findings
from layerwise_dist.bench.launching import launch
from layerwise_dist.bench.model import Shape
from layerwise_dist.bench.progress import bar
from layerwise_dist.bench.restoring import BESIDE, beside
from layerwise_dist.bench.workplace import workplace
from layerwise_dist.units import size

_PARTS = ("attach_s", "restore_s", "raw_s")


@dataclass(frozen=True, slots=True)
class StartsBench:
    """`depth` reads of `block_bytes` are in flight on each rank."""

    shape: Shape
    rounds: int
    ranks: tuple[int, ...]
    depth: int
    block_bytes: int


def run(bench: StartsBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError and BenchFailed."""
    state, most = 12 * bench.shape.parameters, max(bench.ranks)
    space = workplace(
        directory, disk_bytes=2 * len(bench.ranks) * state + (64 << 20), memory_bytes=4 * state + most * (1 << 30)
    )
    found: dict[tuple[int, bool], list[dict[str, float]]] = {}  # by ranks, and whether their processes are new
    with space as folder, bar(len(bench.ranks) * (2 * bench.rounds + 1)) as progress:
        about = machine.describe(str(folder))
        for ranks, new in itertools.product(bench.ranks, (False, True)):
            progress.now(f"ranks: {_who(ranks, new)}")
            spec = {
                "do": "start", "new": new, "shape": asdict(bench.shape), "rounds": 1 if new else bench.rounds + 1,
                "folder": str(folder), "depth": bench.depth, "block_bytes": bench.block_bytes,
            }  # fmt: skip
            said: list[dict[str, float]] = []

            def take(what: dict[str, float], said: list[dict[str, float]] = said) -> None:
                said.append(what)
                progress.advance()

            threads = max(1, len(os.sched_getaffinity(0)) // ranks)
            for _ in range(bench.rounds if new else 1):
                launch(
                    "reshard_worker", spec, folder, what=f"{ranks} ranks that start", ranks=ranks,
                    environment={"OMP_NUM_THREADS": str(threads)}, heard=take,
                )  # fmt: skip
            found[ranks, new] = said if new else said[1:]
    return _findings(bench, command, about, found)


def _who(ranks: int, new: bool) -> str:
    return f"{ranks}, new processes" if new else str(ranks)


def _findings(
    bench: StartsBench, command: str, about: dict[str, Any], found: dict[tuple[int, bool], list[dict[str, float]]]
) -> Findings:
    chart = Chart("attach() and restore() beside the reading, from a cold disk", ["ranks", *BESIDE], 0)
    rows = []
    for (ranks, new), rounds in found.items():
        parts = beside(**{part: [each[part] for each in rounds] for part in _PARTS})
        rows.append({"ranks": ranks, "new_processes": new, **{part: spread.data() for part, spread in parts.items()}})
        chart.rows.append([_who(ranks, new), *(spread.text(1, 3) for spread in parts.values())])
    notes = [
        f"{bench.shape.parameters / 1e6:.1f}M parameters with AdamW's state ({size(12 * bench.shape.parameters)}), "
        f"sharded by FSDP2 where there are several ranks; {bench.rounds} rounds, one more before them is not counted. "
        "Seconds of the slowest rank, median (least–greatest).",
        "The first rows: a job that did all this before. New processes, as after a failure: each round is a job of its "
        "own, which imports what it needs, and whose optimizer has no state yet.",
        f"raw: each rank reads its own shard, all at once, {size(bench.block_bytes, binary=True)} at a time on "
        f"{bench.depth} threads, by direct reads and with the kernel's read-ahead; the faster counts. The rest: "
        "attach() and restore() together, less raw.",
        "Before each load and each raw read the files are taken out of the page cache, and mincore says that they are.",
    ]
    data = {"starts": rows, "rounds": bench.rounds, "depth": bench.depth, "block_bytes": bench.block_bytes,
            "parameters": bench.shape.parameters}  # fmt: skip
    return Findings(command, about, data, [chart], notes)
