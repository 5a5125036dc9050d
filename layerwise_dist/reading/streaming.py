# SPDX-License-Identifier: Apache-2.0
"""Reads a shard, or part of it, in bounded pieces in the order of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from layerwise_dist.storage.reader import Shard
from layerwise_dist.tensors.pieces import DTYPES
from layerwise_dist.tensors.slices import ITEM_BYTES

_AT_ONCE = 64 << 20  # bytes


def stream(shard: Shard, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Of each tensor whose name is `wanted` its elements, verified, as one dimension: a large one in several pieces,
    one after the other. No more than 128 MiB are held. Raises DamageError or OSError.
    """
    batch: list[tuple[str, torch.Tensor, int, int]] = []
    held = 0
    for name, entry in sorted(shard.index.entries.items(), key=lambda each: each[1].begin):
        if not wanted(name):
            continue
        dtype, item = DTYPES[entry.slice.dtype], ITEM_BYTES[entry.slice.dtype]
        for begin in range(entry.begin, entry.end, _AT_ONCE):
            end = min(begin + _AT_ONCE, entry.end)
            batch.append((name, torch.empty((end - begin) // item, dtype=dtype, device="cpu"), begin, end))
            held += end - begin
            if held >= _AT_ONCE:
                yield from _read(shard, batch)
                batch, held = [], 0
    yield from _read(shard, batch)


def _read(shard: Shard, batch: list[tuple[str, torch.Tensor, int, int]]) -> Iterator[tuple[str, torch.Tensor]]:
    shard.read_into([(begin, end, memory.data_ptr()) for _, memory, begin, end in batch])
    for name, memory, _, _ in batch:
        yield name, memory
