# SPDX-License-Identifier: Apache-2.0
"""What the commands of `layerwise bench` have in common: the model that they train, and how they end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import RenderableType
from rich.text import Text

from layerwise_dist.cli import console
from layerwise_dist.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from layerwise_dist.bench.figures import Findings
    from layerwise_dist.bench.model import Shape


def shape(params: str, *, quick: bool) -> Shape:
    """Raises ValueError for a size that there is no model of."""
    from layerwise_dist.bench.model import QUICK, SHAPES

    one_of("--params", params, SHAPES)
    return QUICK if quick else SHAPES[params]


def one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} {value!r}: expected {' or '.join(allowed)}")


def finish(run: Callable[[str], Findings], json: bool, markdown: bool) -> NoReturn:
    """Runs the benchmark, which gets the command as it was typed, prints what it found, and exits."""
    from layerwise_dist.bench import machine
    from layerwise_dist.bench.failure import BenchFailed
    from layerwise_dist.bench.workplace import TooLittleRoom

    try:
        found = run(shlex.join(["layerwise", *_typed()]))
    except (TooLittleRoom, ValueError, ConfigError, UnsupportedError) as error:
        _fail(str(error), 2, json)
    except BenchFailed as error:
        _fail(str(error), 1, json)
    except OSError as error:
        _fail(f"{error.filename or 'the disk'}: {error.strerror or error}", 2, json)
    except KeyboardInterrupt:
        _fail("interrupted: nothing is left behind", 130, json)
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


def _typed() -> list[str]:
    """The command as it was given, without what only says how to print."""
    return [word for word in sys.argv[1:] if word not in ("--json", "--markdown")]


def _fail(message: str, code: int, json: bool) -> NoReturn:
    if json:
        console.put_json({"error": message})
    else:
        print(f"layerwise: {message}", file=sys.stderr)
    raise typer.Exit(code)
