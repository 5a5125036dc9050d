# SPDX-License-Identifier: Apache-2.0
"""What a rank holds alike with others, cut into blocks: a hundredth of them is compared with each checkpoint.

Host memory is hashed at the boundary, by the training thread: nothing can change it meanwhile, and a hundredth of the
state is little beside the update, which passes over all of it. Device memory is summed up by the device, in the
training's own stream: after the update that it follows, and before the next. The host waits for neither; it sends the
sums along with the next checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from layerwise_dist import _native
from layerwise_dist.capture.audit import ROUND, WINDOW_BYTES
from layerwise_dist.commit.messages import Sampled
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.tensors.pieces import Piece, is_dense
from layerwise_dist.tensors.slices import Slice

MOST_BLOCKS = 64  # a checkpoint, unless there are more than a hundred times as many tensors: blocks get larger instead
_CHUNK_BYTES = 64 << 20  # of device memory that are on the host at once
_MASK = (1 << 64) - 1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes `begin` to `end` of piece number `piece`, which has `number` blocks before it."""

    piece: int
    number: int
    begin: int
    end: int


class Common:
    """What this rank holds alike with the same other ranks, in an order that is the same on all of them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = list(pieces)
        self.listing = digest(" ".join(place_of(piece.slice)) for piece in self.pieces)
        nbytes = sum(piece.slice.nbytes for piece in self.pieces)
        size = WINDOW_BYTES * max(1, -(-nbytes // (ROUND * MOST_BLOCKS * WINDOW_BYTES)))
        # What is not row-major can't be read in part without a copy of all of it: it is one block.
        self.blocks = [
            Block(number, count, begin, min(begin + step, piece.slice.nbytes))
            for number, piece in enumerate(self.pieces)
            for step in [size if piece.dense else max(1, piece.slice.nbytes)]
            for count, begin in enumerate(range(0, piece.slice.nbytes, step))
        ]
        self._on_host = [block for block in self.blocks if self.pieces[block.piece].on_host]
        self._elsewhere = [block for block in self.blocks if not self.pieces[block.piece].on_host]

    def hashes(self) -> list[str]:
        """Of each piece, all of it."""
        return [hash_of(piece) for piece in self.pieces]

    def new(self, known: set[str]) -> list[str]:
        """What is not among these names, and a hash of it: all of it, since nobody has compared it yet. Empty if there
        is nothing. `known` has it from then on.
        """
        pieces = [piece for piece in self.pieces if piece.slice.name not in known]
        known.update(piece.slice.name for piece in pieces)
        if not pieces:
            return []
        return [digest(piece.slice.name for piece in pieces), digest(map(hash_of, pieces))]

    def sample(self, attempt: AttemptId, *, name: bool) -> Sampled:
        """Hashes of the attempt's blocks in host memory, as they are now; with `name`, what these blocks are."""
        chosen = self._sorted(in_turn(self._on_host, attempt.seq))
        hashes = [_hash(self.pieces[block.piece].tensor, block.begin, block.end) for block in chosen]
        return self.said(attempt, chosen, hashes, name=name, late=False)

    def sums(self, attempt: AttemptId) -> Sums | None:
        """Those of the attempt's blocks in device memory, on their way to the host."""
        chosen = self._sorted(in_turn(self._elsewhere, attempt.seq))
        return Sums(self, attempt, chosen) if chosen else None

    def _sorted(self, blocks: list[Block]) -> list[Block]:
        """Parameters first."""
        return sorted(blocks, key=lambda block: not is_param(self.pieces[block.piece].slice.name))

    def said(
        self, attempt: AttemptId, blocks: Sequence[Block], hashes: Sequence[str], *, name: bool, late: bool
    ) -> Sampled:
        """As rank 0 hears it; hashes in the order of the blocks."""
        params = sum(is_param(self.pieces[block.piece].slice.name) for block in blocks)
        return {
            "seq": attempt.seq, "step": attempt.step, "late": late,
            "params": "".join(hashes[:params]), "state": "".join(hashes[params:]),
            "blocks": [self.words(block) for block in blocks] if name else [],
        }  # fmt: skip

    def words(self, block: Block) -> str:
        """Tensor, block and bytes."""
        part = self.pieces[block.piece].slice
        if part.nbytes == block.end - block.begin:
            return f"{part.name} (block 0: all {part.nbytes} bytes)"
        return f"{part.name} (block {block.number}: bytes {block.begin} to {block.end})"


class Sums:
    """Of blocks in device memory, one 64-bit number each, which any one changed element changes."""

    def __init__(self, common: Common, attempt: AttemptId, blocks: Sequence[Block]) -> None:
        """The devices begin with them in their current streams, after all that they were given before."""
        self._common, self._attempt, self._blocks = common, attempt, blocks
        sums: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        with torch.no_grad():
            for number, block in enumerate(blocks):
                tensor = common.pieces[block.piece].tensor
                sums.setdefault(tensor.device, []).append((number, _sum(tensor, block.begin, block.end)))
            self._found = [
                ([number for number, _ in each], *_to_host(torch.stack([total for _, total in each])))
                for each in sums.values()
            ]

    def said(self, *, name: bool) -> Sampled:
        """Waits until the devices have come so far."""
        hashes = [""] * len(self._blocks)
        for numbers, totals, mark in self._found:
            if mark is not None:
                mark.synchronize()
            for number, total in zip(numbers, totals.tolist(), strict=True):
                hashes[number] = f"{total & _MASK:016x}"
        return self._common.said(self._attempt, self._blocks, hashes, name=name, late=True)


def in_turn(blocks: Sequence[_T], turn: int) -> list[_T]:
    """A hundredth of them, at least one; the next ones in the next turn, so that a hundred turns have all."""
    count = -(-len(blocks) // ROUND)
    return [blocks[(turn * count + number) % len(blocks)] for number in range(count)]


def place_of(part: Slice) -> tuple[str, str]:
    where = f"{part.start}+{part.length}" if part.is_flat else f"{part.offsets}+{part.lengths}"
    return part.name, f"{part.dtype} {part.global_shape} {where}"


def is_param(name: str) -> bool:
    return name.startswith(("param/", "master/"))


def digest(texts: Iterable[str]) -> str:
    return f"{_native.xxh3_64(chr(10).join(texts).encode()):016x}"


def hash_of(piece: Piece) -> str:
    """Of all of it, wherever it lies; of a tensor that is not row-major as if it were."""
    return _hash(piece.tensor, 0, piece.slice.nbytes)


def _hash(tensor: torch.Tensor, begin: int, end: int) -> str:
    data = None
    if tensor.device.type != "cpu" or not is_dense(tensor):
        data = _bytes_of(tensor)
    hashes = []
    for at in range(begin, end, _CHUNK_BYTES):
        stop = min(end, at + _CHUNK_BYTES)
        if data is None:
            hashed = _native.hash_memory(tensor.data_ptr() + at, stop - at)
        else:
            copy = data[at:stop].cpu()
            hashed = _native.hash_memory(copy.data_ptr(), stop - at)
        hashes.append(f"{hashed:016x}")
    return digest(hashes)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """In row-major order."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _sum(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Of these bytes: the sum of each word times the odd number that its place has, modulo 2**64. An odd factor has an
    inverse, so another word in one place is another sum. Where the tensor lies in its storage, which other ranks may
    have elsewhere, has no part in it.
    """
    data = _bytes_of(tensor)[begin:end]
    for kind in (torch.int64, torch.int32):
        if data.numel() % kind.itemsize == 0:
            data = (data.clone() if data.storage_offset() % kind.itemsize else data).view(kind)
            break
    words = data.to(torch.int64)
    return (words * torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)).sum()


def _to_host(totals: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Numbers that are there once the mark is reached."""
    if totals.device.type != "cuda":
        return totals.cpu(), None
    found = torch.empty(totals.shape, dtype=totals.dtype, device="cpu", pin_memory=True).copy_(
        totals, non_blocking=True
    )
    mark = torch.cuda.Event()
    mark.record(torch.cuda.current_stream(totals.device))
    return found, mark
