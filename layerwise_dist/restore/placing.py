# SPDX-License-Identifier: Apache-2.0
"""Places the bytes of a file into one rank's tensors, whatever part of the file comes next."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import torch

from layerwise_dist.restore.clipping import within
from layerwise_dist.restore.filling import Read
from layerwise_dist.restore.planned import PlannedShard, Span
from layerwise_dist.restore.planner import ByteRange
from layerwise_dist.tensors.pieces import is_dense

_UNNEEDED, _STRAIGHT, _BUFFERED, _DEALT = range(4)  # what becomes of a block


class Target:
    """One tensor that is filled. What is neither row-major nor without gaps is filled as a whole, out of memory of its
    own; any other takes its parts as they come, wherever it is and whatever its dtype.
    """

    def __init__(self, read: Read) -> None:
        self.read, self.item, self.dtype = read, read.dtype.itemsize, read.dtype
        self._staged = None if is_dense(read.tensor) else read.staging()
        memory = read.tensor if self._staged is None else self._staged
        self.flat = memory.detach().view(-1)
        self.address = self.flat.data_ptr() if self._staged is not None or read.straight else None

    def finish(self) -> None:
        if self._staged is not None:
            with torch.no_grad():
                self.read.tensor.copy_(self._staged)

    def place(self, span: ByteRange, begin: int, end: int, memory: torch.Tensor) -> None:
        """What the span has of bytes `begin` to `end` of its file, which are in `memory`."""
        if not span.shape:
            first, last = max(begin, span.begin), min(end, span.end)
            to, count = span.offset + first - span.begin, last - first
            if self.address is not None:
                ctypes.memmove(self.address + to, memory.data_ptr() + first - begin, count)
                return
            source = memory[first - begin : last - begin].view(self.dtype)
            self.flat[to // self.item : (to + count) // self.item].copy_(source)
            return
        items = memory[: end - begin].view(self.dtype)
        at, into = (span.begin - begin) // self.item, int(self.flat.storage_offset()) + span.offset // self.item
        for source_at, target_at, shape in within(
            span.shape, span.strides, span.target_strides, -at, (end - span.begin) // self.item
        ):
            lacking = len(span.shape) - len(shape)
            found = items.as_strided(shape, span.strides[lacking:], at + source_at)
            self.flat.as_strided(shape, span.target_strides[lacking:], into + target_at).copy_(found)


class File:
    """One file, the spans that this rank needs of it, and what becomes of each of its blocks."""

    def __init__(self, shard: PlannedShard) -> None:
        self.shard, self.block_bytes = shard, shard.blocks.block_bytes
        self._spans: list[tuple[ByteRange, Target]] = []
        self._fate = np.zeros(len(shard.blocks), dtype=np.uint8)
        self._reader = np.full(len(shard.blocks), -1, dtype=np.int64)
        self._begins = self._ends = np.empty(0, dtype=np.int64)

    def add(self, span: ByteRange, target: Target) -> None:
        blocks = self.shard.blocks
        fate = _STRAIGHT if not span.shape and target.address is not None else _BUFFERED
        self._spans.append((span, target))
        for begin, end in _touched(span, target.item, self.block_bytes):
            some = self._fate[blocks.at(begin) : blocks.at(end - 1) + 1]
            np.maximum(some, fate, out=some)

    def close(self) -> None:
        """No span is added any more."""
        self._spans.sort(key=lambda each: each[0].begin)
        self._begins = np.array([span.begin for span, _ in self._spans], dtype=np.int64)
        self._ends = np.array([span.end for span, _ in self._spans], dtype=np.int64)

    def runs(self, *fates: int) -> list[tuple[int, int]]:
        """First and last block of each run of blocks with one of these fates: 1 straight, 2 through a buffer."""
        edges = np.flatnonzero(np.diff(np.isin(self._fate, fates), prepend=False, append=False))
        return [(first, end - 1) for first, end in edges.reshape(-1, 2).tolist()]

    def set_apart(self, first: int, last: int, reader: int) -> None:
        """These blocks are read by `reader` for several ranks."""
        self._fate[first : last + 1] = _DEALT
        self._reader[first : last + 1] = reader

    def bytes_of(self, first: int, last: int) -> tuple[int, int]:
        """Where blocks begin and end, which lie one after the other."""
        offset, length = self.shard.blocks[last]
        return self.shard.blocks[first][0], offset + length

    def reader_of(self, offset: int, nbytes: int) -> int | None:
        """Who reads these bytes, which are of one run of blocks; None where they are none of those that come."""
        blocks = self.shard.blocks
        if not nbytes or not blocks or not blocks[0][0] <= offset < offset + nbytes <= sum(blocks[len(blocks) - 1]):
            return None
        readers = set(self._reader[blocks.at(offset) : blocks.at(offset + nbytes - 1) + 1].tolist())
        return readers.pop() if len(readers) == 1 and -1 not in readers else None

    def straight(self, begin: int, end: int) -> list[Span]:
        """Byte ranges in these blocks, with the memory that each goes to as it is."""
        found = []
        for span, target in self._within(begin, end):
            if span.shape:
                continue  # it has gaps, and these blocks are in one
            assert target.address is not None, "its blocks would go through a buffer"
            first, last = max(begin, span.begin), min(end, span.end)
            found.append((first, last, target.address + span.offset + first - span.begin))
        return found

    def place(self, begin: int, end: int, memory: torch.Tensor) -> None:
        """Bytes `begin` to `end` of the file, which are in `memory`, go to all that needs some of them. Any thread."""
        with torch.no_grad():
            for span, target in self._within(begin, end):
                target.place(span, begin, end, memory)

    def _within(self, begin: int, end: int) -> Iterator[tuple[ByteRange, Target]]:
        for at in np.flatnonzero((self._begins < end) & (self._ends > begin)).tolist():
            yield self._spans[at]


def _touched(span: ByteRange, item: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """The bytes that have the span's elements, without gaps that could hold whole blocks."""
    if not span.shape or span.strides[0] * item <= block_bytes:
        yield span.begin, span.end
        return
    rest = (span.end - span.begin) - (span.shape[0] - 1) * span.strides[0] * item
    for row in range(span.shape[0]):
        begin = span.begin + row * span.strides[0] * item
        yield begin, begin + rest
