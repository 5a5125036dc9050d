# SPDX-License-Identifier: Apache-2.0
"""Draws a step's trace: time from left to right, one line per layer, events as bars and marks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from layerwise_dist.pictures import new_figure

_LINE, _TOP, _BOTTOM, _LEFT, _WIDTH = 0.13, 0.35, 0.5, 1.9, 9.0  # inches
_COLORS = {"updates": "#2b5c8a", "writes": "#e0a184"}
_MARKS = {"gradients": (".", "#4a8a3a"), "captures": (".", "#222222")}


def draw(events: list[dict[str, Any]], path: str | os.PathLike[str], *, title: str) -> None:
    """`events` are a StepTrace's. A write spans the layers of its batch.

    Raises ConfigError for a suffix that is none of .png .svg .pdf.
    """
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    happened = [(rows[event["tid"]], event) for event in events if event["ph"] != "M"]
    lines: dict[str, int] = {}
    for row, event in happened:
        for layer in _layers(row, event):
            lines.setdefault(layer, len(lines))
    height = _TOP + _LINE * len(lines) + _BOTTOM
    figure = new_figure(Path(path), (_WIDTH, height))
    axes = figure.add_axes(
        (_LEFT / _WIDTH, _BOTTOM / height, 1 - (_LEFT + 0.15) / _WIDTH, 1 - (_TOP + _BOTTOM) / height)
    )
    for row, event in sorted(happened, key=lambda item: item[0] != "writes"):  # writes lie below all else
        begin, end = event["ts"] / 1e3, (event["ts"] + event.get("dur", 0)) / 1e3
        places = [lines[layer] for layer in _layers(row, event)]
        if row in _COLORS:
            first, last = min(places), max(places)
            axes.barh(
                first - 0.4, max(end - begin, 0.3), left=begin, height=last - first + 0.8, align="edge",
                color=_COLORS[row],
            )  # fmt: skip
        elif row in _MARKS:
            mark, color = _MARKS[row]
            axes.plot([begin], [places[-1]], mark, color=color, markersize=4)
        else:
            axes.axvline(end, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(lines)), [name if len(name) < 30 else f"…{name[-29:]}" for name in lines], fontsize=5)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("milliseconds since the step began", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    for row, color in _COLORS.items():
        axes.barh([0], [0], color=color, label=row)
    for row, (mark, color) in _MARKS.items():
        axes.plot([], [], mark, color=color, label=row)
    axes.legend(loc="upper right", fontsize=7)
    axes.set_title(f"{title}; dotted: the step ends", fontsize=9)
    figure.savefig(path, dpi=150)


def _layers(row: str, event: dict[str, Any]) -> list[str]:
    """Whose lines an event is on."""
    if row == "training":
        return []
    return event.get("args", {}).get("layers", [event["name"]])
