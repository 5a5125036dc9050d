# SPDX-License-Identifier: Apache-2.0
"""Shared by the commands of `layerwise`: options, and how an answer or error becomes output and exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from layerwise_dist.cli import console
from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.errors import ConfigError, DamageError, LayerwiseError, shown
from layerwise_dist.supervision.processes import terminable

Dir = Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint directory: the `dir` of the configuration.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Step = Annotated[int | None, typer.Option("--step", metavar="N", min=0, help="The checkpoint of this step.")]
Tag = Annotated[str | None, typer.Option("--tag", metavar="TAG", help="The newest checkpoint saved under this name.")]


def finish(command: Callable[[Catalogue], console.Answer], directory: str, json: bool, doing: str = "read") -> None:
    give(lambda: command(Catalogue(directory)), json, doing)


def give(
    command: Callable[[], console.Answer],
    json: bool,
    doing: str = "read",
    bad: type[LayerwiseError] = DamageError,
) -> None:
    """`doing`: what a command can't do when the operating system says no. `bad`: errors that say that what it looked
    at is bad (exit code 1); all others say that it was asked for what can't be done.
    """
    try:
        with terminable():
            answer = command()
    except KeyboardInterrupt as stopped:
        raise failed(str(stopped) or "interrupted", 130, json) from None
    except (WrongUsage, ConfigError) as error:
        raise failed(str(error), 2, json) from None
    except bad as error:
        raise failed(str(error), 1, json) from None
    except LayerwiseError as error:
        raise failed(str(error), 2, json) from None
    except OSError as error:
        raise failed(f"cannot {doing}: {error}", 2, json) from None
    try:
        console.put(answer, json)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # the reader (head, less) has seen enough; nothing may be flushed to it at exit
    raise typer.Exit((0 if answer.good else 1) if answer.code is None else answer.code)


def give_live(command: Callable[[], None]) -> None:
    """Of a command that shows what it finds by itself until Ctrl-C."""
    try:
        command()
    except WrongUsage as error:
        raise failed(str(error), 2, False) from None
    except OSError as error:
        raise failed(f"cannot read: {error}", 2, False) from None


def failed(message: str, code: int, json: bool) -> typer.Exit:
    if json:
        console.put_json({"error": message})
    else:
        print(f"layerwise: {shown(message)}", file=sys.stderr)
    return typer.Exit(code)
