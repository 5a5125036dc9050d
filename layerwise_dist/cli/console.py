# SPDX-License-Identifier: Apache-2.0
"""Prints answers: rich tables for people, one JSON object for programs, sizes and times as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from layerwise_dist.errors import shown
from layerwise_dist.units import size

__all__ = ["Answer", "Beneath", "age", "damaged", "put", "put_json", "row", "size", "table"]

_LONGEST_CELL = 1000  # characters
_PROBLEMS = 100
_PIPE_WIDTH = 200  # columns where there is no terminal to ask


@dataclass
class Answer:
    """What a command found. `data` is its JSON, `parts` the same for people; `code` is its exit code, by default 0 if
    it is `good` and 1 if not.
    """

    data: dict[str, Any]
    parts: list[RenderableType] = field(default_factory=list)
    good: bool = True
    code: int | None = None


def put(answer: Answer, as_json: bool) -> None:
    if as_json:
        put_json(answer.data)
        return
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for part in answer.parts:
        # Names come from files: no markup of theirs is obeyed, and no control character.
        out.print(Text(shown(part)) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


def damaged(problems: Sequence[str]) -> list[str]:
    """A line for each, of more than a hundred the first; `--json` has all."""
    more = [f"damaged: and {len(problems) - _PROBLEMS} more: --json lists them"] if len(problems) > _PROBLEMS else []
    return [f"damaged: {problem}" for problem in problems[:_PROBLEMS]] + more


def put_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1))


def table(*columns: str, right: tuple[str, ...] = (), folded: tuple[str, ...] = ()) -> Table:
    """A table whose rows `row` adds; cells of `folded` columns may wrap."""
    made = Table(box=None, pad_edge=False, header_style="bold")  # no lines: it fits 80 columns, and can be copied from
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column not in folded,
            overflow="fold" if column in folded else "ellipsis",
        )
    return made


class Beneath:
    """A table; where the terminal is too narrow, what its long columns have stands beneath each row instead, on a line
    of its own: it can be read, and copied.
    """

    def __init__(self, *columns: str, right: tuple[str, ...], long: tuple[str, ...]) -> None:
        """`long` in the order in which they leave the table, as long as it does not fit."""
        self._columns, self._right, self._long = columns, right, [name for name in long if name in columns]
        self._rows: list[tuple[dict[str, str], str]] = []

    def row(self, *cells: object, style: str = "") -> None:
        texts = (shown(str(cell), _LONGEST_CELL) for cell in cells)
        self._rows.append((dict(zip(self._columns, texts, strict=True)), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        unbounded = options.update(max_width=10_000)
        for count in range(len(self._long) + 1):
            below = self._long[:count]
            shown = self._table([name for name in self._columns if name not in below])
            if Measurement.get(console, unbounded, shown).maximum <= options.max_width:
                break
        if not below:
            yield shown
            return
        lines = console.render_lines(shown, options, new_lines=False)
        others = [Text("  " + "  ".join(below), style="bold")]
        others += [Text("  " + "  ".join(cells[name] for name in below), style=style) for cells, style in self._rows]
        for line, other in zip(lines, others, strict=True):
            yield Segments([*line, Segment.line()])
            yield other

    def _table(self, columns: list[str]) -> Table:
        made = table(*columns, right=self._right)
        for cells, style in self._rows:
            row(made, *(cells[name] for name in columns), style=style)
        return made


def row(into: Table, *cells: object, style: str = "") -> None:
    into.add_row(*(Text(shown(str(cell), _LONGEST_CELL)) for cell in cells), style=style or None)


def age(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h``, ``12 d``; a time in the future (another machine's clock) is ``0 s``."""
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
