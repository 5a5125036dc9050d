# SPDX-License-Identifier: Apache-2.0
"""Draws a dependency graph: one row per layer, the first ready at the top."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import networkx

from layerwise_dist.pictures import new_figure
from layerwise_dist.units import size

_ROW, _BOX, _LANE, _WIDTH = 0.5, 0.36, 0.16, 5.2  # inches
_MAX_PIXELS = 60000  # a side of a png
_MAX_LANES = 24


def draw(graph: networkx.DiGraph[str], path: str | os.PathLike[str]) -> None:
    """Writes the picture; raises ConfigError for a suffix that is none of .png .svg .pdf."""
    rows = {layer: index for index, layer in enumerate(graph.nodes)}
    long = [(rows[a], rows[b]) for a, b in graph.edges if rows[b] - rows[a] != 1]
    lanes = _lanes(long)
    right = _WIDTH + 0.3 + _LANE * (1 + max(lanes.values(), default=0))
    height = 0.7 + _ROW * len(rows)
    figure = new_figure(Path(path), (right + 0.2, height))
    from matplotlib.patches import FancyBboxPatch

    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.1, right + 0.1)
    axes.set_ylim(height, 0)
    axes.axis("off")
    kinds = {"data": "data dependencies", "chain": "a chain"}[graph.graph["edges"]]
    title = f"first gradient first; order: {graph.graph['source']}, edges: {kinds}"
    if len(long) > len(lanes):
        title += f"; the {len(long) - len(lanes)} longest are not drawn"
    axes.text(0.0, 0.25, title, fontsize=8, va="center")
    for layer, row in rows.items():
        y = _y(row)
        frozen = graph.nodes[layer]["position"] is None
        axes.add_patch(
            FancyBboxPatch(
                (0, y - _BOX / 2), _WIDTH, _BOX, boxstyle="round,pad=0,rounding_size=0.06", linewidth=0.8,
                facecolor="#eeeeee" if frozen else "#e3eefa", edgecolor="#888888" if frozen else "#2b5c8a",
            )
        )  # fmt: skip
        left, note = _label(graph.nodes[layer], layer)
        axes.text(0.1, y, left, fontsize=8.5, va="center", family="monospace", clip_on=True)
        axes.text(_WIDTH - 0.1, y, note, fontsize=6.5, va="center", ha="right", color="#444444")
    arrow = {"arrowstyle": "-|>", "color": "#444444", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    for a, b in graph.edges:
        first, second = rows[a], rows[b]
        if (first, second) not in lanes and second - first != 1:
            continue
        if second - first == 1:
            middle = _WIDTH / 2
            axes.annotate(
                "",
                (middle, _y(second) - _BOX / 2),
                (middle, _y(first) + _BOX / 2),
                arrowprops={**arrow, "mutation_scale": 7},
            )
            continue
        x = _WIDTH + 0.3 + _LANE * lanes[first, second]
        axes.plot(
            [_WIDTH, x, x], [_y(first) + 0.08, _y(first) + 0.08, _y(second) - 0.08], color="#b0562b", linewidth=0.8
        )
        axes.annotate(
            "", (_WIDTH, _y(second) - 0.08), (x, _y(second) - 0.08),
            arrowprops={**arrow, "color": "#b0562b", "mutation_scale": 7},
        )  # fmt: skip
    figure.savefig(path, dpi=min(150, _MAX_PIXELS / max(height, right)))


def _y(row: int) -> float:
    return 0.7 + _ROW * row


def _label(node: dict[str, Any], layer: str) -> tuple[str, str]:
    """Name on the left; on the right elements, bytes and dtypes, and what else the same tensors are called."""
    info, position = node["info"], node["position"]
    name = layer if len(layer) <= 36 else f"…{layer[-35:]}"
    numbers = (
        f"{info.numel:,} × {', '.join(dtype.removeprefix('torch.') for dtype in info.dtypes)} = {size(info.nbytes)}"
    )
    tied = [alias for aliases in info.aliases.values() for alias in aliases]
    if tied:
        numbers += f"\nalso {tied[0]}" + (f" and {len(tied) - 1} more" if len(tied) > 1 else "")
    return (f"{position + 1:>3} {name}" if position is not None else f"    {name} (frozen)"), numbers


def _lanes(edges: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """A lane for each edge that skips rows, the shortest nearest to the boxes; no two in a lane overlap.

    Edges for which no lane is left are left out: what skips most would only make the picture wider.
    """
    taken: list[list[tuple[int, int]]] = []  # by lane
    lanes: dict[tuple[int, int], int] = {}
    for edge in sorted(edges, key=lambda edge: (abs(edge[1] - edge[0]), edge)):
        low, high = min(edge), max(edge)
        free = (lane for lane, used in enumerate(taken) if all(high < start or end < low for start, end in used))
        lane = next(free, len(taken))
        if lane == _MAX_LANES:
            continue
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        lanes[edge] = lane
    return lanes
