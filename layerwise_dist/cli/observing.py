# SPDX-License-Identifier: Apache-2.0
"""The command that tells how a run is: `layerwise watch`."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise_dist.cli import watching
from layerwise_dist.cli.running import Dir, Json, give, give_live

Events = Annotated[str | None, typer.Option("--events", metavar="FILE", help="A file of events that is not in DIR.")]


def watch(
    directory: Dir,
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
    events: Events = None,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, max=3600, help="Between two looks.")
    ] = 2.0,
    json: Json = False,
) -> None:
    """Shows how a job is doing: newest commit, rate, stall, failures, when the disk is full. Ctrl-C ends it.

    Reads manifests, and the events that `telemetry.events` in the job's configuration turns on, and writes nothing.
    Where the output is no terminal, and with --json, it prints once. Exit code: 1 if checkpoints have stopped.

    Example: layerwise watch checkpoints
    """
    if once or json or not watching.interactive():
        give(lambda: watching.once(directory, events), json)
    give_live(lambda: watching.live(directory, events, every))
