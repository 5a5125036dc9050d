# SPDX-License-Identifier: Apache-2.0
"""`bench goodput`: what is left of training that is killed again and again, under this engine and under others.

A job under torchrun (goodput_worker.py) trains by the clock. At the moments of a trace all of its ranks get SIGKILL,
and torchrun starts them again. Every contender gets the same trace.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise_dist.bench import machine
from layerwise_dist.bench.contenders import BY_COST, CONTENDERS
from layerwise_dist.bench.failure import unknown
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.kill_trace import KillTrace
from layerwise_dist.bench.killing import Killed, run_and_kill
from layerwise_dist.bench.launching import launch
from layerwise_dist.bench.lives import Parts, parts_of
from layerwise_dist.bench.model import Shape
from layerwise_dist.bench.progress import Bar, bar
from layerwise_dist.bench.workplace import CHECKPOINTS_AT_ONCE, workplace
from layerwise_dist.interval import optimum_s
from layerwise_dist.units import size

_ENOUGH = 8  # kills; with fewer a share says little


@dataclass(frozen=True, slots=True)
class GoodputBench:
    """The job is watched for `trace.seconds`; with `quick`, until some steps after the last kill."""

    shape: Shape
    ranks: int
    trace: KillTrace
    rounds: int
    contenders: Sequence[str]
    quick: bool


@dataclass(slots=True)
class _Run:
    """One contender in one round."""

    parts: Parts
    killed: Killed
    every: int


def run(bench: GoodputBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError, ValueError for an unknown contender, and BenchFailed if a job ends by itself."""
    for name in bench.contenders:
        if name not in CONTENDERS:
            raise unknown("contender", name, CONTENDERS)
    state = 12 * bench.shape.parameters
    space = workplace(
        directory, disk_bytes=CHECKPOINTS_AT_ONCE * state + (64 << 20),
        memory_bytes=5 * state + bench.ranks * (1 << 30),
    )  # fmt: skip
    steps: list[float] = []
    firsts: list[float] = []
    costs: dict[str, list[float]] = {name: [] for name in bench.contenders if name in BY_COST}
    runs: dict[str, list[_Run]] = {name: [] for name in bench.contenders}
    with space as folder, bar(bench.rounds * (1 + len(bench.contenders))) as progress:
        about = machine.describe(str(folder))
        for number in range(bench.rounds):
            progress.now(f"round {number + 1}, costs")
            found = _costs(bench, folder)
            progress.advance()
            steps.append(found["step_s"])
            firsts.append(found["first_s"])
            every = {name: interval(cost, bench.trace.mtbf_s, found["step_s"]) for name, cost in found["costs"].items()}
            for name, cost in found["costs"].items():
                costs[name].append(cost)
            for name in bench.contenders:
                at = f"round {number + 1}, {CONTENDERS[name].title}"
                killed = _trained(bench, name, every, folder, _shown(progress, at, len(bench.trace.moments)))
                parts = parts_of(killed.lives, found["step_s"], found["first_s"])
                runs[name].append(_Run(parts, killed, killed.every or every.get(name, 1)))
                progress.advance()
    return _findings(bench, command, about, steps, firsts, costs, runs)


def interval(cost_s: float, mtbf_s: float, step_s: float) -> int:
    """Steps between checkpoints, by Daly's rule (`interval.optimum_s`)."""
    return max(1, round(optimum_s(cost_s, mtbf_s) / step_s))


def _shown(progress: Bar, at: str, kills: int) -> Callable[[int, int], None]:
    return lambda step, done: progress.now(f"{at}: step {step}, {done} of {kills} kills")


def _spec(bench: GoodputBench, do: str, place: Path, every: dict[str, int]) -> tuple[dict[str, Any], dict[str, str]]:
    """For the worker, and its environment."""
    threads = max(1, len(os.sched_getaffinity(0)) // bench.ranks)
    folder = place / "checkpoints"
    folder.mkdir(parents=True)
    spec = {
        "do": do, "shape": asdict(bench.shape), "folder": str(folder), "threads": threads, "every": every,
        "mtbf_s": bench.trace.mtbf_s, "contenders": list(bench.contenders),
        "calibrate_every": 2 if bench.quick else 10, "calibrate_checkpoints": 1 if bench.quick else 3,
    }  # fmt: skip
    # torchrun keeps a directory of its own, which it leaves behind when it is killed. Its ranks must not find the
    # addresses of those that were killed, which its store keeps over a restart.
    own = {"TMPDIR": str(place), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return spec, {"OMP_NUM_THREADS": str(threads), **own}


def _costs(bench: GoodputBench, folder: Path) -> dict[str, Any]:
    told: list[dict[str, Any]] = []
    place = folder / "costs"
    spec, environment = _spec(bench, "costs", place, {})
    launch(
        "goodput_worker", spec, place, what="measuring costs", ranks=bench.ranks, environment=environment,
        heard=told.append,
    )  # fmt: skip
    shutil.rmtree(place)
    return told[-1]


def _trained(
    bench: GoodputBench, name: str, every: dict[str, int], folder: Path, shown: Callable[[int, int], None]
) -> Killed:
    place = folder / "job"
    spec, environment = _spec(bench, name, place, every)
    killed = run_and_kill(
        "goodput_worker", spec, place, what=CONTENDERS[name].title, ranks=bench.ranks, environment=environment,
        trace=bench.trace, at_last_kill=bench.quick, shown=shown,
    )  # fmt: skip
    shutil.rmtree(place)
    return killed


# -- what was found ----------------------------------------------------------------------------------------------------

_SHARES = ("lost", "restart", "read", "overhead")


def _findings(
    bench: GoodputBench, command: str, about: dict[str, Any], steps: list[float], firsts: list[float],
    costs: dict[str, list[float]], runs: dict[str, list[_Run]],
) -> Findings:  # fmt: skip
    rows = [_row(name, runs[name]) for name in bench.contenders]
    chart = Chart(
        f"Goodput, {len(bench.trace.moments)} kills",
        ["", "every, steps", "goodput", "÷ what restarts leave", *_SHARES, "restart, s a kill", "read, s a kill"], 1,
    )  # fmt: skip
    chart.rows = [_cells(row) for row in rows]
    shape, trace = bench.shape, bench.trace
    least = min((one.killed.kills for found in runs.values() for one in found), default=0)
    notes = [
        f"GPT, {shape.parameters / 1e6:.1f}M parameters, state {size(12 * shape.parameters)}, {bench.ranks} ranks of "
        f"torchrun; without checkpoints a step takes {Spread.of(steps).text(1, 3)} s, and the first of a process "
        f"{Spread.of(firsts).text(1, 3)} s longer.",
        f"SIGKILL for all ranks at the same {len(trace.moments)} moments, one in {trace.mtbf_s:.1f} s in the mean, and "
        "torchrun starts them again. "
        + ("Each job goes on until some steps after the last." if bench.quick else f"Each job has {trace.seconds:g} s.")
        + f" {bench.rounds} rounds, median (least–greatest).",
        "goodput: useful steps a second over those of a training that nothing disturbs. The rest of the time is lost "
        "(trained in vain), restart (until new processes have built the model), read (until they have loaded), and "
        "overhead (longer steps). What restarts leave: 1 less restart, and less what first steps take longer without "
        "checkpoints too.",
        *(f"{CONTENDERS[name].title}: a checkpoint costs {Spread.of(found).text(1, 3)} s; the interval follows by "
          "Daly's rule." for name, found in costs.items()),
    ]  # fmt: skip
    if least < _ENOUGH:
        notes.append(f"Only {least} kills: shares of so few say little.")
    data = {
        "model": {**asdict(shape), "parameters": shape.parameters}, "ranks": bench.ranks, "rounds": bench.rounds,
        "trace": {"moments_s": list(trace.moments), "mtbf_s": trace.mtbf_s, "seconds": trace.seconds},
        "step_s": Spread.of(steps).data(), "first_s": Spread.of(firsts).data(),
        "costs_s": {name: Spread.of(found).data() for name, found in costs.items()},
        "results": rows,
    }  # fmt: skip
    return Findings(command, about, data, [chart], notes)


def _row(name: str, runs: Sequence[_Run]) -> dict[str, Any]:
    def spread(figure: Callable[[_Run], float]) -> dict[str, float]:
        return Spread.of([figure(one) for one in runs]).data()

    return {
        "contender": name, "title": CONTENDERS[name].title, "every": [one.every for one in runs],
        "kills": [one.killed.kills for one in runs], "useful_steps": [one.parts.useful_steps for one in runs],
        "seconds": [one.parts.total_s for one in runs],
        "goodput": spread(lambda one: one.parts.goodput),
        "of_ceiling": spread(lambda one: one.parts.goodput / one.parts.ceiling),
        "lost": spread(lambda one: one.parts.lost_s / one.parts.total_s),
        "restart": spread(lambda one: one.parts.restart_s / one.parts.total_s),
        "read": spread(lambda one: one.parts.read_s / one.parts.total_s),
        "overhead": spread(lambda one: one.parts.overhead_s / one.parts.total_s),
        "restart_s": spread(lambda one: one.parts.restart_s / one.killed.kills),
        "read_s": spread(lambda one: one.parts.read_s / one.killed.kills),
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    def text(key: str, digits: int = 3) -> str:
        return Spread.read(row[key]).text(1, digits)

    low, high = min(row["every"]), max(row["every"])
    every = str(low) if low == high else f"{low}–{high}"
    return [row["title"], every, text("goodput"), text("of_ceiling"), *map(text, _SHARES), text("restart_s", 2),
            text("read_s", 2)]  # fmt: skip
