# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of hundreds of ranks under FSDP2, made without them: headers and states are whole, tensors are holes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager, encode
from layerwise_dist.commit.records import ShardRecord
from layerwise_dist.commit.shards import open_shard
from layerwise_dist.storage import filenames, typed_json
from layerwise_dist.storage.shard_layout import ShardLayout, Source, state_extent
from layerwise_dist.tensors.slices import Slice, ranks_text

KINDS = ("param", "exp_avg", "exp_avg_sq")
BLOCK_BYTES = 1 << 20


class Many(nn.Module):
    def __init__(self, ranks: int, params: int, width: int) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.zeros(ranks, width)) for _ in range(params))


def model(ranks: int, params: int, width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`params` parameters; each of `ranks` ranks would have one row of each."""
    net = Many(ranks, params, width)
    return net, torch.optim.AdamW(net.parameters(), lr=0.0, foreach=False)


def make(folder: Path, *, ranks: int, params: int, width: int) -> None:
    """`params` parameters with AdamW's state, cut by rows: four tensors of each in every shard. All elements are 0."""
    net, optimizer = model(ranks, params, width)
    with lwd.attach(net, optimizer, dir=str(folder)) as ckpt:
        for _ in ckpt.steps(1):
            for param in net.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
    manager = CheckpointMetadataManager(_native.PosixEnv(), str(folder))
    (manifest,) = manager.inventory().manifests.values()
    sealed = typed_json.loads(*open_shard(manager, _native.WriterPool(1), manifest, 0).state())
    shards = []
    for rank in range(ranks):
        sealed["boundary"]["rng"]["torch"] = torch.Generator().manual_seed(rank).get_state()
        text, blob = typed_json.dumps(sealed)
        extent = state_extent(text, blob)
        layout = _layout(rank, ranks, params, width)
        header = layout.header(
            attempt=manifest.attempt, step=manifest.step, rank=rank, world_size=ranks,
            hashes="".join(f"{_hash_of_zeros(length):016x}" for _, length in layout.blocks),
            state=(len(text), len(blob)), state_hash=f"{_native.xxh3_64(extent):016x}",
        )  # fmt: skip
        path = manager.shard_path(manifest, rank)
        with open(path, "wb") as file:
            file.write(header)
            file.seek(layout.end)
            file.write(extent)
        shards.append(
            ShardRecord(
                rank=rank, file=os.path.basename(path), nbytes=layout.end + len(extent), header_bytes=len(header),
                header_hash=f"{_native.xxh3_64(header):016x}",
            )
        )  # fmt: skip
    many = manifest.model_copy(update={"world_size": ranks, "framework": "fsdp2", "shards": shards})
    path = os.path.join(folder, manifest.attempt_id.folder, filenames.MANIFEST)
    Path(path).write_bytes(encode(many))


def _layout(rank: int, ranks: int, params: int, width: int) -> ShardLayout:
    among = ranks_text(range(ranks))
    sources = [
        Source(Slice(kind, f"w.{number}", "F32", (ranks, width), offsets=(rank, 0), lengths=(1, width), among=among))
        for number in range(params)
        for kind in KINDS
    ]
    steps = [Source(Slice.whole("step", f"w.{number}", "F32", ())) for number in range(params)]
    return ShardLayout([("all", [*sources, *steps])], 512, BLOCK_BYTES)


_zeros: dict[int, int] = {}


def _hash_of_zeros(length: int) -> int:
    if length not in _zeros:
        _zeros[length] = _native.xxh3_64(bytes(length))
    return _zeros[length]
