# SPDX-License-Identifier: Apache-2.0
"""`layerwise bench trace`: one checkpointed step of a GPT, layer by layer, as JSON for Perfetto and as a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layerwise_dist as lwd
from layerwise_dist.bench import machine
from layerwise_dist.bench.figures import Chart, Findings
from layerwise_dist.bench.model import GPT, Shape, adamw, windows
from layerwise_dist.bench.progress import bar
from layerwise_dist.bench.workplace import workplace
from layerwise_dist.engine.trace_picture import draw

_STEPS = 8  # after the observed first one, the audited ones, and those in which files are new


@dataclass(frozen=True, slots=True)
class TraceBench:
    shape: Shape
    update: str
    optimizer: str
    out: Path
    picture: Path | None


def run(bench: TraceBench, directory: str, command: str) -> Findings:
    """Raises TooLittleRoom, OSError, and ConfigError for a picture of another kind than .png, .svg or .pdf."""
    state = 12 * bench.shape.parameters
    with workplace(directory, disk_bytes=8 * state + (64 << 20), memory_bytes=3 * state + (1 << 30)) as folder:
        about = machine.describe(str(folder))
        _train(bench, folder)
    events = json.loads(bench.out.read_text())["traceEvents"]
    if bench.picture is not None:
        draw(events, bench.picture, title=f"update: {bench.update}")
    return _findings(bench, command, about, events)


def _train(bench: TraceBench, folder: Path) -> None:
    model = GPT(bench.shape)
    optimizer = adamw(model.parameters(), bench.optimizer)
    with (
        lwd.attach(model, optimizer, dir=str(folder / "checkpoints"), update=bench.update) as engine,
        bar(_STEPS) as progress,
    ):
        for step in engine.steps(_STEPS):
            progress.now(f"step {step + 1}")
            if step == _STEPS - 2:
                engine.trace(bench.out.resolve())
            model(windows(bench.shape, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.advance()
        engine.wait(_STEPS)


def _findings(bench: TraceBench, command: str, about: dict[str, Any], events: list[dict[str, Any]]) -> Findings:
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] != "M":
            spans.setdefault(rows[event["tid"]], []).append(
                (event["ts"] / 1e3, (event["ts"] + event.get("dur", 0)) / 1e3)
            )
    chart = Chart("Milliseconds since the step began", ["", "first begins", "last ends"], 1)
    data: dict[str, Any] = {}
    for row in ("gradients", "updates", "captures", "writes", "training"):
        if row in spans:
            first, last = min(begin for begin, _ in spans[row]), max(end for _, end in spans[row])
            data[row] = {"first_begins_ms": first, "last_ends_ms": last}
            chart.rows.append([row, f"{first:.1f}", f"{last:.1f}"])
    notes = [f"{bench.out}: open it in ui.perfetto.dev." + (f" Drawn: {bench.picture}." if bench.picture else "")]
    return Findings(command, about, {"rows": data, "trace": str(bench.out)}, [chart], notes)
