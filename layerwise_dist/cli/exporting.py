# SPDX-License-Identifier: Apache-2.0
"""`layerwise export`: a checkpoint in another tool's format."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any, Literal

from layerwise_dist.cli.catalogue import WrongUsage
from layerwise_dist.cli.console import Answer, row, size, table
from layerwise_dist.cli.progress import bytes_bar
from layerwise_dist.units import parse_number

FORMATS: dict[str, Literal["hf", "dcp", "torch"]] = {"hf": "hf", "dcp": "dcp", "torch": "torch"}
_LISTED = 20


def export(
    directory: str, out: str, *, step: int | None, tag: str | None, model: str | None, kind: str, dtype: str | None,
    rename: list[str], max_shard_size: str, like: str | None, weights_only: bool,
) -> Answer:  # fmt: skip
    """Raises WrongUsage, DamageError or OSError."""
    from layerwise_dist.exporting.export import DTYPES, export
    from layerwise_dist.reading.checkpoint import open_checkpoint

    if kind not in FORMATS:
        raise WrongUsage(f"--format {kind}: must be one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise WrongUsage(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if step is not None and tag is not None:
        raise WrongUsage("give --step or --tag, not both")
    if like is not None and (kind != "hf" or not os.path.isdir(like)):
        raise WrongUsage(f"--like {like}: {'no such folder' if kind == 'hf' else 'is for --format hf'}")
    if os.path.lexists(out):
        raise WrongUsage(f"{out} already exists, and an export overwrites nothing")
    renames = dict(_pair(each) for each in rename)
    try:
        most = parse_number(max_shard_size)
    except ValueError as error:
        raise WrongUsage(f"--max-shard-size: {error}") from None
    began = time.monotonic()
    with open_checkpoint(directory, step, tag) as ckpt, contextlib.ExitStack() as bar:
        made = export(
            ckpt, out, FORMATS[kind], model=model, rename=renames or None, dtype=DTYPES[dtype] if dtype else None,
            weights_only=weights_only, max_shard_bytes=most, like=Path(like) if like else None,
            begin=lambda total: bar.enter_context(bytes_bar("exporting", total)),
        )  # fmt: skip
        found = {"step": ckpt.step, "tag": ckpt.tag, "dir": os.path.dirname(ckpt.path)}
    seconds = time.monotonic() - began
    data: dict[str, Any] = {
        **found, "good": True, "out": os.path.abspath(out), "format": kind, "dtype": dtype, "weights": made.weights,
        "bytes": made.nbytes, "optimizers": made.optimizers, "files": made.files, "seconds": seconds,
    }  # fmt: skip
    files = table("file", "size", right=("size",), folded=("file",))
    for name, nbytes in list(made.files.items())[:_LISTED]:
        row(files, name, size(nbytes))
    more = [f"and {len(made.files) - _LISTED} more files"] if len(made.files) > _LISTED else []
    state = f", the state of {len(made.optimizers)} optimizer(s)" if made.optimizers else ""
    said = f"{made.weights} tensors of the model{state}, {size(made.nbytes)} in {seconds:.1f} s; flushed and read back"
    return Answer(data, [f"Exported step {found['step']} to {out} ({kind})", files, *more, said])


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise WrongUsage(f"--rename {text}: expected OLD=NEW, the beginnings of names there and here")
    return old, new
