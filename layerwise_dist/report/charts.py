# SPDX-License-Identifier: Apache-2.0
"""Draws charts with matplotlib, as SVG within HTML, in colors that are the page's variables."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from layerwise_dist.errors import shown
from layerwise_dist.pictures import new_figure
from layerwise_dist.report.facts import Commit, Event, Facts
from layerwise_dist.units import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_WIDTH = 4.0  # inches, at 72 points each; the page scales it
_POINTS = 2000  # more of one kind are thinned out
_LAYERS, _NAME, _BRANCHES = 14, 26, 8

# Colors that nothing else has, by the page's variable that takes their place.
INK, SOFT, FIRST, SECOND, BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", SOFT: "--soft", FIRST: "--first", SECOND: "--second", BAD: "--bad"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif", "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
    "legend.frameon": False, "legend.labelcolor": INK, "axes.grid": True, "axes.axisbelow": True, "grid.color": SOFT,
    "grid.alpha": 0.25, "path.simplify": True,
}  # fmt: skip


def charts(facts: Facts) -> dict[str, str]:
    """SVG by name, of what there is something to draw of. Raises UnsupportedError without matplotlib."""
    made: dict[str, str] = {}

    def chart(name: str, title: str, inches: float, draw: Callable[[Any], None]) -> None:
        made[name] = _drawn(name, title, inches, draw)

    if facts.checkpoints:
        chart("timeline", "Steps and checkpoints over time", 2.6, lambda axes: _timeline(axes, facts))
    if facts.stalls_ms:
        chart("stalls", "Stall of a checkpoint", 2.4, lambda axes: _stalls(axes, facts.stalls_ms))
    if any(event["gb_per_s"] is not None for event in facts.committed):
        chart("throughput", "Throughput of each rank", 2.4, lambda axes: _throughput(axes, facts))
    if facts.layers:
        count = min(len(facts.layers), _LAYERS + 1)
        chart("layers", "Bytes by layer", 0.7 + 0.22 * count, lambda axes: _layers(axes, facts.layers))
    if facts.commits:
        chart("lineage", "Lineage", 2.2, lambda axes: _lineage(axes, facts))
    return made


def _timeline(axes: Any, facts: Facts) -> None:
    begin = min(event["time"] for event in [*facts.checkpoints, *facts.starts])
    end = max(event["time"] for event in facts.checkpoints)
    unit, length = next(
        (
            (unit, length)
            for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60))
            if end - begin > length
        ),
        ("seconds", 1),
    )

    def at(event: Event) -> float:
        return (event["time"] - begin) / length

    for number, start in enumerate(facts.starts[-200:]):
        axes.axvline(at(start), color=SOFT, linewidth=0.8, linestyle=":", label="start" if number == 0 else None)
    kinds = (("committed", FIRST, "o", 9), ("skipped", SECOND, "v", 18), ("failed", BAD, "x", 22))
    for outcome, color, marker, points in kinds:
        chosen = _thinned([event for event in facts.checkpoints if event["outcome"] == outcome])
        if chosen:
            axes.scatter(
                [at(event) for event in chosen], [event["step"] for event in chosen], s=points, color=color,
                marker=marker, linewidths=1.2 if marker == "x" else 0, label=outcome,
            )  # fmt: skip
    axes.set_xlabel(f"{unit} since the first start")
    axes.set_ylabel("step")
    axes.legend(fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.3, columnspacing=1)


def _stalls(axes: Any, stalls_ms: Sequence[float]) -> None:
    low, high = max(1e-3, min(stalls_ms)), max(1e-3, max(stalls_ms))
    if high > 20 * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own would be in TeX
        axes.xaxis.set_minor_formatter("")
        count, ratio = 30, (high / low) ** (1 / 30)
        bins = [*(low * ratio**n for n in range(count)), high]  # rounding may leave the longest out otherwise
    else:
        width = max((high - low) / 30, low * 0.02)  # all alike too have room beside them
        bins = [low + width * n for n in range(-1, 32)]
    axes.hist([max(1e-3, each) for each in stalls_ms], bins=bins, color=FIRST)
    axes.set_xlabel("milliseconds of the training thread")
    axes.set_ylabel("checkpoints")


def _throughput(axes: Any, facts: Facts) -> None:
    by_step: dict[int, list[float]] = {}
    for event in facts.events:
        if event["event"] == "checkpoint" and event["outcome"] == "committed" and event["gb_per_s"] is not None:
            by_step.setdefault(event["step"], []).append(event["gb_per_s"])
    steps = _thinned(sorted(by_step))
    if any(len(values) > 1 for values in by_step.values()):
        axes.fill_between(
            steps, [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps], color=FIRST,
            alpha=0.3, linewidth=0, label="all ranks",
        )  # fmt: skip
    marker = "o" if len(steps) < 40 else None
    middle = [statistics.median(by_step[step]) for step in steps]
    axes.plot(steps, middle, color=FIRST, linewidth=1.2, marker=marker, markersize=3, label="median rank")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("GB/s")


def _layers(axes: Any, layers: dict[str, int]) -> None:
    ordered = sorted(layers.items(), key=lambda each: -each[1])
    kept = [(_short(name), nbytes) for name, nbytes in ordered[:_LAYERS]]
    if len(ordered) > _LAYERS:
        kept.append((f"{len(ordered) - _LAYERS} others", sum(nbytes for _, nbytes in ordered[_LAYERS:])))
    places = range(len(kept))
    axes.barh(places, [nbytes for _, nbytes in kept], color=FIRST)
    axes.set_yticks(places, [name for name, _ in kept], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xticks([])
    most = max(nbytes for _, nbytes in kept) or 1
    axes.set_xlim(0, 1.25 * most)
    for place, (_, nbytes) in zip(places, kept, strict=True):
        axes.text(nbytes + 0.02 * most, place, size(nbytes), va="center", fontsize=9, color=INK)


def _short(name: str) -> str:
    text = shown(name or "(root)").replace("\n", " ")
    return text if len(text) <= _NAME else "..." + text[3 - _NAME :]


def _lineage(axes: Any, facts: Facts) -> None:
    commits = _thinned(sorted(facts.commits))
    by_seq = {commit.seq: commit for commit in commits}
    numbers = sorted({commit.branch for commit in commits})
    row = {branch: number for number, branch in enumerate(numbers)}

    def line(parent: Commit, child: Commit) -> None:
        xs, ys = [parent.step, child.step], [row[parent.branch], row[child.branch]]
        axes.plot(xs, ys, color=SOFT, linewidth=1, zorder=1)

    previous: dict[int, Commit] = {}
    origins = {branch.seq: branch.parent for branch in facts.branches}
    for commit in commits:
        parent = by_seq.get(commit.parent or 0) or previous.get(commit.branch)
        parent = parent or by_seq.get(origins.get(commit.branch) or 0)
        if parent is not None:
            line(parent, commit)
        previous[commit.branch] = commit
    for status, color in (("abandoned", SOFT), ("lineage", FIRST), ("newest", SECOND)):
        chosen = [commit for commit in commits if commit.status == status]
        if chosen:
            axes.scatter(
                [commit.step for commit in chosen], [row[commit.branch] for commit in chosen], color=color, s=26,
                zorder=2, label=status,
            )  # fmt: skip
    rows = range(0, len(numbers), -(-len(numbers) // _BRANCHES))
    axes.set_yticks(rows, [f"branch {number + 1}" for number in rows], fontsize=9)
    axes.set_ylim(len(numbers) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("step")
    axes.legend(fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.3)


def _thinned(found: Sequence[Any]) -> list[Any]:
    every = max(1, -(-len(found) // _POINTS))
    return [*found[:-1:every], *found[-1:]]


def _drawn(name: str, title: str, inches: float, draw: Callable[[Any], None]) -> str:
    figure: Figure = new_figure(Path("chart.svg"), (_WIDTH, inches))
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    buffer = io.BytesIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.set_facecolor("none")
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_xlabel() == "step":
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if axes.get_ylabel() in ("step", "checkpoints"):
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.set_layout_engine("constrained")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _within_html(buffer.getvalue(), name, title)


def _within_html(svg: bytes, name: str, title: str) -> str:
    """Ids get the chart's name before them, and colors become variables."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            else:
                value = value.replace("url(#", f"url(#{name}-")
                element.set(key, re.sub(r"#0[1-5]0[1-5]0[1-5]", lambda found: f"var({_VARIABLES[found[0]]})", value))
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    label = ElementTree.Element(f"{{{_SVG}}}title")
    label.text = title
    root.insert(0, label)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")
