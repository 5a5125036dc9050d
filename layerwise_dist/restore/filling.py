# SPDX-License-Identifier: Apache-2.0
"""Fills memory from the spans of a plan, verified block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from layerwise_dist.restore.planned import Readable
from layerwise_dist.restore.planner import ByteRange
from layerwise_dist.restore.reslice import reach
from layerwise_dist.tensors.pieces import is_dense

_BUFFER_BYTES = 64 << 20  # of what lies otherwise in the file than in memory, read at once
_STAGED_BYTES = 256 << 20  # of what does not go straight into its tensor


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A tensor of this rank, wherever it is, and the spans that fill it. `dtype` is the file's."""

    tensor: torch.Tensor
    spans: Sequence[ByteRange]
    dtype: torch.dtype

    @property
    def straight(self) -> bool:
        """Whether the tensor's memory takes the bytes of the file as they are."""
        tensor = self.tensor
        return tensor.device.type == "cpu" and tensor.dtype == self.dtype and is_dense(tensor)

    def staging(self) -> torch.Tensor:
        """Memory for the bytes as the file has them."""
        return torch.empty(self.tensor.shape, dtype=self.dtype, device="cpu")


def load(reads: Iterable[Read]) -> None:
    """Each tensor from its spans, through memory of its own where it lies elsewhere or has another dtype: of 256 MiB,
    or of one tensor where that is larger. On DamageError or OSError tensors may be partly overwritten.
    """
    staged: list[Read] = []
    straight: list[Read] = []
    for read in reads:
        (straight if read.straight else staged).append(read)
    fill((read.tensor, read.spans) for read in straight)
    batch: list[tuple[Read, torch.Tensor]] = []
    held = 0
    for read in staged:
        memory = read.staging()
        if batch and held + memory.nbytes > _STAGED_BYTES:
            _unload(batch)
            batch, held = [], 0
        batch.append((read, memory))
        held += memory.nbytes
    _unload(batch)


def _unload(batch: Sequence[tuple[Read, torch.Tensor]]) -> None:
    fill((memory, read.spans) for read, memory in batch)
    with torch.no_grad():
        for read, memory in batch:
            read.tensor.copy_(memory)


def fill(reads: Iterable[tuple[torch.Tensor, Iterable[ByteRange]]]) -> None:
    """Each tensor from its spans. REQUIRES: tensors of host memory, row-major.

    What lies in the file as in the tensor is read straight into it, all of a shard in one call; the rest through a
    buffer of 64 MiB, or of one row where that is larger. On DamageError or OSError tensors may be partly overwritten.
    """
    straight: dict[int, tuple[Readable, list[tuple[int, int, int]]]] = {}
    strided: list[tuple[torch.Tensor, ByteRange]] = []
    for tensor, spans in reads:
        for span in spans:
            if span.shape:
                strided.append((tensor, span))
            else:
                _, ranges = straight.setdefault(id(span.shard), (span.shard, []))
                ranges.append((span.begin, span.end, tensor.data_ptr() + span.offset))
    for shard, ranges in straight.values():
        shard.read_into(ranges)
    for tensor, span in strided:
        for part in _chunks(span, tensor.element_size()):
            _scatter(tensor, part)


def _chunks(span: ByteRange, item: int) -> Iterator[ByteRange]:
    """The span, in parts along its first dimension whose bytes fit the buffer."""
    row = reach(span.shape[1:], span.strides[1:])
    rows = max(1, (_BUFFER_BYTES // item - row) // span.strides[0] + 1)
    for first in range(0, span.shape[0], rows):
        shape = (min(rows, span.shape[0] - first), *span.shape[1:])
        begin = span.begin + first * span.strides[0] * item
        yield replace(
            span, begin=begin, end=begin + reach(shape, span.strides) * item, shape=shape,
            offset=span.offset + first * span.target_strides[0] * item,
        )  # fmt: skip


def _scatter(tensor: torch.Tensor, span: ByteRange) -> None:
    item = tensor.element_size()
    read = torch.empty((span.end - span.begin) // item, dtype=tensor.dtype, device="cpu")
    span.shard.read_into([(span.begin, span.end, read.data_ptr())])
    source = read.as_strided(span.shape, span.strides)
    begin = tensor.storage_offset() + span.offset // item
    place = tensor.detach().view(-1).as_strided(span.shape, span.target_strides, begin)
    with torch.no_grad():
        place.copy_(source)
