# SPDX-License-Identifier: Apache-2.0
"""A commit as whole tensors, for a job with another cut: each rank reads its share of the headers, and the others
send it what it may need of theirs.
"""

from __future__ import annotations

import ctypes
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from layerwise_dist.commit.exchange import Exchange
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, MismatchError
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import contents, copies, filling, headers, states
from layerwise_dist.restore.gathered_tensor import GatheredTensor
from layerwise_dist.restore.headers import FILES_A_RANK, ROW, Share
from layerwise_dist.restore.holdings import Holdings
from layerwise_dist.restore.planned import Files, PlannedShard, Readable
from layerwise_dist.restore.planner import ByteRange
from layerwise_dist.restore.sealed_state import SeenStates
from layerwise_dist.restore.sight import Sight
from layerwise_dist.restore.source import unlike_words
from layerwise_dist.restore.tally import Summary
from layerwise_dist.restore.whole import SavedTensor, first_unlike
from layerwise_dist.storage import strict_json
from layerwise_dist.storage.entries import Entry
from layerwise_dist.storage.header import Blocks
from layerwise_dist.storage.reader import Shard
from layerwise_dist.tensors.slices import ITEM_BYTES, Slice


class Gathered:
    """What all ranks have read of a commit's headers together, as far as it concerns this rank.

    Attributes:
        sealed: what each rank of the checkpoint sealed, by rank.
        tensors: by name. Of several copies under one name the first.
        unlike: names whose copies are not equal, with the ranks of two that differ.
        shards: files that this rank may read a part of, by number.
        files: all that is read of blocks is read by it, and all that was read of tensors is counted by it.
        block_bytes: of the files whose headers this rank has read, by number. Where not all see them, they are among
            `shards`: it may have to read them for others.
    """

    def __init__(
        self, manifest: Manifest, open_shards: Callable[[int], Sequence[Shard]], files: Files, exchange: Exchange,
        holdings: Holdings, needed: Callable[[str], bool], sight: Sight,
    ) -> None:  # fmt: skip
        """All ranks together. `open_shards(rank)` gives that rank's shard, then its base if it has one; `needed(kind)`:
        whether copies of that kind must be equal.

        Raises DamageError, also where shards disagree about a tensor; MismatchError for copies that can't be compared;
        OSError; what `Exchange.all_to_all` raises.
        """
        self.manifest, self._open, self.files, self._sight = manifest, open_shards, files, sight
        self._brought: dict[tuple[int, int, int], bytes] = {}  # by file, begin and end
        every = exchange.all_to_all("tell what it holds", [holdings.encode()] * exchange.world_size)
        seen = SeenStates(manifest.framework)
        nearest = [sight.nearest(rank) for rank in range(exchange.world_size)]
        held = [holdings if rank == exchange.rank else Holdings.decode(each) for rank, each in enumerate(every)]
        share = Share(manifest, held, nearest, keep_all=sight.seen is not None)
        self._nearest = nearest[exchange.rank]
        for rank in sight.read_by(exchange.rank):
            shards = open_shards(rank)
            share.add(rank, shards, seen.read(shards[0]))
            exchange.bytes_read += sum(shard.header_bytes for shard in shards)
        files.read(share.peeked_bytes)
        self.block_bytes = share.block_bytes
        heard = exchange.all_to_all("read headers", [share.for_all()] * exchange.world_size)
        told, numbered = self._take_all(heard, share, exchange.rank)
        share.check(told)
        self._take_mine(exchange.all_to_all("tell what is where", share.for_each()), numbered)
        if sight.seen is not None:
            for number, (of, layers, hashes) in share.files.items():
                if number not in self.shards:
                    self.shards[number] = self._shard(number, of, memoryview(layers), memoryview(hashes))
        self.unlike = self._compare(told, exchange, needed)

    # -- what all ranks hear -------------------------------------------------------------------------------------

    def _take_all(
        self, heard: Sequence[bytes], own: Share, rank: int
    ) -> tuple[dict[str, list[Summary]], list[list[Summary]]]:  # fmt: skip
        """All tensors by name, and by who told of them; `own` is what this rank told, `rank`."""
        sealed = own.states.sealed()
        numbered: list[list[Summary]] = []
        for other, message in enumerate(heard):
            if other == rank:
                numbered.append(own.tensors)
                continue
            encoded, found = headers.read_for_all(message, self.manifest.world_size)
            sealed |= states.decode(encoded)
            numbered.append(found)
        self.sealed: list[SealedState] = [sealed[saved] for saved in range(self.manifest.world_size)]
        merged: dict[tuple[str, str, str, tuple[int, ...]], Summary] = {}
        for each in (each for found in numbered for each in found):
            known = merged.setdefault((each.name, each.among, each.dtype, each.shape), each)
            if known is each:
                continue
            known.elements += each.elements
            known.first = min(known.first, each.first)
            for mark, ranks in each.copies.items():
                known.copies.setdefault(mark, []).extend(ranks)
        told: dict[str, list[Summary]] = {}
        for each in sorted(merged.values(), key=lambda each: each.first):
            told.setdefault(each.name, []).append(each)
        self.tensors = {name: self._chosen(found) for name, found in told.items()}
        self._check(told)
        return told, numbered

    def _chosen(self, told: Sequence[Summary]) -> GatheredTensor:
        """Of several copies the first; where all are equal, the one that is nearest to what this rank reads anyway."""
        first = told[0]
        if first.among:
            ranks = contents.ranks_of(first.among, self.manifest.world_size)
            return GatheredTensor(first.name, first.among, ranks, first.dtype, first.shape)
        alike = len(told) == len(first.copies) == 1 and self._nearest in next(iter(first.copies.values()))
        copy = self._nearest if alike else first.first
        return GatheredTensor(first.name, "", (first.first,), first.dtype, first.shape, copy=copy)

    def _check(self, told: Mapping[str, Sequence[Summary]]) -> None:
        """That there is all of what is held together, and in one shape. Raises DamageError."""
        problems: list[str] = []
        for name, found in told.items():
            groups: dict[str, list[Summary]] = {}
            for each in found:
                if not each.among:
                    continue
                groups.setdefault(each.among, []).append(each)
                total = int(np.prod(each.shape, dtype=object))
                if each.elements < total:
                    problems.append(
                        f"{name} of shape {list(each.shape)}: shards have {each.elements} of its {total} elements"
                    )
            for among, alike in groups.items():
                if len(alike) > 1:
                    shapes = " and ".join(sorted(f"{each.dtype}{list(each.shape)}" for each in alike))
                    problems.append(f"{name}: it is one tensor shared by ranks {among}, and shards have {shapes}")
        if problems:
            more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise DamageError(f"step {self.manifest.step}: {problems[0]}{more}")

    @cached_property
    def state_kinds(self) -> dict[str, list[str]]:
        """Kinds of optimizer state that are tensors, by the parameter's fqn."""
        return contents.state_kinds(self.tensors)

    def spans(self, name: str, wanted: Slice) -> Sequence[ByteRange]:
        """As `GatheredTensor.spans`."""
        return self.tensors[name].spans(wanted, self.shards)

    # -- what this rank hears ------------------------------------------------------------------------------------

    def _take_mine(self, heard: Sequence[bytes], numbered: Sequence[Sequence[Summary]]) -> None:
        self.shards: dict[int, PlannedShard] = {}
        for data, told in zip(heard, numbered, strict=True):
            head, rows, *tables = states.unpack(data)
            about, boxes = strict_json.loads(bytes(head))
            for at, (number, *of) in enumerate(about):
                self.shards[number] = self._shard(number, of, *tables[2 * at : 2 * at + 2])
            table = np.frombuffer(rows, dtype="<u8").reshape(-1, ROW)
            order = np.argsort(table[:, 0], kind="stable")
            table = table[order]
            bounds = np.flatnonzero(np.diff(table[:, 0])) + 1
            for group_rows in np.split(table, bounds) if len(table) else ():
                if (tensor := self._read_of(told[int(group_rows[0, 0])])) is not None:
                    if tensor.copy is not None:
                        group_rows = group_rows[group_rows[:, 1] // FILES_A_RANK == tensor.copy]
                    tensor.rows.append(group_rows)
            for number, file, begin, offsets, lengths in boxes:
                if (tensor := self._read_of(told[number])) is not None:
                    tensor.boxes.append((file, begin, tuple(offsets), tuple(lengths)))

    def _read_of(self, told: Summary) -> GatheredTensor | None:
        """The tensor that is read, if this is of it, and not of another one under its name."""
        found = self.tensors[told.name]
        same = (found.among, found.dtype, found.shape) == (told.among, told.dtype, told.shape)
        return found if same else None

    def _shard(self, number: int, about: Sequence[int], layers: memoryview, hashes: memoryview) -> PlannedShard:
        size, block_bytes, hashed, _ = about
        places = array("Q", bytes(layers))
        blocks = Blocks([("", *each) for each in zip(places[::2], places[1::2], strict=True)], block_bytes)
        known: Sequence[int | None] = array("Q", bytes(hashes)) if hashed else [None] * len(blocks)
        rank, which = divmod(number, FILES_A_RANK)
        return self._planned(number, rank, which, size, blocks, known)

    def _planned(
        self, number: int, rank: int, which: int, size: int, blocks: Blocks, hashes: Sequence[int | None]
    ) -> PlannedShard:
        path = self.files.path(rank, which)
        return PlannedShard(number, rank, path, size, blocks, hashes, self.files, lambda: self._open(rank)[which])

    # -- single elements that are needed before anything is dealt out -------------------------------------------------

    def bring(self, exchange: Exchange, names: Iterable[str]) -> None:
        """All ranks together: of tensors without dimensions that this rank may need, those that it does not see, so
        that `fill` has them. Raises DamageError, OSError, and what `Exchange.all_to_all` raises.
        """
        places: list[list[tuple[int, int, int]]] = [[] for _ in range(exchange.world_size)]
        for name in names:
            found = self.tensors[name]
            if found.shape or not found.has_parts:
                continue
            kind, fqn = name.split("/", 1)
            for span in found.spans(Slice.whole(kind, fqn, found.dtype, ()), self.shards):
                assert isinstance(span.shard, PlannedShard)
                if not self._sight.sees(exchange.rank, span.shard.rank):
                    places[self._sight.readers[span.shard.rank]].append((span.shard.number, span.begin, span.end))
        asked = exchange.all_to_all("ask for counts", [json.dumps(each).encode() for each in places])
        heard = exchange.all_to_all("send counts", [self._elements(strict_json.loads(each)) for each in asked])
        for there, answer in zip(places, heard, strict=True):
            self._brought.update(zip(there, map(bytes, states.unpack(answer)), strict=True))

    def _elements(self, places: Sequence[Sequence[int]]) -> bytes:
        """What this rank has read the headers of, verified. Raises ValueError for what is no single element of it."""
        for number, begin, end in places:
            if number not in self.block_bytes or not 0 < end - begin <= max(ITEM_BYTES.values()):
                raise ValueError(f"asked for bytes {begin} to {end} of file {number} as for a count")
        found = [bytearray(end - begin) for _, begin, end in places]
        by_file: dict[int, list[tuple[int, int, int]]] = {}
        views = [(ctypes.c_char * len(each)).from_buffer(each) for each in found]
        for (number, begin, end), view in zip(places, views, strict=True):
            by_file.setdefault(number, []).append((begin, end, ctypes.addressof(view)))
        for number, spans in by_file.items():
            self.shards[number].read_into(spans)
        return states.pack(bytes(each) for each in found)

    def fill(self, reads: Iterable[tuple[torch.Tensor, Sequence[ByteRange]]]) -> None:
        """As `filling.fill`, also of what was brought."""
        here: list[tuple[torch.Tensor, Sequence[ByteRange]]] = []
        for tensor, spans in reads:
            for span in spans:
                assert isinstance(span.shard, PlannedShard)
                brought = self._brought.get((span.shard.number, span.begin, span.end))
                if brought is None:
                    here.append((tensor, [span]))
                else:
                    ctypes.memmove(tensor.data_ptr() + span.offset, brought, len(brought))
        filling.fill(here)

    # -- copies --------------------------------------------------------------------------------------------------

    def _compare(
        self, told: Mapping[str, Sequence[Summary]], exchange: Exchange, needed: Callable[[str], bool]
    ) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of copies that the headers do not show to be equal each of the ranks reads some, verified: of some tensors
        all copies, or, where no rank sees all copies, of all tensors those that it sees.
        """
        unsure = {
            name: [ranks for each in found for ranks in headers.ranks_among(each, self.manifest.world_size)]
            for name, found in told.items()
            if needed(name.split("/", 1)[0]) and (len(found) > 1 or len(found[0].copies) > 1)
        }
        if not unsure:
            return {}
        if self._sight.seen is not None:
            mine_hashed = [
                each
                for rank in self._sight.read_by(exchange.rank)
                for each in copies.hashed(self._parts_of(rank, unsure.keys(), exchange))
            ]
            heard = exchange.all_to_all("compare copies", [json.dumps(mine_hashed).encode()] * exchange.world_size)
            return copies.unlike([found for each in heard for found in strict_json.loads(each)])
        mine = {name: sorted(unsure[name]) for name in sorted(unsure)[exchange.rank :: exchange.world_size]}
        parts: dict[str, dict[tuple[int, ...], list[tuple[Readable, Entry]]]] = {name: {} for name in mine}
        for rank in sorted({rank for groups in mine.values() for ranks in groups for rank in ranks}):
            for name, group, part in self._parts_of(rank, mine.keys(), exchange):
                parts[name].setdefault(group, []).append(part)
        found = first_unlike(
            {name: [SavedTensor(ranks, group) for ranks, group in groups.items()] for name, groups in parts.items()}
        )
        said = json.dumps([[name, one.ranks, other.ranks] for name, (one, other) in found.items()]).encode()
        heard = exchange.all_to_all("compare copies", [said] * exchange.world_size)
        return {name: (tuple(one), tuple(other)) for each in heard for name, one, other in strict_json.loads(each)}

    def _parts_of(
        self, rank: int, names: Collection[str], exchange: Exchange
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[Readable, Entry]]]:
        """What one rank wrote of these tensors, each with the ranks that hold it together."""
        shards = self._open(rank)
        exchange.bytes_read += sum(shard.header_bytes for shard in shards)
        light = {
            id(shard): self._planned(
                FILES_A_RANK * rank + at, rank, at, shard.index.size, shard.index.blocks, shard.index.hashes
            )
            for at, shard in enumerate(shards)
        }
        for name, (shard, entry) in contents.entries(shards).items():
            if name in names:
                yield name, tuple(contents.gathered(self.manifest, rank, entry)), (light[id(shard)], entry)

    def differs(self, name: str) -> bool:
        """REQUIRES: `needed` named its kind."""
        return name in self.unlike

    def refuse_unlike(self, needed: Callable[[str], bool]) -> None:
        """Raises MismatchError where copies of a tensor of a kind that is `needed` are not equal to the bit."""
        for name, (one, other) in self.unlike.items():
            if needed(name.split("/", 1)[0]):
                raise MismatchError(unlike_words(name, one, other))
