# SPDX-License-Identifier: Apache-2.0
"""What the commands of `layerwise bench` share: options, and how a measurement is run, shown and ended."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import RenderableType
from rich.text import Text

from layerwise_dist.cli import console
from layerwise_dist.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from layerwise_dist.bench.figures import Findings
    from layerwise_dist.bench.model import Shape

Dir = Annotated[
    str, typer.Argument(metavar="DIR", help="A directory on the disk to measure. Everything written is removed again.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as in docs/tables/performance.md.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes: shows that it works; the figures mean nothing.")]
Rounds = Annotated[
    int, typer.Option("--rounds", metavar="N", min=1, help="Rounds; in each, everything is measured in turn.")
]
Depth = Annotated[int, typer.Option("--depth", metavar="N", min=1, max=64, help="Blocks in flight.")]
BlockKb = Annotated[int, typer.Option("--block-kb", metavar="N", min=4, max=65536, help="Size of a block, KiB.")]
Params = Annotated[str, typer.Option("--params", metavar="SIZE", help="The model's parameters: 34M or 98M.")]


def model_of(params: str, *, quick: bool) -> Shape:
    """Raises ValueError for a size that there is no model of."""
    from layerwise_dist.bench.model import QUICK, SHAPES

    one_of("--params", params, SHAPES)
    return QUICK if quick else SHAPES[params]


def one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} {value!r}: expected {' or '.join(allowed)}")


def finish(run: Callable[[str], Findings], json: bool, markdown: bool) -> NoReturn:
    """Measures, prints what was found, and ends the command. `run` gets the command line that the answer names."""
    from layerwise_dist.bench import machine
    from layerwise_dist.bench.failure import BenchFailed
    from layerwise_dist.bench.workplace import TooLittleRoom

    try:
        found = run(shlex.join(["layerwise", *typed()]))
    except (TooLittleRoom, ValueError, ConfigError, UnsupportedError) as error:
        fail(str(error), 2, json)
    except BenchFailed as error:
        fail(str(error), 1, json)
    except OSError as error:
        fail(f"{error.filename or 'the disk'}: {error.strerror or error}", 2, json)
    except KeyboardInterrupt:
        fail("interrupted: nothing is left behind", 130, json)
    if markdown and not json:
        print(found.markdown())
        raise typer.Exit(0)
    parts: list[RenderableType] = [found.command, machine.line(found.machine)]
    for chart in found.charts:
        shown = console.table(*chart.columns, right=tuple(chart.columns[chart.numbers :]))
        for cells in chart.rows:
            console.row(shown, *cells)
        parts += [Text(chart.title, style="bold"), shown]
    console.put(console.Answer(found.json(), [*parts, *found.notes]), json)
    raise typer.Exit(0)


def typed() -> list[str]:
    """The command as it was given, without what only says how to print."""
    return [word for word in sys.argv[1:] if word not in ("--json", "--markdown")]


def fail(message: str, code: int, json: bool) -> NoReturn:
    if json:
        console.put_json({"error": message})
    else:
        print(f"layerwise: {message}", file=sys.stderr)
    raise typer.Exit(code)
