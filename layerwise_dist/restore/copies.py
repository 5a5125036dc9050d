# SPDX-License-Identifier: Apache-2.0
"""Copies of a tensor that lie on disks of nodes, where nobody sees two of them: compared by a hash of what each file
has, verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from layerwise_dist.errors import MismatchError
from layerwise_dist.restore.planned import Readable
from layerwise_dist.storage.reader import Entry
from layerwise_dist.tensors.slices import ranks_text

_BUFFER_BYTES = 64 << 20

# As JSON: the tensor's name, the ranks that hold it together, dtype and shape, which part it is, and a hash of that.
Told = list[Any]


def hashed(parts: Iterable[tuple[str, tuple[int, ...], tuple[Readable, Entry]]]) -> Iterator[Told]:
    """Of parts of tensors, by name and ranks. Raises DamageError or OSError."""
    for name, group, (shard, entry) in parts:
        found = hashlib.sha256()
        memory = torch.empty(min(entry.end - entry.begin, _BUFFER_BYTES), dtype=torch.uint8, device="cpu")
        for begin in range(entry.begin, entry.end, _BUFFER_BYTES):
            end = min(begin + _BUFFER_BYTES, entry.end)
            shard.read_into([(begin, end, memory.data_ptr())])
            found.update(memory.numpy()[: end - begin].data)
        part = entry.slice
        yield [name, group, part.dtype, part.global_shape, part.cut, found.hexdigest()]


def unlike(told: Iterable[Told]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Names whose copies are not all equal, with the ranks of the first and of one that differs.

    Raises MismatchError for copies that are cut in different ways.
    """
    copies: dict[str, dict[tuple[int, ...], dict[str, str]]] = {}
    for name, group, dtype, shape, cut, digest in told:
        copies.setdefault(name, {}).setdefault(tuple(group), {})[f"{dtype} {shape} {cut}"] = digest
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name in sorted(copies):
        first, *others = sorted(copies[name])
        for other in others:
            one, two = copies[name][first], copies[name][other]
            if one.keys() != two.keys():
                raise MismatchError(
                    f"{name}: ranks {ranks_text(first) or first[0]} and {ranks_text(other) or other[0]} of the "
                    "checkpoint hold it cut in different ways, and their shards are on disks of nodes, where copies "
                    "that are cut in different ways can't be compared: copy all shards into one directory that all "
                    "ranks see"
                )
            if one != two:
                found.setdefault(name, (first, other))
    return found
