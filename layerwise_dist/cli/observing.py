# SPDX-License-Identifier: Apache-2.0
"""The commands `layerwise watch` and `layerwise report`, which show how a run is doing."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise_dist.cli import console, watching
from layerwise_dist.cli.running import Dir, Json, give, give_live

Events = Annotated[str | None, typer.Option("--events", metavar="FILE", help="A file of events that is not in DIR.")]


def watch(
    directory: Dir,
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
    events: Events = None,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, max=3600, help="Time between updates.")
    ] = 2.0,
    json: Json = False,
) -> None:
    """Show how a running job is doing, until Ctrl-C.

    The newest commit and its age, rate, GB/s, stall, failures with reasons, and when the disk will be full. It reads
    manifests, and the events that `telemetry.events` in the job's configuration turns on, and writes nothing. Where
    the output is not a terminal, and with --json, it prints once. Exit code: 1 if checkpoints have stopped.

    Example: layerwise watch checkpoints
    """
    if once or json or not watching.interactive():
        give(lambda: watching.once(directory, events), json)
    give_live(lambda: watching.live(directory, events, every))


def report(
    directory: Dir,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The page to write.")] = "report.html",
    events: Events = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    json: Json = False,
) -> None:
    """Make one HTML page about a run.

    Steps and checkpoints over time, stalls, throughput, failures, lineage, bytes by layer, slowest rank. The page loads
    nothing and runs nothing. Needs pip install 'layerwise_dist[report]'.

    Example: layerwise report checkpoints -o report.html
    """

    def make() -> console.Answer:
        from layerwise_dist.cli import reporting

        return reporting.report(directory, out, events, force=force)

    give(make, json, "make the page")
