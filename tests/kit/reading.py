# SPDX-License-Identifier: Apache-2.0
"""What an open checkpoint says, held against what each framework says of the same state (tests/jobs/matrix.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import layerwise_dist as lwd
from kit.shards import raw
from layerwise_dist.exporting.contents import contents


def apart(folder: Path) -> str:
    """Of what a `write` task of the matrix left: the first tensor that `open_checkpoint` gives otherwise; "" if none.

    A parameter of a ZeRO run is read as its master.
    """
    golden = load_file(f"{folder}/golden.safetensors")
    with lwd.open_checkpoint(folder / "ckpt") as ckpt:
        weights = ckpt.weights()
        for name, wanted in golden.items():
            kind, _, fqn = name.partition("/")
            rank = int(kind.partition("@")[2]) if "@" in kind else None
            kind = kind.partition("@")[0]
            here = weights[fqn] if kind == "param" else f"{kind}/{fqn}"
            if here not in ckpt and kind == "step" and fqn in ckpt.state_fqns:
                continue  # a number here, and a tensor where torch gathers it
            held = {rank for ranks in ckpt.info(here).copies for rank in ranks}
            found = ckpt.tensor(here, rank if rank in held else None)[...]
            if kind == "step":
                found, wanted = found.double(), wanted.double()
            if found.dtype != wanted.dtype or found.shape != wanted.shape or raw(found) != raw(wanted):
                return f"{name}, read as {here}, is not what the framework says"
        for weight in contents(ckpt).weights:
            if f"param/{weight.key}" in golden and raw(weight.whole()) != raw(golden[f"param/{weight.key}"]):
                return f"{weight.key} would be exported otherwise than the framework says"
        more = [name for name in ckpt if name.partition("/")[0] in ("param", "master") and
                f"param/{name.partition('/')[2]}" not in golden]  # fmt: skip
        return f"{more} are there and should not be" if more else ""


def whole(ckpt: lwd.Checkpoint) -> dict[str, torch.Tensor]:
    return {name: ckpt[name][...] for name in ckpt}
