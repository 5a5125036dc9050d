# SPDX-License-Identifier: Apache-2.0
"""The headers of a commit, each read once in the job: a rank parses its share of them, and sends every other rank the
places of the tensors that this one may hold a part of.

What goes to one rank is numbers in arrays (little-endian, 64 bits each) and names in JSON: of a job of 512 ranks
there are a million tensors in headers. What goes to all is which tensors there are at all (`Summary`).
"""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerwise_dist import _native
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import contents
from layerwise_dist.restore.holdings import Holdings
from layerwise_dist.restore.reslice import run_of
from layerwise_dist.restore.states import States, pack, unpack
from layerwise_dist.restore.whole import SMALL_BYTES, blocks_of
from layerwise_dist.storage import strict_json
from layerwise_dist.storage.reader import Entry, Shard
from layerwise_dist.tensors.slices import ranks_of

FILES_A_RANK = 2  # of a saved rank: its shard, and its base
ROW = 5  # numbers: the tensor, the file, where it begins in it, the first element, how many


@dataclass
class Summary:
    """What all ranks hear of one tensor: name, the ranks that hold it together (as `Slice.among`), dtype and shape.

    `elements` of all parts that were read. `first` is the lowest rank that wrote some. `copies`: the ranks that have
    all of it for themselves, by a hash of what they have; a hash of its own where that is not known.
    """

    name: str
    among: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    first: int
    copies: dict[str, list[int]] = field(default_factory=dict)


class _Outbox:
    """What goes to one other rank."""

    def __init__(self) -> None:
        self.rows = array("Q")
        self.boxes: list[Any] = []  # tensor, file, begin, offsets, lengths
        self.tensors: set[int] = set()
        self.files: set[int] = set()

    def encode(self, tensors: Sequence[Summary], files: Mapping[int, tuple[list[int], bytes, bytes]]) -> bytes:
        names = {
            number: [of.name, of.among, of.dtype, of.shape, of.first] for number, of in _some(tensors, self.tensors)
        }
        about = [[number, *files[number][0]] for number in sorted(self.files)]
        tables = [table for number in sorted(self.files) for table in files[number][1:]]
        return pack([json.dumps([names, about, self.boxes]).encode(), self.rows.tobytes(), *tables])


def _some(tensors: Sequence[Summary], numbers: set[int]) -> list[tuple[int, Summary]]:
    return [(number, tensors[number]) for number in sorted(numbers)]


class Share:
    """What one rank has read of headers, in the order of the ranks that wrote them."""

    def __init__(self, manifest: Manifest, holdings: Sequence[Holdings], *, keep_all: bool = False) -> None:
        """`holdings` of all ranks of this job, by rank. `keep_all`: in `files` are also those that no rank needs."""
        self._manifest, self._holdings, self._keep_all = manifest, holdings, keep_all
        self._outgoing = [_Outbox() for _ in holdings]
        self.states = States()
        self.tensors: list[Summary] = []
        self._numbers: dict[tuple[str, str, str, tuple[int, ...]], int] = {}
        self._own_first: dict[str, int] = {}  # the lowest rank that has a tensor of this name for itself
        self.files: dict[int, tuple[list[int], bytes, bytes]] = {}  # numbers, layers and hashes, by file
        self.block_bytes: dict[int, int] = {}  # by file
        self.peeked_bytes = 0  # of small copies, read as they are to be compared
        self._absent: list[tuple[int, str]] = []

    def add(self, rank: int, shards: Sequence[Shard], sealed: SealedState) -> None:
        """A rank's shard, and its base if it has one. Raises DamageError or OSError."""
        entries = contents.entries(shards)
        numbers = {id(shard): FILES_A_RANK * rank + at for at, shard in enumerate(shards)}
        own: list[tuple[Summary, Shard, Entry]] = []
        for name, (shard, entry) in entries.items():
            part = entry.slice
            told = self._told(rank, entry)
            if not part.among:
                own.append((told, shard, entry))
                if self._own_first.setdefault(name, rank) != rank:
                    continue  # of several copies one is read, and that is the first
            self._tell(numbers[id(shard)], entry, sealed.get("aliases", {}).get(part.fqn, ()))
        for shard in shards:
            self._keep_file(numbers[id(shard)], shard)
        if self._manifest.world_size > 1:
            marks, peeked = _marks(own)
            self.peeked_bytes += peeked
            for (told, _, _), mark in zip(own, marks, strict=True):
                told.copies.setdefault(mark, []).append(rank)
        else:
            for told, _, _ in own:
                told.copies.setdefault("", []).append(rank)
        self.states.add(rank, sealed)
        missing = contents.absent(sealed, lambda kind, fqn: f"{kind}/{fqn}" in entries)
        self._absent += [(rank, name) for name in missing]

    def _told(self, rank: int, entry: Entry) -> Summary:
        part = entry.slice
        key = part.name, part.among, part.dtype, part.global_shape
        number = self._numbers.setdefault(key, len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(Summary(*key, 0, rank))
        told = self.tensors[number]
        if part.among:
            told.elements += part.numel
        elif part.numel != math.prod(part.global_shape):
            raise DamageError(
                f"step {self._manifest.step}: {part.name} of shape {list(part.global_shape)}: rank {rank} has it for "
                f"itself, and its shard has {part.place()} only"
            )
        return told

    def _tell(self, file: int, entry: Entry, aliases: Sequence[str]) -> None:
        part = entry.slice
        number = self._numbers[part.name, part.among, part.dtype, part.global_shape]
        run = run_of(part)
        for held, out in zip(self._holdings, self._outgoing, strict=True):
            if not held.needs(part.fqn, part, run) and not any(held.needs(name, part, run) for name in aliases):
                continue
            out.tensors.add(number)
            if not part.numel:
                continue
            out.files.add(file)
            if run is not None:
                out.rows.extend((number, file, entry.begin, *run))
            else:
                out.boxes.append([number, file, entry.begin, part.offsets, part.lengths])

    def _keep_file(self, number: int, shard: Shard) -> None:
        index = shard.index
        self.block_bytes[number] = index.blocks.block_bytes
        if self._keep_all or any(number in out.files for out in self._outgoing):
            layers = [(offset, nbytes) for _, offset, nbytes in index.layers if nbytes]
            hashes = array("Q", [each for each in index.hashes if each is not None])
            about = [index.size, index.blocks.block_bytes, int(index.hashed), len(layers)]
            self.files[number] = about, array("Q", [n for each in layers for n in each]).tobytes(), hashes.tobytes()

    def for_all(self) -> bytes:
        """The sealed states, and all tensors."""
        told = [[t.name, t.among, t.dtype, t.shape, t.elements, t.first, t.copies] for t in self.tensors]
        return pack([self.states.encode(), json.dumps(told).encode()])

    def for_each(self) -> list[bytes]:
        """By rank of this job, where in the files what it may need is."""
        return [out.encode(self.tensors, self.files) for out in self._outgoing]

    def check(self, holders: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """`holders` of all tensors by name: ranks that have it, together or for themselves. Raises DamageError for
        what a rank that was read here had at the boundary, and nobody wrote.
        """

        def held(rank: int, name: str) -> bool:
            kind, fqn = name.split("/", 1)
            kinds = ("param", "master") if kind == "param" else (kind,)  # one stands for the other
            return any(rank in ranks for each in kinds for ranks in holders.get(f"{each}/{fqn}", ()))

        problems = [
            f"{name}: rank {rank} had it at the boundary, but it is in no shard"
            for rank, name in self._absent
            if not held(rank, name)
        ]
        if problems:
            more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise DamageError(f"step {self._manifest.step}: {problems[0]}{more}")


def _marks(own: Sequence[tuple[Summary, Shard, Entry]]) -> tuple[list[str], int]:
    """Of tensors that one rank has for itself, what another rank's has in common exactly if it holds the same; where
    that is not known, something that no other has. And the bytes of files that were read for it.

    Small ones are read as they are, without their blocks: what is damaged in them looks like another value, and all
    that looks so is read once more, verified (`gathered`).
    """
    found: list[str] = []
    small = [(at, shard, entry) for at, (_, shard, entry) in enumerate(own) if entry.end - entry.begin <= SMALL_BYTES]
    content: dict[int, bytes] = {}
    for shard in {id(shard): shard for _, shard, _ in small}.values():
        mine = [(at, entry) for at, of, entry in small if of is shard]
        read = shard.peek([(entry.begin, entry.end) for _, entry in mine])
        content.update((at, data) for (at, _), data in zip(mine, read, strict=True))
    for at, (_, shard, entry) in enumerate(own):
        if at in content:
            found.append(f"{_native.xxh3_64(content[at]):016x}")
        elif (known := blocks_of(shard, entry)) is not None:
            begin, blocks = known
            text = struct.pack(f"<Q{2 * len(blocks)}Q", begin, *(n for block in blocks for n in block))
            found.append(f"blocks {_native.xxh3_64(text):016x} {entry.slice.cut}")
        else:
            found.append(f"rank {shard.index.rank}")
    return found, sum(map(len, content.values()))


def read_for_all(data: bytes) -> tuple[bytes, list[Summary]]:
    """Of `Share.for_all`: the states, encoded, and the tensors. Raises ValueError or TypeError."""
    states, told = unpack(data)
    return bytes(states), [
        Summary(name, among, dtype, tuple(shape), elements, first, copies)
        for name, among, dtype, shape, elements, first, copies in strict_json.loads(bytes(told))
    ]


def ranks_among(told: Summary, world_size: int) -> list[tuple[int, ...]]:
    """The ranks that have a tensor, together or each for itself."""
    if told.among:
        return [ranks_of(told.among, world_size)]
    return [(rank,) for ranks in told.copies.values() for rank in ranks]
