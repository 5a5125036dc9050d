# SPDX-License-Identifier: Apache-2.0
"""Places the bytes of a file into one rank's tensors, whatever part of the file comes next."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from layerwise_dist.restore.clipping import within
from layerwise_dist.restore.filling import Read
from layerwise_dist.restore.planned import PlannedShard, Span
from layerwise_dist.restore.planner import ByteRange, Runs
from layerwise_dist.tensors.pieces import is_dense

_NO_RUNS, _NO_ADDRESSES = np.empty((0, 4), dtype=np.int64), np.empty(0, dtype=np.uint64)
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
        as_it_is = memory.device.type == "cpu" and memory.dtype == read.dtype
        self.address = self.flat.data_ptr() if as_it_is else None

    def finish(self) -> None:
        if self._staged is not None:
            with torch.no_grad():
                self.read.tensor.copy_(self._staged)

    def place_run(self, offset: int, memory: torch.Tensor) -> None:
        """Bytes in memory that go, as they are, to this place in the tensor's own."""
        if self.address is not None:
            ctypes.memmove(self.address + offset, memory.data_ptr(), len(memory))
        else:
            self.flat[offset // self.item : (offset + len(memory)) // self.item].copy_(memory.view(self.dtype))

    def place(self, span: ByteRange, begin: int, end: int, memory: torch.Tensor) -> None:
        """What a span that has a shape has of bytes `begin` to `end` of its file, which are in `memory`."""
        items = memory[: end - begin].view(self.dtype)
        at, into = (span.begin - begin) // self.item, int(self.flat.storage_offset()) + span.offset // self.item
        for source_at, target_at, shape in within(
            span.shape, span.strides, span.target_strides, -at, (end - span.begin) // self.item
        ):
            lacking = len(span.shape) - len(shape)
            found = items.as_strided(shape, span.strides[lacking:], at + source_at)
            self.flat.as_strided(shape, span.target_strides[lacking:], into + target_at).copy_(found)


class Spans:
    """The spans of all files that a rank needs, by file. Those without a shape are numbers, as in `planner.Runs`.

    Attributes:
        targets: of the reads that can be placed block by block.
        apart: those that cannot, since elements may lie across blocks. No writer of ours makes such a file.
    """

    def __init__(self, shards: Mapping[int, PlannedShard], reads: Sequence[Read]) -> None:
        self._shards, self._number = shards, {id(shard): at for at, shard in shards.items()}
        self._strided: dict[int, list[tuple[ByteRange, Target]]] = {}
        tables = [read.spans.table if isinstance(read.spans, Runs) else self._table(read.spans) for read in reads]
        runs = np.concatenate([np.empty((0, 4), dtype=np.int64), *tables])
        of = np.repeat(np.arange(len(reads)), np.array([len(table) for table in tables], dtype=np.int64))
        items = np.array([read.dtype.itemsize for read in reads], dtype=np.int64)
        across = set(of[runs[:, 1] % items[of] > 0].tolist())
        self.targets: list[Target] = []
        self.apart: list[Read] = []
        place = np.full(len(reads), -1, dtype=np.int64)  # of each read in `targets`
        for at, read in enumerate(reads):
            strided = [] if isinstance(read.spans, Runs) else [span for span in read.spans if span.shape]
            if at in across or any(span.begin % read.dtype.itemsize for span in strided):
                self.apart.append(read)
                continue
            place[at] = len(self.targets)
            self.targets.append(target := Target(read))
            for span in strided:
                self._strided.setdefault(self._number[id(span.shard)], []).append((span, target))
        self._runs = np.column_stack((runs, place[of]))[place[of] >= 0]  # [n, 5]: `Runs.table`, and the target

    def _table(self, spans: Sequence[ByteRange]) -> np.ndarray:
        rows = [(self._number[id(span.shard)], span.begin, span.end, span.offset) for span in spans if not span.shape]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

    def files(self) -> dict[int, File]:
        """By number."""
        runs = self._runs[np.lexsort((self._runs[:, 1], self._runs[:, 0]))]
        edges = np.flatnonzero(np.diff(runs[:, 0])) + 1
        of = {int(part[0, 0]): part[:, 1:] for part in np.split(runs, edges) if len(part)}
        addresses = np.array([target.address or 0 for target in self.targets], dtype=np.uint64)
        return {
            number: File(
                self._shards[number], of.get(number, _NO_RUNS), self._strided.get(number, []), self.targets, addresses
            )
            for number in sorted({*of, *self._strided})
        }


class File:
    """One file, the spans that this rank needs of it, and what becomes of each of its blocks."""

    def __init__(
        self, shard: PlannedShard, runs: np.ndarray = _NO_RUNS, strided: Sequence[tuple[ByteRange, Target]] = (),
        targets: Sequence[Target] = (), addresses: np.ndarray = _NO_ADDRESSES,
    ) -> None:  # fmt: skip
        """`runs` are begin, end and offset of spans without a shape, and their target; `strided` are all others.
        `addresses` of the targets, 0 where bytes do not go there as they are.
        """
        self.shard, self.block_bytes = shard, shard.blocks.block_bytes
        self._runs, self._strided, self._targets = runs, strided, targets
        blocks = shard.blocks
        self._fate = np.zeros(len(blocks), dtype=np.uint8)
        self._reader = np.full(len(blocks), -1, dtype=np.int64)
        self._addresses = addresses[runs[:, 3]]
        some = runs[runs[:, 1] > runs[:, 0]]
        first, last = blocks.having(some[:, 0]), blocks.having(some[:, 1] - 1)
        straight = self._addresses[runs[:, 1] > runs[:, 0]] > 0
        for which, fate in ((straight, _STRAIGHT), (~straight, _BUFFERED)):
            edges = np.zeros(len(blocks) + 1, dtype=np.int64)
            np.add.at(edges, first[which], 1)
            np.add.at(edges, last[which] + 1, -1)
            self._fate[np.cumsum(edges[:-1]) > 0] = fate
        for span, target in strided:
            for begin, end in _touched(span, target.item, self.block_bytes):
                self._fate[blocks.at(begin) : blocks.at(end - 1) + 1] = _BUFFERED

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
        some, first, last = self._within(begin, end)
        assert (self._addresses[some] > 0).all(), "its blocks would go through a buffer"
        to = self._addresses[some] + (self._runs[some, 2] + first - self._runs[some, 0]).astype(np.uint64)
        return list(zip(first.tolist(), last.tolist(), to.tolist(), strict=True))

    def place(self, begin: int, end: int, memory: torch.Tensor) -> None:
        """Bytes `begin` to `end` of the file, which are in `memory`, go to all that needs some of them. Any thread."""
        some, first, last = self._within(begin, end)
        to = self._runs[some, 2] + first - self._runs[some, 0]
        targets = self._runs[some, 3].tolist()
        with torch.no_grad():
            for one, other, offset, target in zip(first.tolist(), last.tolist(), to.tolist(), targets, strict=True):
                self._targets[target].place_run(offset, memory[one - begin : other - begin])
            for span, of in self._strided:
                if span.begin < end and span.end > begin:
                    of.place(span, begin, end, memory)

    def _within(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of the runs have some of these bytes, and from where to where."""
        begins, ends = self._runs[:, 0], self._runs[:, 1]
        some = np.flatnonzero((begins < end) & (ends > begin))
        return some, np.maximum(begins[some], begin), np.minimum(ends[some], end)


def _touched(span: ByteRange, item: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """The bytes that have the span's elements, without gaps that could hold whole blocks."""
    if not span.shape or span.strides[0] * item <= block_bytes:
        yield span.begin, span.end
        return
    rest = (span.end - span.begin) - (span.shape[0] - 1) * span.strides[0] * item
    for row in range(span.shape[0]):
        begin = span.begin + row * span.strides[0] * item
        yield begin, begin + rest
