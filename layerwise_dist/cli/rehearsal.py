# SPDX-License-Identifier: Apache-2.0
"""The command `layerwise rehearse`, and what its options mean."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise_dist.cli import console
from layerwise_dist.cli.running import Json, give


def rehearse(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="Your training command, such as torchrun ... train.py.")
    ],
    directory: Annotated[
        str, typer.Option("--dir", metavar="DIR", help="Where to make a folder with room for 3 x STEPS checkpoints.")
    ] = ".",
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=3, help="Each run ends after this step.")] = 6,
    kill_at: Annotated[
        int | None, typer.Option("--kill-at", metavar="K", min=1, help="Kill after this step; default: STEPS / 2.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1, help="Longest time for one run.")
    ] = 600.0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the checkpoints and output of the runs, even if one fails.")
    ] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Is a script exactly resumable? Run its own command for a few steps, kill it, resume it, and compare.

    The command runs twice uninterrupted, once until SIGKILL after step K and one more, and once resumed from there. All
    checkpoints of equal steps are compared bit for bit. The first step, rank, and tensor or object that differs is
    named with the likeliest reason. The script's own checkpoint directories are left alone.

    Exit code: 0 exact, 1 the resumed run differs, 2 wrong usage, 3 the script itself failed or never attached, 4 two
    uninterrupted runs differ.

    Example: layerwise rehearse -- torchrun --nproc-per-node 2 train.py
    """

    def look() -> console.Answer:
        from layerwise_dist.cli.rehearsing import rehearse  # torch comes along

        return rehearse(command, directory, steps=steps, kill_at=kill_at, timeout_s=timeout, keep=keep)

    give(look, json, "rehearse")
