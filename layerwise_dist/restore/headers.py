# SPDX-License-Identifier: Apache-2.0
"""The headers of a commit, each read once in the job: a rank parses its share of them, and sends every other rank the
places of the tensors that this one may hold a part of.

What goes to one rank is numbers in arrays (little-endian, 64 bits each): of a job of 512 ranks there are a million
tensors in headers. What goes to all is which tensors there are at all (`Summary`).
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from operator import is_
from typing import Any, cast

import numpy as np

from layerwise_dist import _native
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import contents
from layerwise_dist.restore.holdings import Holdings
from layerwise_dist.restore.reslice import run_of
from layerwise_dist.restore.states import States, pack, unpack
from layerwise_dist.restore.tally import Layout, Summary, Tally
from layerwise_dist.restore.whole import SMALL_BYTES, blocks_of
from layerwise_dist.storage import strict_json
from layerwise_dist.storage.entries import Entry
from layerwise_dist.storage.reader import Shard
from layerwise_dist.tensors.slices import ranks_text

FILES_A_RANK = 2  # of a saved rank: its shard, and its base
ROW = 5  # numbers: the tensor, the file, where it begins in it, the first element, how many


class _Outbox:
    """What goes to one other rank."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []  # [n, ROW] each
        self.boxes: list[Any] = []  # tensor, file, begin, offsets, lengths
        self.files: set[int] = set()

    def encode(self, files: Mapping[int, tuple[list[int], bytes, bytes]]) -> bytes:
        rows = np.concatenate(self.rows) if self.rows else np.empty((0, ROW), dtype="<u8")
        about = [[number, *files[number][0]] for number in sorted(self.files)]
        tables = [table for number in sorted(self.files) for table in files[number][1:]]
        return pack([json.dumps([about, self.boxes]).encode(), rows.tobytes(), *tables])


class Share:
    """What one rank has read of headers, in the order of the ranks that wrote them."""

    def __init__(
        self, manifest: Manifest, holdings: Sequence[Holdings], nearest: Sequence[int], *, keep_all: bool = False
    ) -> None:
        """`holdings` of all ranks of this job, by rank; `nearest` to each, as `Sight.nearest`. `keep_all`: in `files`
        are also those that no rank needs.
        """
        self._manifest, self._holdings, self._keep_all = manifest, holdings, keep_all
        self._nearest = nearest
        self._outgoing = [_Outbox() for _ in holdings]
        self.states = States()
        self._tally = Tally(manifest.step, holdings)
        self._own_first: dict[str, int] = {}  # the lowest rank that has a tensor of this name for itself
        self.files: dict[int, tuple[list[int], bytes, bytes]] = {}  # numbers, layers and hashes, by file
        self.block_bytes: dict[int, int] = {}  # by file
        self.peeked_bytes = 0  # of small copies, read as they are to be compared
        self._absent: list[tuple[int, str]] = []
        self._whole: list[Any] = []  # layouts, and what a state says of names, of a rank that lacked none

    def add(self, rank: int, shards: Sequence[Shard], sealed: SealedState) -> None:
        """A rank's shard, and its base if it has one. Raises DamageError or OSError."""
        contents.refuse_repeated(shards)
        layouts = [
            self._add(rank, FILES_A_RANK * rank + at, shard, sealed.get("aliases", {}))
            for at, shard in enumerate(shards)
        ]
        self.states.add(rank, sealed if rank < len(self._holdings) else _without_random_numbers(sealed))
        of: list[Any] = [*layouts, sealed["optimizer"], sealed.get("standing")]
        if len(of) == len(self._whole) and all(map(is_, of, self._whole)):
            return  # the same names as those of another rank, and nothing was absent
        missing = list(contents.absent(sealed, lambda kind, fqn: contents.has(shards, f"{kind}/{fqn}")))
        self._absent += [(rank, name) for name in missing]
        self._whole = [] if missing else of

    def _add(self, rank: int, file: int, shard: Shard, aliases: Mapping[str, Sequence[str]]) -> Layout:
        entries = shard.index.entries
        layout, elements = self._tally.add(rank, entries)
        # Of several copies one is read: the first; or, where all are equal, one that lies near what is read anyway.
        near = [at for at, nearest in enumerate(self._nearest) if nearest == rank]
        told, first = ~layout.own, self._own_first
        if not layout.told:
            names = entries.names
            told[[at for at in layout.owned.tolist() if first.setdefault(names[at], rank) == rank]] = True
            layout.told = True
        starts = layout.starts(entries)
        unsure = layout.unsure
        if aliases:
            unsure = unsure | np.array([name.split("/", 1)[1] in aliases for name in entries.names], dtype=bool)
        for at in np.flatnonzero(unsure & (told | layout.own) if near else unsure & told).tolist():
            entry = entries.at(at)
            to = range(len(self._outgoing)) if told[at] else near
            self._tell(file, int(layout.numbers[at]), entry, aliases.get(entry.slice.fqn, ()), to)
        sure = ~unsure & (elements > 0)
        ends = starts + elements
        for at, (out, low, high) in enumerate(zip(self._outgoing, layout.low, layout.high, strict=True)):
            mine = told | layout.own if at in near else told
            some = np.flatnonzero(mine & sure & (starts < high) & (ends > low))
            if len(some):
                rows = np.empty((len(some), ROW), dtype="<u8")
                rows[:, 0], rows[:, 1], rows[:, 2] = layout.numbers[some], file, entries.begins[some]
                rows[:, 3], rows[:, 4] = starts[some], elements[some]
                out.rows.append(rows)
                out.files.add(file)
        self._keep_file(file, shard)
        found = self._marks(shard, layout) if self._manifest.world_size > 1 else [""] * len(layout.owned)
        for number, mark in zip(layout.numbers[layout.owned].tolist(), found, strict=True):
            self._tally[number].copies.setdefault(mark, []).append(rank)
        return layout

    def _marks(self, shard: Shard, layout: Layout) -> list[str]:
        """Of what a rank has for itself. Small ones are read as they are, without their blocks: what is damaged in them
        looks like another value, and all that looks so is read once more, verified (`gathered`).
        """
        entries, own = shard.index.entries, layout.owned
        begins, ends = entries.begins[own], entries.ends[own]
        small = ends - begins <= SMALL_BYTES
        data = shard.peek(begins[small], ends[small])
        self.peeked_bytes += len(data)
        if not small.all():
            return marks(shard, own, data)
        if layout.marks is None or layout.marks[0] != data:
            layout.marks = data, marks(shard, own, data)
        return layout.marks[1]

    def _tell(self, file: int, number: int, entry: Entry, aliases: Sequence[str], to: Iterable[int]) -> None:
        part = entry.slice
        run = run_of(part)
        for held, out in ((self._holdings[at], self._outgoing[at]) for at in to):
            if not held.needs(part.fqn, part, run) and not any(held.needs(name, part, run) for name in aliases):
                continue
            if not part.numel:
                continue
            out.files.add(file)
            if run is not None:
                out.rows.append(np.array([[number, file, entry.begin, *run]], dtype="<u8"))
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

    @property
    def tensors(self) -> list[Summary]:
        """All that were read, numbered as in `for_each`."""
        return self._tally.tensors

    def for_all(self) -> bytes:
        """The sealed states, and all tensors."""
        told = [
            [t.name, t.among, t.dtype, t.shape, t.elements, t.first]
            + [{mark: _told(tuple(ranks)) for mark, ranks in t.copies.items()}]
            for t in self._tally.tensors
        ]
        return pack([self.states.encode(), json.dumps(told).encode()])

    def for_each(self) -> list[bytes]:
        """By rank of this job, where in the files what it may need is: of tensors by their numbers in `for_all`."""
        return [out.encode(self.files) for out in self._outgoing]

    def check(self, told: Mapping[str, Sequence[Summary]]) -> None:
        """`told` by all ranks, by name. Raises DamageError for what a rank that was read here had at the boundary, and
        nobody wrote.
        """

        def held(rank: int, name: str) -> bool:
            kind, fqn = name.split("/", 1)
            kinds = ("param", "master") if kind == "param" else (kind,)  # one stands for the other
            every = (each for kind in kinds for each in told.get(f"{kind}/{fqn}", ()))
            return any(rank in ranks for each in every for ranks in ranks_among(each, self._manifest.world_size))

        problems = [
            f"{name}: rank {rank} had it at the boundary, but it is in no shard"
            for rank, name in self._absent
            if not held(rank, name)
        ]
        if problems:
            more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise DamageError(f"step {self._manifest.step}: {problems[0]}{more}")


def _without_random_numbers(sealed: SealedState) -> SealedState:
    """Of a rank that this job has not: those of its boundary go to nobody."""
    kept = {name: each for name, each in sealed["boundary"].items() if name not in ("rng", "rng_after")}
    return cast(SealedState, {**sealed, "boundary": kept})


def marks(shard: Shard, own: np.ndarray, data: bytes) -> list[str]:
    """Of tensors that one rank has for itself, what another rank's has in common exactly if it holds the same; where
    that is not known, something that no other has. `own` are their numbers in the file, `data` the bytes of the small
    ones.
    """
    entries = shard.index.entries
    found: list[str] = []
    place = 0
    for at, nbytes in zip(own.tolist(), (entries.ends[own] - entries.begins[own]).tolist(), strict=True):
        if nbytes <= SMALL_BYTES:
            found.append(f"{_native.xxh3_64(data[place : place + nbytes]):016x}")
            place += nbytes
            continue
        entry = entries.at(at)
        if (known := blocks_of(shard, entry)) is not None:
            begin, blocks = known
            text = struct.pack(f"<Q{2 * len(blocks)}Q", begin, *(n for block in blocks for n in block))
            found.append(f"blocks {_native.xxh3_64(text):016x} {entry.slice.cut}")
        else:
            found.append(f"rank {shard.index.rank}")
    return found


@lru_cache(maxsize=1 << 12)
def _told(ranks: tuple[int, ...]) -> str | int:
    return ranks_text(ranks) or ranks[0]


def _by_mark(told: Mapping[str, Any], world_size: int) -> dict[str, list[int]]:
    """Raises ValueError or TypeError for what is none of `_told`."""
    return {
        mark: [each] if type(each) is int else list(contents.ranks_of(each, world_size)) for mark, each in told.items()
    }


def read_for_all(data: bytes, world_size: int) -> tuple[bytes, list[Summary]]:
    """Of `Share.for_all`: the states, encoded, and the tensors. `world_size` of the checkpoint. Raises ValueError or
    TypeError.
    """
    states, told = unpack(data)
    return bytes(states), [
        Summary(name, among, dtype, tuple(shape), elements, first, _by_mark(copies, world_size))
        for name, among, dtype, shape, elements, first, copies in strict_json.loads(bytes(told))
    ]


def ranks_among(told: Summary, world_size: int) -> list[tuple[int, ...]]:
    """The ranks that have a tensor, together or each for itself."""
    if told.among:
        return [contents.ranks_of(told.among, world_size)]
    return [(rank,) for ranks in told.copies.values() for rank in ranks]
