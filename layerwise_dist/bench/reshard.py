# SPDX-License-Identifier: Apache-2.0
"""`bench restore --reshard A:B`: what A ranks saved under FSDP2 into B ranks, against the same cut and `dcp.load`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise_dist.bench import machine
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.launching import launch
from layerwise_dist.bench.model import Shape
from layerwise_dist.bench.progress import Bar, bar
from layerwise_dist.bench.reshard_worker import WAYS
from layerwise_dist.bench.workplace import workplace
from layerwise_dist.units import size


@dataclass(frozen=True, slots=True)
class ReshardBench:
    """From `saved` ranks to `ranks`."""

    shape: Shape
    rounds: int
    saved: int
    ranks: int


def run(bench: ReshardBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError and BenchFailed."""
    state = 12 * bench.shape.parameters
    most = max(bench.saved, bench.ranks)
    space = workplace(directory, disk_bytes=4 * state + (64 << 20), memory_bytes=4 * state + most * (1 << 30))
    with space as folder, bar(2 + (bench.rounds + 1) * len(WAYS)) as progress:
        about = machine.describe(str(folder))
        for ranks in dict.fromkeys((bench.saved, bench.ranks)):
            progress.now(f"{ranks} ranks save")
            _launch(bench, "save", ranks, folder, progress)
            progress.advance()
        said = _launch(bench, "load", bench.ranks, folder, progress)
    return _findings(bench, command, about, said)


def _launch(bench: ReshardBench, do: str, ranks: int, folder: Path, progress: Bar) -> list[dict[str, Any]]:
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    spec = {"do": do, "shape": asdict(bench.shape), "rounds": bench.rounds, "saved": bench.saved, "folder": str(folder)}
    said: list[dict[str, Any]] = []

    def take(what: dict[str, Any]) -> None:
        said.append(what)
        progress.advance()

    launch(
        "reshard_worker", spec, folder, what=f"{ranks} ranks that {do}", ranks=ranks,
        environment={"OMP_NUM_THREADS": str(threads)}, heard=take,
    )  # fmt: skip
    return said


def _findings(bench: ReshardBench, command: str, about: dict[str, Any], said: list[dict[str, Any]]) -> Findings:
    titles = {
        "same": f"restore(), {bench.ranks} ranks → {bench.ranks}",
        "reshard": f"restore(), {bench.saved} ranks → {bench.ranks}",
        "dcp-load": f"dcp.load, {bench.saved} ranks → {bench.ranks}",
    }
    seconds = {way: [each["seconds"] for each in said if each["way"] == way and each["round"] > 0] for way in WAYS}
    chart = Chart("Restore into another cut, from a cold disk", ["", "seconds", "÷ the same cut", "÷ dcp.load"], 1)
    rows = []
    for way, title in titles.items():
        to_same, to_dcp = (
            Spread.of([a / b for a, b in zip(seconds[way], seconds[other], strict=True)])
            for other in ("same", "dcp-load")
        )
        took = Spread.of(seconds[way])
        rows.append({
            "way": way, "title": title, "seconds": took.data(), "ratio_to_same_cut": to_same.data(),
            "ratio_to_dcp_load": to_dcp.data(),
        })  # fmt: skip
        chart.rows.append([title, took.text(1, 3), to_same.text(), to_dcp.text()])
    notes = [
        f"{bench.shape.parameters / 1e6:.1f}M parameters with AdamW's state ({size(12 * bench.shape.parameters)}), "
        f"FSDP2; {bench.rounds} rounds, one more before them is not counted. Median (least–greatest); ratios of "
        "seconds, those of the slowest rank.",
        "Before each load its files are taken out of the page cache, and mincore says that they are. Only restore() "
        "verifies hashes.",
    ]
    data = {"results": rows, "rounds": bench.rounds, "saved_ranks": bench.saved, "ranks": bench.ranks,
            "parameters": bench.shape.parameters}  # fmt: skip
    return Findings(command, about, data, [chart], notes)
