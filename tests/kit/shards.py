# SPDX-License-Identifier: Apache-2.0
"""What the files of shards hold, and whether two ranks or files hold the same."""

from __future__ import annotations

from pathlib import Path

import torch

from layerwise_dist import _native
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.reader import Shard
from layerwise_dist.tensors.pieces import DTYPES

Tensors = dict[str, torch.Tensor]


def beginning_of(data: bytes) -> bytes:
    """The first sector of a shard, which says whose it is; the rest of a header may be torn."""
    return data[:512]


def content_hash(data: bytes) -> int:
    """Of what is after the header of a shard."""
    return _native.xxh3_64(data[8 + int.from_bytes(data[:8], "little") :])


def read_shard(shard: Shard) -> tuple[Tensors, dict[str, int]]:
    """All tensors of a shard, and the position that its state says. Everything is verified; raises DamageError."""
    tensors = read_tensors(shard)
    return tensors, typed_json.loads(*shard.state())["objects"]["place"]


def read_tensors(shard: Shard) -> Tensors:
    problems = shard.verify()
    if problems:
        raise DamageError("; ".join(problems))
    found: Tensors = {}
    spans = []
    for name, entry in shard.index.entries.items():
        found[name] = torch.empty(entry.slice.local_shape, dtype=DTYPES[entry.slice.dtype])
        spans.append((entry.begin, entry.end, found[name].data_ptr()))
    shard.read_into(spans)
    return found


def differing(left: Tensors, right: Tensors) -> list[str]:
    """Names that are not in both, or not equal bit for bit."""
    wrong = sorted(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if a.dtype != b.dtype or a.shape != b.shape or raw(a) != raw(b):
            wrong.append(name)
    return wrong


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def flip(path: Path, offset: int) -> None:
    """Changes one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))
