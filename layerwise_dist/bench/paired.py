# SPDX-License-Identifier: Apache-2.0
"""`bench train --blocks`: what a checkpoint costs a step, to a hundredth, on a machine that changes by the minute.

Each way to train has a process of its own (paired_worker.py), and they take turns of a few steps, in an order that is
drawn anew for each block; the others rest meanwhile. A block gives a pair of step times, and so a ratio, that were
measured within seconds of each other; the median of many has an interval, by bootstrap.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from layerwise_dist.bench import machine, paired_worker
from layerwise_dist.bench.failure import BenchFailed, unknown
from layerwise_dist.bench.figures import Chart, Findings, Interval
from layerwise_dist.bench.launching import last_words, told_by
from layerwise_dist.bench.model import Shape
from layerwise_dist.bench.modes import MODES
from layerwise_dist.bench.progress import bar
from layerwise_dist.bench.workplace import CHECKPOINTS_AT_ONCE, workplace
from layerwise_dist.supervision.processes import running
from layerwise_dist.units import size

_PLAIN = "none"
_ELSEWHERE = ("layerwise-monitor", "torch-checkpointing")  # these write in another process, whose rest nobody sees


@dataclass(frozen=True, slots=True)
class PairedBench:
    """In each of `blocks`, every contender trains `steps` measured steps, rounded up to a multiple of `every`.

    `against`: the Python interpreter of another installation of this package, which trains in turn with this one; None
    for none.
    """

    shape: Shape
    optimizer: str
    every: int
    steps: int
    blocks: int
    modes: Sequence[str]
    quick: bool
    against: str | None = None


@dataclass(frozen=True, slots=True)
class _Contender:
    name: str
    title: str
    mode: str
    python: str | None  # None: this very installation


class _Process:
    """One contender's training."""

    def __init__(self, contender: _Contender, spec: Mapping[str, Any], folder: Path, stack: ExitStack) -> None:
        self._title = contender.title
        self._errors = folder / "errors.txt"
        folder.mkdir()
        if contender.python is None:
            command = [sys.executable, "-m", paired_worker.__name__]
        else:  # isolated: it finds its own package, and neither ours nor what lies beside the file
            command = [contender.python, "-I", paired_worker.__file__]
        told = {**spec, "mode": contender.mode, "folder": str(folder)}
        file = stack.enter_context(open(self._errors, "wb"))
        environment = {"OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._job = stack.enter_context(running([*command, json.dumps(told)], file, environment, asked=True))
        except OSError as error:
            raise BenchFailed(f"{command[0]} cannot be started: {error.strerror or error}") from error

    def ready(self) -> dict[str, Any]:
        """Waits until it trains at its usual speed."""
        return self._next()

    def turn(self) -> dict[str, Any]:
        self._say("turn\n")
        return self._next()

    def end(self) -> None:
        """Lets it commit what it has saved, and leave."""
        assert self._job.stdin is not None
        self._job.stdin.close()
        self._check(self._job.wait())

    def _say(self, word: str) -> None:
        assert self._job.stdin is not None
        try:
            self._job.stdin.write(word)
            self._job.stdin.flush()
        except BrokenPipeError:
            self._check(self._job.wait())

    def _next(self) -> dict[str, Any]:
        assert self._job.stdout is not None
        for line in self._job.stdout:
            if (said := told_by(line)) is not None:
                return dict(said)
        self._check(self._job.wait())
        raise BenchFailed(f"{self._title} ended early")

    def _check(self, code: int) -> None:
        if code != 0:
            raise BenchFailed("\n".join([f"{self._title} ended with exit code {code}:", *last_words(self._errors)]))


def run(bench: PairedBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError, ValueError for a mode that cannot be measured so, and BenchFailed if a training
    ends badly.
    """
    contenders = _contenders(bench)
    state = 12 * bench.shape.parameters
    space = workplace(
        directory,
        disk_bytes=(len(contenders) - 1) * CHECKPOINTS_AT_ONCE * state + (64 << 20),
        memory_bytes=len(contenders) * (2 * state + (1 << 30)),
    )
    threads = len(os.sched_getaffinity(0))
    spec = {
        "shape": asdict(bench.shape), "optimizer": bench.optimizer, "every": bench.every, "quick": bench.quick,
        "steps": -(-bench.steps // bench.every) * bench.every, "threads": threads,
    }  # fmt: skip
    with space as folder, bar(len(contenders) * (1 + bench.blocks)) as progress, ExitStack() as stack:
        about = machine.describe(str(folder))
        processes = {each.name: _Process(each, spec, folder / each.name, stack) for each in contenders}
        ready: dict[str, dict[str, Any]] = {}
        for name in reversed(processes):  # what cannot start is another installation, and is soon known
            progress.now(f"starting {name}")
            ready[name] = processes[name].ready()
            progress.advance()
        blocks: list[dict[str, dict[str, Any]]] = []
        for number in range(bench.blocks):
            block = {}
            for name in order_of(processes, number):
                progress.now(f"block {number + 1}, {name}")
                block[name] = processes[name].turn()
                progress.advance()
            blocks.append(block)
        for process in processes.values():
            process.end()
    return _findings(bench, command, about, contenders, ready, blocks)


def order_of(names: Sequence[str] | Mapping[str, Any], block: int) -> list[str]:
    """Who trains when in a block: drawn, and the same in each run."""
    order = list(names)
    random.Random(block).shuffle(order)
    return order


def _contenders(bench: PairedBench) -> list[_Contender]:
    """Raises ValueError."""
    found = [_Contender(_PLAIN, "no checkpoints", _PLAIN, None)]
    for mode in bench.modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if mode in _ELSEWHERE:
            raise ValueError(
                f"mode {mode!r} writes in another process, which may not be at rest while others train: measure it "
                "without --blocks"
            )
        found.append(_Contender(mode, MODES[mode].name, mode, None))
        if bench.against is not None:
            title = f"{MODES[mode].name}, the other installation"
            found.append(_Contender(f"{mode}-against", title, mode, bench.against))
    return found


class _Figures:
    """Of one contender, in each block."""

    def __init__(self, blocks: Sequence[Mapping[str, Mapping[str, Any]]], name: str) -> None:
        self.seconds, self.cpu, self.stall = (
            [block[name][key] for block in blocks] for key in ("seconds", "cpu", "stall")
        )
        turns = [block[name]["threads"] for block in blocks]
        self.threads = {thread: [turn.get(thread, 0.0) for turn in turns] for thread in sorted(set().union(*turns))}

    def row(self, other: _Figures) -> dict[str, Any]:
        """Beside another one, which was measured in the same blocks."""
        more = [1e3 * (a - b) for a, b in zip(self.cpu, other.cpu, strict=True)]
        return {
            "step_s": median(self.seconds), "cpu_s": median(self.cpu), "stall_ms": 1e3 * median(self.stall),
            "step_ratio": Interval.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)]).data(),
            "more_cpu_ms": Interval.of(more).data(),
            "threads_cpu_ms": {
                name: Interval.of([1e3 * each for each in used]).data() for name, used in self.threads.items()
            },
        }  # fmt: skip


def _findings(
    bench: PairedBench, command: str, about: dict[str, Any], contenders: Sequence[_Contender],
    ready: Mapping[str, dict[str, Any]], blocks: Sequence[dict[str, dict[str, Any]]],
) -> Findings:  # fmt: skip
    figures = {each.name: _Figures(blocks, each.name) for each in contenders}
    plain = figures[_PLAIN]
    columns = ["", "step, ms", "÷ plain", "CPU a step, ms", "beyond plain", "stall a step, ms"]
    chart = Chart(f"A checkpoint every {f'{bench.every} steps' if bench.every > 1 else 'step'}, in pairs", columns, 1)
    chart.rows.append(["no checkpoints", *_cells(plain.row(plain), pair=False)])
    charts = [chart]
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    for each in contenders[1:]:
        row: dict[str, Any] = {"mode": each.mode, "title": each.title, "against": each.python is not None}
        rows.append(row | figures[each.name].row(plain))
        chart.rows.append([each.title, *_cells(rows[-1], pair=True)])
    if bench.against is not None:
        beside = Chart("This installation ÷ the other one", ["", "step ÷ step", "CPU a step, ms more"], 1)
        for mode in bench.modes:
            row = figures[mode].row(figures[f"{mode}-against"])
            compared.append({"mode": mode, "step_ratio": row["step_ratio"], "more_cpu_ms": row["more_cpu_ms"]})
            beside.rows.append(
                [MODES[mode].name, Interval.read(row["step_ratio"]).text(3), Interval.read(row["more_cpu_ms"]).text(1)]
            )
        charts.append(beside)
    charts.append(_by_thread(rows))
    shape, state = bench.shape, ready[_PLAIN]["state_bytes"]
    notes = [
        f"GPT, {shape.parameters / 1e6:.1f}M parameters (dim {shape.dim}, {shape.layers} layers), batch {shape.batch} "
        f"of {shape.context} bytes, AdamW ({bench.optimizer}), state {size(state)}; each way to train in a process of "
        "its own.",
        f"{bench.blocks} blocks. In each, every process trains {bench.steps} measured steps, after one that is not, in "
        "a drawn order, and rests until the next block. Medians; in parentheses the 95 % interval of the median, by "
        "bootstrap over the blocks.",
        "CPU: of all threads, until what was saved is committed. What the training thread does within the package is "
        "in the stall.",
        *(f"The other installation: {bench.against}." for _ in range(bench.against is not None)),
    ]
    data = {
        "model": {**asdict(shape), "parameters": shape.parameters}, "optimizer": bench.optimizer, "every": bench.every,
        "steps": bench.steps, "blocks": bench.blocks, "state_bytes": state,
        "plain": {"step_s": median(plain.seconds), "cpu_s": median(plain.cpu)},
        "results": rows, "against": compared, "measured": list(blocks),
    }  # fmt: skip
    return Findings(command, about, data, charts, notes)


def _by_thread(rows: Sequence[Mapping[str, Any]]) -> Chart:
    chart = Chart("CPU a step of the package's own threads, ms", ["thread", *(row["title"] for row in rows)], 1)
    for name in sorted({name for row in rows for name in row["threads_cpu_ms"]}):
        intervals = [row["threads_cpu_ms"].get(name) for row in rows]
        chart.rows.append([name, *(Interval.read(each).text(2) if each is not None else "-" for each in intervals)])
    return chart


def _cells(row: Mapping[str, Any], *, pair: bool) -> list[str]:
    ratio, more = Interval.read(row["step_ratio"]), Interval.read(row["more_cpu_ms"])
    return [
        f"{1e3 * row['step_s']:.1f}", ratio.text(3) if pair else "1", f"{1e3 * row['cpu_s']:.1f}",
        more.text(1) if pair else "-", f"{row['stall_ms']:.2f}" if pair else "-",
    ]  # fmt: skip
