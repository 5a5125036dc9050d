# SPDX-License-Identifier: Apache-2.0
"""Medians with their spread, and the tables made of them: for the terminal, a program, docs/tables/performance.md."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerwise_dist.bench import machine

_RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, least and greatest of a figure over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    @staticmethod
    def read(data: Mapping[str, float]) -> Spread:
        """From `data()`."""
        return Spread(data["median"], data["min"], data["max"])

    def data(self) -> dict[str, float]:
        return {"median": self.median, "min": self.low, "max": self.high}

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        low, middle, high = (f"{scale * value:.{digits}f}" for value in (self.low, self.median, self.high))
        return middle if low == high else f"{middle} ({low}–{high})"


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and where it lies in 95 of 100 samples like this one (percentile bootstrap; Efron 1979)."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """The same for the same values: what is drawn comes from a seed."""
        drawn = random.Random(0)
        medians = sorted(statistics.median(drawn.choices(values, k=len(values))) for _ in range(_RESAMPLES))
        tail = round(0.025 * _RESAMPLES)
        return Interval(statistics.median(values), medians[tail], medians[-1 - tail])

    @staticmethod
    def read(data: Mapping[str, float]) -> Interval:
        """From `data()`."""
        return Interval(data["median"], data["low"], data["high"])

    def data(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}

    def text(self, digits: int) -> str:
        low, middle, high = (f"{value:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle} ({low} to {high})"


@dataclass
class Chart:
    """A title, columns and rows of text; numbers are right-aligned from column `numbers` on."""

    title: str
    columns: list[str]
    numbers: int
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        head = "| " + " | ".join(self.columns) + " |"
        rule = "|" + "".join("---|" if place < self.numbers else "--:|" for place in range(len(self.columns)))
        return "\n".join([f"{self.title}:", "", head, rule, *("| " + " | ".join(row) + " |" for row in self.rows)])


@dataclass
class Findings:
    """What a benchmark found. `data` is its JSON; `charts` and `notes` are the same for people."""

    command: str
    machine: dict[str, Any]
    data: dict[str, Any]
    charts: list[Chart]
    notes: list[str]

    def json(self) -> dict[str, Any]:
        return {"command": self.command, "machine": self.machine, **self.data, "notes": self.notes}

    def markdown(self) -> str:
        """The tables with the command and the machine, ready to paste."""
        parts = [f"    {self.command}", machine.line(self.machine) + "."]
        parts += [chart.markdown() for chart in self.charts]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)
