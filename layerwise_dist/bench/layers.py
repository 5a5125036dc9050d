# SPDX-License-Identifier: Apache-2.0
"""`layerwise bench layers`: an optimizer's step as it is, on LayerwiseOptimizer's fast path, and layer by layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwise_dist import DependencyGraphBuilder, LayerwiseOptimizer
from layerwise_dist.bench import machine
from layerwise_dist.bench.figures import Chart, Findings, Spread
from layerwise_dist.bench.progress import Bar, bar

_WARM = 3  # steps at the beginning of a block that are not counted
_KERNELS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}}
_WAYS = ("plain", "fast path", "by layers")


@dataclass(frozen=True, slots=True)
class Model:
    """A row of `layers` linear layers of `width` by `width`, updated by AdamW."""

    layers: int
    width: int

    @property
    def title(self) -> str:
        return f"{self.layers} layers of {self.width} x {self.width}"


@dataclass(frozen=True, slots=True)
class LayersBench:
    models: tuple[Model, ...] = (Model(120, 64), Model(24, 512))
    rounds: int = 9
    steps: int = 40


def run(bench: LayersBench, command: str) -> Findings:
    """Steps only: gradients are there already. Each round has a block of steps of each way, in turn, on one model."""
    about = machine.describe(".")
    cases = [(model, kernel) for model in bench.models for kernel in _KERNELS]
    found: list[dict[str, object]] = []
    chart = Chart(
        "Milliseconds of a step",
        ["model", "AdamW", *_WAYS, "fast path ÷ plain", "by layers ÷ fast path"], 2,
    )  # fmt: skip
    with bar(len(cases) * bench.rounds) as progress:
        for model, kernel in cases:
            times = _measure(model, kernel, bench, progress)
            fast = [a / b for a, b in zip(times["fast path"], times["plain"], strict=True)]
            slow = [a / b for a, b in zip(times["by layers"], times["fast path"], strict=True)]
            spreads = {way: Spread.of(values) for way, values in times.items()}
            found.append(
                {"layers": model.layers, "width": model.width, "kernel": kernel,
                 **{f"{way.replace(' ', '_')}_s": spread.data() for way, spread in spreads.items()},
                 "fast_to_plain": Spread.of(fast).data(), "by_layers_to_fast": Spread.of(slow).data()}
            )  # fmt: skip
            cells = [spreads[way].text(1e3) for way in _WAYS]
            chart.rows.append([model.title, kernel, *cells, Spread.of(fast).text(1, 3), Spread.of(slow).text()])
    notes = [
        f"{bench.rounds} rounds of {bench.steps} steps a way; a step is the median of its block. Median "
        f"(least–greatest) "
        "over the rounds.",
        "fast path: LayerwiseOptimizer where nothing is to be saved; by layers: where something is.",
    ]
    return Findings(command, about, {"results": found, "rounds": bench.rounds}, [chart], notes)


def _measure(model: Model, kernel: str, bench: LayersBench, progress: Bar) -> dict[str, list[float]]:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(model.width, model.width) for _ in range(model.layers)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, **_KERNELS[kernel])
    graph = DependencyGraphBuilder(net)
    with graph.observe():
        net(torch.randn(2, model.width)).square().mean().backward()
    optimizer.step()
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    for _ in range(bench.rounds):
        progress.now(f"{model.title}, {kernel}")
        for way in _WAYS:
            with _stepping(way, optimizer, net, graph) as step:
                times[way].append(_block(step, bench.steps))
        progress.advance()
    return times


@contextmanager
def _stepping(
    way: str, optimizer: torch.optim.Optimizer, net: nn.Module, graph: DependencyGraphBuilder
) -> Iterator[Callable[[], object]]:
    if way == "plain":
        yield optimizer.step
        return
    layered = LayerwiseOptimizer(optimizer, net, graph=graph, active=lambda: way == "by layers")
    try:
        yield optimizer.step
    finally:
        layered.detach()


def _block(step: Callable[[], object], steps: int) -> float:
    """Seconds of a step."""
    took = []
    for _ in range(_WARM + steps):
        began = time.perf_counter()
        step()
        took.append(time.perf_counter() - began)
    return statistics.median(took[_WARM:])
