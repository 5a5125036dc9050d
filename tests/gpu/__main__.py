# SPDX-License-Identifier: Apache-2.0
"""Runs the sections, each in a process of its own with a deadline, and says what came of it.

    python -m gpu [--device KIND] [--quick] [--json FILE] [SECTION...]

Exit code: 0 all passed or were skipped, 1 a section failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu import exact, figures, graphs, streams
from gpu.device import Device, Skip, found
from gpu.training import Kit, apart
from layerwise_dist.bench import machine
from layerwise_dist.bench.figures import Chart
from layerwise_dist.supervision.processes import terminable

SECTIONS: dict[str, Callable[[Kit], Any]] = {
    "staging, plain": exact.staging_plain,
    "staging, DDP": exact.staging_ddp,
    "staging, FSDP2": exact.staging_fsdp2,
    "fences": streams.fences,
    "kill and resume": exact.kill_and_resume,
    "random numbers": exact.random_numbers,
    "AMP with GradScaler": exact.mixed_precision,
    "fused AdamW": exact.fused,
    "capturable AdamW": exact.capturable,
    "graph of forward and backward": graphs.graph_of_the_model,
    "graph of the whole step": graphs.graph_of_the_step,
    "graph captured while attached": graphs.graph_captured_while_attached,
    "torch.compile, reduce-overhead": graphs.compiled,
    "freed memory": streams.freed_memory,
    "pinned pool": streams.pinned_pool,
    "out of memory": streams.out_of_memory,
    "monitor mode": exact.monitor,
    "device to host": figures.bandwidth,
    "cost of checkpoints": figures.cost,
    "staging, ZeRO-1": partial(exact.staging_zero, stage=1),
    "staging, ZeRO-2": partial(exact.staging_zero, stage=2),
    "staging, ZeRO-3": partial(exact.staging_zero, stage=3),
}
FIGURES = ("device to host", "cost of checkpoints")
ALL_S = 450.0  # of all sections; with the start it stays below eight minutes
SECTION_S = 120.0


@dataclass
class Outcome:
    """`what` is "passed", "skipped" or "failed"."""

    section: str
    what: str
    seconds: float
    remark: str
    charts: list[Chart] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def run(name: str, kit: Kit, timeout_s: float) -> Outcome:
    began = time.monotonic()

    def body() -> Any:
        # It costs time, which is measured there.
        torch.use_deterministic_algorithms(name not in FIGURES, warn_only=True)
        return SECTIONS[name](kit)

    what, charts, data = "passed", [], {}
    try:
        code, remark = apart(body, timeout_s)
        if isinstance(remark, tuple):
            remark, charts, data = remark
        if code != 0:
            what, remark = "failed", f"its process ended with {code}"
    except Skip as reason:
        what, remark = "skipped", str(reason)
    except (RuntimeError, TimeoutError) as error:
        what, remark = "failed", str(error)
    return Outcome(name, what, time.monotonic() - began, remark, charts, data)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash tests/gpu.sh", description=__doc__, add_help=False)
    parser.add_argument("--device")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("sections", nargs="*", metavar="SECTION")
    asked = parser.parse_args()
    unknown = sorted(set(asked.sections) - SECTIONS.keys())
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    gc.collect()
    gc.freeze()  # what each section's process would copy at each of its collections
    # In a process of its own, as all that touches the device: a process that has done so can't be forked.
    kind, name = apart(lambda: (asked.device or found(), None), 60)[1]
    if kind is None:
        print("skipped: torch sees no accelerator (--device cpu runs what a stand-in can)")
        _write(asked.json, {"skipped": "torch sees no accelerator"})
        return 0
    device = Device(kind)
    name = apart(lambda: device.name, 60)[1]
    began, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="layerwise-gpu-") as work:
        about = {**machine.describe(work), "accelerator": name}
        print(f"{name}; {machine.line(about)}", flush=True)
        for number, section in enumerate(asked.sections or SECTIONS):
            left = ALL_S - (time.monotonic() - began)
            folder = Path(work, str(number))
            folder.mkdir()
            if left < 5:
                outcome = Outcome(section, "skipped", 0.0, f"the {ALL_S:g} s of all sections are over")
            else:
                outcome = run(section, Kit(device, folder, asked.quick), min(SECTION_S, left))
            outcomes.append(outcome)
            print(f"{outcome.what:8} {outcome.seconds:6.1f} s  {section}: {outcome.remark}", flush=True)
    table = Chart(name, ["section", "", "s", "remark"], 4)
    table.rows = [[each.section, each.what, f"{each.seconds:.1f}", each.remark] for each in outcomes]
    for chart in (table, *(chart for each in outcomes for chart in each.charts)):
        print(f"\n{chart.markdown()}")
    rows = [{key: value for key, value in asdict(each).items() if key != "charts"} for each in outcomes]
    _write(asked.json, {"machine": about, "sections": rows})
    return int(any(each.what == "failed" for each in outcomes))


def _write(path: Path | None, what: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        with terminable():
            code = main()
    except KeyboardInterrupt:
        print("interrupted: nothing is left behind", file=sys.stderr)
        code = 130
    sys.exit(code)
