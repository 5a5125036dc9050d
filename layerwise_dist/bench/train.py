# SPDX-License-Identifier: Apache-2.0
"""`bench train`: what checkpoints cost a training loop, under this engine and under others, in one run.

The training happens in processes of their own (train_worker.py). A block of steps without checkpoints stands before and
after each block with them, and a block's figure is its mean step over the mean of those two.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from layerwise_dist.bench import machine
from layerwise_dist.bench.failure import unknown
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.launching import launch
from layerwise_dist.bench.model import Shape
from layerwise_dist.bench.progress import Bar, bar
from layerwise_dist.bench.train_worker import modes_of
from layerwise_dist.bench.workplace import CHECKPOINTS_AT_ONCE, workplace
from layerwise_dist.percentiles import percentile
from layerwise_dist.units import size

_RAW_BYTES = 512 << 20
_PLACES = ("1st", "2nd", "3rd")  # checkpoints of a block that are audited in full: audit.FULL_FIRST


@dataclass(frozen=True, slots=True)
class TrainBench:
    """`steps` are measured in each block, rounded up to a multiple of `every`."""

    shape: Shape
    optimizer: str
    every: Sequence[int]
    ranks: int
    steps: int
    rounds: int
    modes: Sequence[str]
    quick: bool
    deepspeed: int | None = None  # ZeRO stage
    ddp: bool = False  # in place of FSDP2

    @property
    def baseline(self) -> tuple[str, str]:
        """(mode, title of its column) that the others are compared with, beside training without checkpoints."""
        return ("dcp-async", "DCP async") if self.deepspeed is None else ("save-checkpoint", "save_checkpoint")

    @property
    def trained_under(self) -> str:
        if self.deepspeed is not None:
            return f"DeepSpeed, ZeRO-{self.deepspeed} in fp32, {self.ranks} ranks of torchrun."
        wrapper = "DDP" if self.ddp else "FSDP2"
        return "one process." if self.ranks == 1 else f"{wrapper}, {self.ranks} ranks of torchrun."


def run(bench: TrainBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError, ValueError for an unknown mode, and BenchFailed if the training ends badly."""
    known = modes_of(bench.deepspeed)
    for name in bench.modes:
        if name not in known:
            raise unknown("mode", name, known)
    state = 12 * bench.shape.parameters
    held = state * (bench.ranks if bench.ddp else 1)
    blocks = bench.rounds * len(bench.every) * (2 * len(bench.modes) + 1)
    space = workplace(
        directory,
        disk_bytes=CHECKPOINTS_AT_ONCE * state + min(state, _RAW_BYTES) + (64 << 20),
        memory_bytes=5 * held + bench.ranks * (1 << 30),
    )
    with space as folder, bar(len(bench.modes) + blocks) as progress:
        about = machine.describe(str(folder))
        heard = _Heard(progress)
        _launch(bench, folder, heard)
    return _findings(bench, command, about, heard)


class _Heard:
    """What the workers have said."""

    def __init__(self, progress: Bar) -> None:
        self.state_bytes: list[int] = []  # by rank
        self.total_bytes = 0  # of one checkpoint
        self.tried: list[dict[str, Any]] = []
        self.disk: list[float] = []
        self.blocks: list[dict[str, Any]] = []
        self._progress = progress

    def take(self, said: dict[str, Any]) -> None:
        match said:
            case {"now": text}:
                self._progress.now(text)
            case {"state_bytes": sizes, "total_bytes": total}:
                self.state_bytes, self.total_bytes = sizes, total
            case {"tried": mode}:
                self.tried.append(mode)
                self._progress.advance()
            case {"disk": speed}:
                self.disk.append(speed)  # of the blocks that follow
            case {"block": block}:
                self.blocks.append({**block, "disk": self.disk[-1]})
                self._progress.advance()


def _launch(bench: TrainBench, folder: Path, heard: _Heard) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // bench.ranks)
    spec = {
        "shape": asdict(bench.shape), "optimizer": bench.optimizer, "every": list(bench.every), "steps": bench.steps,
        "rounds": bench.rounds, "modes": list(bench.modes), "quick": bench.quick, "threads": threads,
        "folder": str(folder), "disk_bytes": _RAW_BYTES, "deepspeed": bench.deepspeed,
        "ddp": bench.ddp,
    }  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    together = bench.ranks > 1 or bench.deepspeed is not None
    launch(
        "train_worker", spec, folder, what="the training", ranks=bench.ranks if together else None,
        environment=environment, heard=heard.take,
    )  # fmt: skip


class _Figures:
    """What the blocks of one mode at one interval come to."""

    def __init__(self, heard: _Heard, mode: str, every: int) -> None:
        of_interval = [block for block in heard.blocks if block["every"] == every]
        places = [place for place, block in enumerate(of_interval) if block["mode"] == mode]
        mine = [of_interval[place] for place in places]
        around = [(of_interval[place - 1], of_interval[place + 1]) for place in places]
        plain = [fmean(_mean_step(block) for block in pair) for pair in around]
        self.seconds = [_mean_step(block) for block in mine]
        self.ratios = [step / base for step, base in zip(self.seconds, plain, strict=True)]
        self.stalls_ms = [_longest(ranks) for block in mine for ranks in zip(*block["stalls"], strict=True)]
        self.first_ms = [[_longest(ranks) for ranks in zip(*block["first"], strict=True)] for block in mine]
        self.committed = [took for block in mine for took in block["committed"][0]]
        ranks = range(len(heard.state_bytes))
        self.extra = [
            max(block["peak"][rank] - fmean(other["peak"][rank] for other in pair) for rank in ranks)
            for block, pair in zip(mine, around, strict=True)
        ]
        self.copied = [share for block in mine for share in block["copied"] if share is not None]
        writing = [heard.total_bytes / block["disk"] for block in mine]
        self.disk_bound = [
            step * every / max(base * every, least)
            for step, base, least in zip(self.seconds, plain, writing, strict=True)
            if least > base * every
        ]

    def stalls_of(self) -> dict[str, Sequence[tuple[float, float]]]:
        """By checkpoint of a block ("1st", ..., "later"), of all blocks."""
        return {**dict(zip(_PLACES, zip(*self.first_ms, strict=True), strict=False)), "later": self.stalls_ms}


def _longest(ranks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Milliseconds of the rank that stalls longest, and what of them audits took."""
    stall, audit = max(tuple(each) for each in ranks)
    return 1e3 * stall, 1e3 * audit


def _mean_step(block: dict[str, Any]) -> float:
    """Seconds a step of the slowest rank."""
    return max(fmean(seconds) for seconds in block["seconds"])


def _findings(bench: TrainBench, command: str, about: dict[str, Any], heard: _Heard) -> Findings:
    total, rank_bytes = heard.total_bytes, max(heard.state_bytes)
    usable = [mode for mode in heard.tried if mode["problem"] is None]
    rows: list[dict[str, Any]] = []
    charts = []
    baseline, column = bench.baseline
    key = f"ratio_to_{baseline.replace('-', '_')}"
    for every in bench.every:
        figures = {mode["mode"]: _Figures(heard, mode["mode"], every) for mode in usable}
        bare = [block for block in heard.blocks if (block["mode"], block["every"]) == ("none", every)]
        plain = Spread.of([_mean_step(block) for block in bare])
        rows.append({"mode": "none", "title": "no checkpoints", "every": every, "step_s": plain.data()})
        chart = Chart(
            f"A checkpoint every {f'{every} steps' if every > 1 else 'step'}",
            ["", "step, s", "÷ plain", f"÷ {column}", "stall p50, ms", "p99, ms", "to committed, s", "MB/s",
             "extra memory ÷ state", "÷ max(step, disk)", "flushed"], 1,
        )  # fmt: skip
        chart.rows.append(["no checkpoints", plain.text(1, 3), "1", *["-"] * 8])
        for mode in usable:
            found = _row(mode, figures[mode["mode"]], figures.get(baseline), key, every, total, rank_bytes)
            rows.append(found)
            chart.rows.append(_cells(found, key))
        charts += [chart, *_stall_charts(rows, every)]
    missing = {mode["title"]: mode["problem"] for mode in heard.tried if mode["problem"] is not None}
    disk = Spread.of(heard.disk)
    shape = bench.shape
    notes = [
        f"GPT, {shape.parameters / 1e6:.1f}M parameters (dim {shape.dim}, {shape.layers} layers), batch {shape.batch} "
        f"of {shape.context} bytes, AdamW ({bench.optimizer}), state {size(total)}; {bench.trained_under}",
        f"{bench.rounds} rounds of blocks in turn, {bench.steps} steps or one interval a block; the steps at a block's "
        "beginning (audits, files that are new) are not counted. Median over the blocks (least–greatest).",
        f"Raw direct writes in the same run: {disk.text(1e-9)} GB/s.",
        *(f"Not run: {title}: {problem}" for title, problem in missing.items()),
    ]
    data = {
        "model": {**asdict(shape), "parameters": shape.parameters}, "optimizer": bench.optimizer, "ranks": bench.ranks,
        "deepspeed": bench.deepspeed, "ddp": bench.ddp, "steps": bench.steps, "rounds": bench.rounds,
        "state_bytes": total, "disk_bytes_per_s": disk.data(),
        "results": rows, "not_run": missing,
    }  # fmt: skip
    return Findings(command, about, data, charts, notes)


def _row(
    mode: dict[str, Any], mine: _Figures, baseline: _Figures | None, key: str, every: int, total: int, rank_bytes: int
) -> dict[str, Any]:
    def spread(values: Sequence[float]) -> dict[str, float] | None:
        return Spread.of(values).data() if values else None

    row = {
        "mode": mode["mode"], "title": mode["title"], "flushes": mode["flushes"], "every": every,
        "step_s": spread(mine.seconds), "ratio_to_plain": spread(mine.ratios),
        "extra_peak_bytes": spread(mine.extra),
        "extra_peak_to_state": spread([extra / rank_bytes for extra in mine.extra]),
    }  # fmt: skip
    if mode["mode"] == "layerwise-off-step":
        keys = (key, "stall_ms_p50", "stall_ms_p99", "committed_s", "bytes_per_s", "copied_share",
                "ratio_to_disk_bound")  # fmt: skip
        return {**row, **dict.fromkeys(keys), "stalls_ms": {}}
    to_baseline = [a / b for a, b in zip(mine.ratios, baseline.ratios, strict=True)] if baseline else []
    stalls = {place: _parted(found) for place, found in mine.stalls_of().items()}
    return {
        **row, key: spread(to_baseline),
        "stall_ms_p50": stalls["later"]["p50"], "stall_ms_p99": stalls["later"]["p99"],
        "committed_s": spread(mine.committed), "bytes_per_s": spread([total / took for took in mine.committed]),
        "copied_share": spread(mine.copied), "ratio_to_disk_bound": spread(mine.disk_bound),
        "stalls_ms": stalls if mode["audits"] else {},
    }  # fmt: skip


def _parted(stalls: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians and 99th percentiles: of whole stalls, and of audits."""
    whole, audits = zip(*stalls, strict=True)
    return {
        "p50": median(whole), "p99": percentile(whole, 99),
        "audit_p50": median(audits), "audit_p99": percentile(audits, 99),
    }  # fmt: skip


def _stall_charts(rows: Sequence[dict[str, Any]], every: int) -> list[Chart]:
    """The stalls of modes with audits, the first checkpoints apart: one chart, or none."""
    mine = [row for row in rows if row["every"] == every and row.get("stalls_ms")]
    if not mine:
        return []
    places = list(mine[0]["stalls_ms"])
    columns = ["", *(place if place != "later" else "later, p50" for place in places), "p99"]
    chart = Chart("The stall by checkpoint of a block, ms; in parentheses what audits took", columns, 1)
    for row in mine:
        cells = [f"{of['p50']:.1f} ({of['audit_p50']:.1f})" for of in row["stalls_ms"].values()]
        last = row["stalls_ms"]["later"]
        chart.rows.append([row["title"], *cells, f"{last['p99']:.1f} ({last['audit_p99']:.1f})"])
    return [chart]


def _cells(row: dict[str, Any], baseline: str) -> list[str]:
    def text(key: str, scale: float = 1.0, digits: int = 2) -> str:
        found = row[key]
        if isinstance(found, dict):
            return Spread.read(found).text(scale, digits)
        return "-" if found is None else f"{found:.{digits}f}"

    return [
        row["title"], text("step_s", digits=3), text("ratio_to_plain", digits=3), text(baseline),
        text("stall_ms_p50", digits=1), text("stall_ms_p99", digits=1), text("committed_s"),
        text("bytes_per_s", 1e-6, 0), text("extra_peak_to_state"), text("ratio_to_disk_bound"), row["flushes"],
    ]  # fmt: skip
