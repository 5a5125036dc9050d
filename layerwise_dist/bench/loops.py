# SPDX-License-Identifier: Apache-2.0
"""`bench loops`: what checkpoints cost in the loops of other packages, beside `attach()` in a loop of one's own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise_dist.bench import machine
from layerwise_dist.bench.failure import unknown
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.launching import launch
from layerwise_dist.bench.loops_worker import LOOPS, WAYS
from layerwise_dist.bench.model import Shape
from layerwise_dist.bench.progress import Bar, bar
from layerwise_dist.bench.workplace import workplace

_TITLES = {"transformers": "Hugging Face's Trainer", "accelerate": "Accelerate", "lightning": "Lightning"}


@dataclass(frozen=True, slots=True)
class LoopsBench:
    """`loops`: which of `LOOPS`. A block is `steps` measured steps, with a checkpoint each where there are any."""

    shape: Shape
    loops: list[str]
    steps: int
    rounds: int


def installed(loops: Sequence[str]) -> list[str]:
    """Those whose package is there. Raises ValueError for one that is none of `LOOPS`, and where none is there."""
    for loop in loops:
        if loop not in LOOPS:
            raise unknown("loop", loop, LOOPS)
    found = [loop for loop in loops if importlib.util.find_spec(loop)]
    if not found:
        raise ValueError(f"none of {', '.join(loops)} is installed")
    return found


def run(bench: LoopsBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError and BenchFailed."""
    state = 12 * bench.shape.parameters
    space = workplace(directory, disk_bytes=6 * state + (64 << 20), memory_bytes=4 * state + (2 << 30))
    with space as folder, bar(len(bench.loops) * (bench.rounds + 1) * len(WAYS)) as progress:
        about = machine.describe(str(folder))
        said = {loop: _launch(bench, loop, folder, progress) for loop in bench.loops}
    return _findings(bench, command, about, said)


def _launch(bench: LoopsBench, loop: str, folder: Path, progress: Bar) -> list[dict[str, Any]]:
    progress.now(_TITLES[loop])
    spec = {
        "loop": loop, "shape": asdict(bench.shape), "folder": str(folder), "rounds": bench.rounds, "steps": bench.steps,
    }  # fmt: skip
    said: list[dict[str, Any]] = []

    def take(what: dict[str, Any]) -> None:
        said.append(what)
        progress.advance()

    threads = str(len(os.sched_getaffinity(0)))
    launch(
        "loops_worker", spec, folder, what=f"{_TITLES[loop]}'s training", ranks=None,
        environment={"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"}, heard=take,
    )  # fmt: skip
    return said


def _findings(
    bench: LoopsBench, command: str, about: dict[str, Any], said: dict[str, list[dict[str, Any]]]
) -> Findings:
    columns = ["", "step alone, ms", "with it ÷ alone", "own loop: with attach() ÷ alone", "integration ÷ by hand"]
    chart, rows = Chart("A checkpoint every step, in each loop", columns, 1), []
    for loop, heard in said.items():
        seconds = {way: [each["seconds"] for each in heard if each["way"] == way and each["round"] > 0] for way in WAYS}
        theirs = [a / b for a, b in zip(seconds["integration"], seconds["loop"], strict=True)]
        ours = [a / b for a, b in zip(seconds["by-hand"], seconds["own"], strict=True)]
        both = [a / b for a, b in zip(theirs, ours, strict=True)]
        spreads = {way: Spread.of(seconds[way]) for way in WAYS}
        rows.append({
            "loop": loop, "seconds": {way: spreads[way].data() for way in WAYS},
            "integration_to_alone": Spread.of(theirs).data(), "by_hand_to_alone": Spread.of(ours).data(),
            "integration_to_by_hand": Spread.of(both).data(),
        })  # fmt: skip
        chart.rows.append([
            _TITLES[loop], spreads["loop"].text(1e3, 1), Spread.of(theirs).text(), Spread.of(ours).text(),
            Spread.of(both).text(),
        ])  # fmt: skip
    notes = [
        f"{bench.shape.parameters / 1e6:.1f}M parameters with AdamW's state, one process; {bench.rounds} rounds of "
        f"{bench.steps} steps a way, one more before them is not counted. Median (least–greatest) of the rounds.",
        "In each round the own loop alone, the same with attach(), the package's loop alone, and the same with the "
        "integration; the last column is the ratio of the two ratios.",
    ]
    data = {
        "results": rows, "rounds": bench.rounds, "steps": bench.steps, "parameters": bench.shape.parameters,
    }  # fmt: skip
    return Findings(command, about, data, [chart], notes)
