# SPDX-License-Identifier: Apache-2.0
"""Which tensors of two checkpoints, or of files of weights, differ, in how many elements, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from layerwise_dist.reading.checkpoint import Checkpoint
from layerwise_dist.reading.tensor import LazyTensor, read_rows
from layerwise_dist.tensors.difference import Difference, difference
from layerwise_dist.tensors.slices import ITEM_BYTES, ranks_text

_AT_ONCE = 16 << 20  # bytes of one tensor
_SMALL = 64 << 10  # bytes; tensors of at most so many are read together


class Readable(Protocol):
    """One tensor, as a `LazyTensor` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def get_dtype(self) -> str:
        """A code of the safetensors format."""
        ...

    def read_range(self, start: int, length: int) -> torch.Tensor:
        """Elements in row-major order, as one row, on the host. Raises DamageError or OSError."""
        ...


Pair = tuple[str, Readable, Readable]


def single(opened: Checkpoint) -> Iterator[tuple[str, LazyTensor]]:
    """Of what several ranks wrote for themselves under one name one, if all are equal; else each with its ranks."""
    for name in opened.names:
        if not opened.unlike(name):
            yield name, opened[name]
            continue
        for ranks in opened.info(name).copies:
            yield f"{name} (rank {ranks_text(ranks) or ranks[0]})", opened.tensor(name, ranks[0])


def nbytes(tensor: Readable) -> int:
    """Of all of it."""
    return math.prod(tensor.shape) * ITEM_BYTES.get(tensor.get_dtype(), 1)


def differences(pairs: Sequence[Pair], advance: Callable[[int], object]) -> Iterator[dict[str, Any]]:
    """Of each pair that is not equal to the bit: `name`, what each is (`a`, `b`: dtype and shape), and where these are
    the same, `elements` that differ `of` so many, `max_abs`, `max_ulps` and `nans` as `Difference` has them. `advance`
    is told of bytes. Raises DamageError or OSError.
    """
    small: list[Pair] = []
    held = 0
    for pair in pairs:
        name, one, other = pair
        size = nbytes(one)
        if _kind(one) != _kind(other):
            yield {"name": name, "a": _kind(one), "b": _kind(other)}
        elif isinstance(one, LazyTensor) and isinstance(other, LazyTensor) and one.surely_equals(other):
            pass  # by the hashes of all their blocks
        elif size <= _SMALL:
            small.append(pair)
            held += size
            if held >= _AT_ONCE:
                yield from _of_small(small)
                small, held = [], 0
        else:
            yield from _of(name, one, _pieces(one, other))
        advance(size)
    yield from _of_small(small)


def _of_small(pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    lazy = [tensor for _, *both in pairs for tensor in both if isinstance(tensor, LazyTensor)]
    rows = dict(zip(map(id, lazy), read_rows(lazy), strict=True))

    def row(tensor: Readable) -> torch.Tensor:
        return rows[id(tensor)] if id(tensor) in rows else tensor.read_range(0, math.prod(tensor.shape))

    for name, one, other in pairs:
        yield from _of(name, one, iter([(row(one), row(other))]))


def _pieces(one: Readable, other: Readable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    count, step = math.prod(one.shape), _AT_ONCE // ITEM_BYTES[one.get_dtype()]
    for start in range(0, count, step):
        length = min(step, count - start)
        yield one.read_range(start, length), other.read_range(start, length)


def _of(name: str, tensor: Readable, pieces: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    found = Difference()
    for values, theirs in pieces:
        found += difference(values, theirs)
    if found.elements:
        far = found.max_abs
        yield {
            "name": name, "a": _kind(tensor), "b": _kind(tensor), "elements": found.elements,
            "of": math.prod(tensor.shape), "max_abs": far if math.isfinite(far) else "inf",
            "max_ulps": found.max_ulps, "nans": found.nans,
        }  # fmt: skip


def _kind(tensor: Readable) -> dict[str, Any]:
    return {"dtype": tensor.get_dtype(), "shape": list(tensor.shape)}
