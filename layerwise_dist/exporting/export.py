# SPDX-License-Identifier: Apache-2.0
"""`layerwise export`: writes one checkpoint for another tool."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from layerwise_dist.exporting import dcp, hugging_face, torch_file
from layerwise_dist.exporting.contents import Contents, contents
from layerwise_dist.exporting.output import beside
from layerwise_dist.reading.checkpoint import Checkpoint
from layerwise_dist.reading.renaming import Rename

Format = Literal["hf", "dcp", "torch"]
DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """`files`: bytes by name. `tensors`: entries of the model, tied ones once, and of optimizers."""

    files: dict[str, int]
    weights: int
    nbytes: int
    optimizers: list[str]


def export(
    ckpt: Checkpoint, out: str | os.PathLike[str], kind: Format, *, model: str | None = None,
    rename: Rename | None = None, dtype: torch.dtype | None = None, weights_only: bool = False,
    max_shard_bytes: int = 5 * 10**9, like: Path | None = None,
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda nbytes: None,
) -> Exported:  # fmt: skip
    """Writes `out`, which must not be there: a folder, or with "torch" a file. It is flushed and read back before it
    gets its name; whatever ends this earlier leaves nothing.

    `begin(bytes)` gives what counts the bytes of tensors as they are written. Raises MismatchError,
    UnsupportedError, DamageError, FileExistsError and other OSErrors.
    """
    what: Contents = contents(
        ckpt, model=model, rename=rename, dtype=dtype, optimizer=kind != "hf" and not weights_only
    )
    with beside(out, folder=kind != "torch") as path:
        advance = begin(what.nbytes)
        if kind == "hf":
            hugging_face.write(path, what, max_shard_bytes=max_shard_bytes, like=like, advance=advance)
        elif kind == "dcp":
            dcp.write(path, what, advance=advance)
        else:
            torch_file.write(path, what, advance=advance)
        files = {path.name: path.stat().st_size} if kind == "torch" else hugging_face.size_of(path)
    return Exported(files, len(what.weights), what.nbytes, list(what.optimizers))
