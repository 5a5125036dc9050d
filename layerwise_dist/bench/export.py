# SPDX-License-Identifier: Apache-2.0
"""`bench export`: a checkpoint on a cold disk becomes another tool's file, beside that tool's own converter."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise_dist.bench import machine
from layerwise_dist.bench.cold import make_cold
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.launching import launch
from layerwise_dist.bench.model import GPT, Shape
from layerwise_dist.bench.progress import bar
from layerwise_dist.bench.workplace import workplace
from layerwise_dist.units import size


@dataclass(frozen=True, slots=True)
class ExportBench:
    shape: Shape
    rounds: int


@dataclass(frozen=True, slots=True)
class _Way:
    """`source`: the folder that is read; None for what comes from memory. `pair`: ours, which it is compared with."""

    title: str
    source: str | None
    pair: str
    convert: Callable[[Path, Path], None]


def run(bench: ExportBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError and BenchFailed."""
    state = 12 * bench.shape.parameters
    space = workplace(directory, disk_bytes=7 * state + (64 << 20), memory_bytes=4 * state + (2 << 30))
    ways, absent = _ways(bench.shape)
    with space as folder, bar(1 + (bench.rounds + 1) * len(ways)) as progress:
        about = machine.describe(str(folder))
        progress.now("a state is made")
        _make(bench, folder, deepspeed="zero-to-fp32" in ways)
        progress.advance()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        nbytes: dict[str, int] = {}
        for number in range(bench.rounds + 1):
            for name, way in ways.items():
                progress.now(way.title)
                took, nbytes[name] = _measure(way, folder)
                if number > 0:
                    seconds[name].append(took)
                progress.advance()
    return _findings(bench, command, about, ways, seconds, nbytes, absent)


def _make(bench: ExportBench, folder: Path, *, deepspeed: bool) -> None:
    spec = {"shape": asdict(bench.shape), "folder": str(folder), "deepspeed": deepspeed}
    launch(
        "export_worker", spec, folder, what="the job that makes the state", ranks=1, environment={},
        heard=lambda what: None,
    )  # fmt: skip


def _measure(way: _Way, folder: Path) -> tuple[float, int]:
    """Seconds until the result is flushed, and its bytes."""
    out = folder / "out"
    gc.collect()
    source = folder if way.source is None else folder / way.source
    if way.source is not None:
        make_cold([path for path in source.rglob("*") if path.is_file() and path.stat().st_size])
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        way.convert(source, out)
        files = [path for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file()]
        for path in files:
            _flush(path)
        took = time.perf_counter() - began
    nbytes = sum(path.stat().st_size for path in files)
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return took, nbytes


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _ways(shape: Shape) -> tuple[dict[str, _Way], list[str]]:
    """By name, and the packages without which some are left out."""
    ways = {
        "torch": _Way("layerwise export --format torch", "layerwise", "torch", _exported("torch")),
        "dcp-to-torch-save": _Way("dcp_to_torch_save", "dcp", "torch", _dcp_to_torch_save),
        "hf": _Way("layerwise export --format hf", "layerwise", "hf", _exported("hf")),
    }
    absent = []
    if importlib.util.find_spec("transformers"):
        ways["save-pretrained"] = _Way("save_pretrained, from memory", None, "hf", _save_pretrained(shape))
    else:
        absent.append("transformers")
    if importlib.util.find_spec("deepspeed"):
        ways["zero"] = _Way(
            "layerwise export --weights-only, of ZeRO-2", "zero", "zero", _exported("torch", weights=True)
        )
        ways["zero-to-fp32"] = _Way("zero_to_fp32, of ZeRO-2", "zero-own", "zero", _zero_to_fp32)
    else:
        absent.append("deepspeed")
    return ways, absent


def _exported(kind: Any, *, weights: bool = False) -> Callable[[Path, Path], None]:
    from layerwise_dist.exporting.export import export
    from layerwise_dist.reading.checkpoint import open_checkpoint

    def convert(source: Path, out: Path) -> None:
        with open_checkpoint(source) as ckpt:
            export(ckpt, out, kind, weights_only=weights)

    return convert


def _dcp_to_torch_save(source: Path, out: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(str(source), str(out))


def _zero_to_fp32(source: Path, out: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(source), str(out), tag="step1")


def _save_pretrained(shape: Shape) -> Callable[[Path, Path], None]:
    import transformers

    base: Any = transformers.PreTrainedModel

    class Pretrained(base):  # type: ignore[misc]
        config_class = transformers.PretrainedConfig
        _tied_weights_keys = {"gpt.head.weight": "gpt.tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.gpt = GPT(shape)
            self.post_init()

    model = Pretrained(transformers.PretrainedConfig())

    def convert(source: Path, out: Path) -> None:
        model.save_pretrained(str(out))

    return convert


def _findings(
    bench: ExportBench, command: str, about: dict[str, Any], ways: dict[str, _Way], seconds: dict[str, list[float]],
    nbytes: dict[str, int], absent: list[str],
) -> Findings:  # fmt: skip
    chart = Chart("Exports from a cold disk", ["", "result", "seconds", "MB/s", "ours ÷ theirs"], 1)
    rows = []
    for name, way in ways.items():
        took = Spread.of(seconds[name])
        speed = Spread.of([nbytes[name] / each for each in seconds[name]])
        ours = Spread.of([a / b for a, b in zip(seconds[way.pair], seconds[name], strict=True)])
        rows.append({
            "way": name, "title": way.title, "bytes": nbytes[name], "seconds": took.data(),
            "bytes_per_s": speed.data(), "ours_to_theirs": ours.data() if name != way.pair else None,
        })  # fmt: skip
        ratio = ours.text() if name != way.pair else ""
        chart.rows.append([way.title, size(nbytes[name]), took.text(1, 3), speed.text(1e-6, 0), ratio])
    notes = [
        f"{bench.shape.parameters / 1e6:.1f}M parameters with AdamW's state, one process; {bench.rounds} rounds, one "
        "more before them is not counted. Median (least–greatest); ratios are of seconds.",
        "Sources are taken out of the page cache first, and mincore says that they are; save_pretrained has its model "
        "in memory. Each result is flushed before the clock stops. Only ours verifies what it reads, and reads back "
        "and compares what it wrote.",
        *[f"{package} is not installed: its converter is left out." for package in absent],
    ]
    data = {"results": rows, "rounds": bench.rounds, "parameters": bench.shape.parameters}
    return Findings(command, about, data, [chart], notes)
