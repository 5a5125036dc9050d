# SPDX-License-Identifier: Apache-2.0
"""On disks of nodes: headers of shards that a rank does not see, sent by one that does, and what is read by them.

A job that is cut as the checkpoint is needs of each rank what that rank wrote, wherever it is now. Its plan is made of
headers as if it saw all files (`loader`); who reads which block is dealt out as for another cut (`handing`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from layerwise_dist.commit.exchange import Exchange
from layerwise_dist.commit.records import Manifest
from layerwise_dist.restore.filling import Read
from layerwise_dist.restore.headers import FILES_A_RANK
from layerwise_dist.restore.planned import Files, PlannedShard
from layerwise_dist.restore.sight import Sight
from layerwise_dist.restore.states import pack, unpack
from layerwise_dist.storage import strict_json
from layerwise_dist.storage.reader import Shard

Opened = Sequence[Shard]


class Sent:
    """What one rank knows of the shards that it needs, and of those that it reads for others.

    Attributes:
        block_bytes: of the files whose headers this rank reads for all, by number.
        shards: by number, to be read by.
    """

    def __init__(
        self, manifest: Manifest, exchange: Exchange, sight: Sight, open_shards: Callable[[int], Opened],
        elsewhere: Callable[[int, Sequence[bytes], bytes | None], Opened], needed: Collection[int],
        states: Collection[int],
    ) -> None:  # fmt: skip
        """All ranks together. `open_shards(rank)` opens a rank's shard, then its base if it has one; `elsewhere(rank,
        headers, state)` makes them of what was sent. `needed` are the ranks of the checkpoint whose files this rank
        needs, `states` those whose sealed states too.

        Raises DamageError, OSError, and what `Exchange.all_to_all` raises.
        """
        self._open = open_shards
        self._known: dict[int, Opened] = {rank: open_shards(rank) for rank in sight.read_by(exchange.rank)}
        self._homes = frozenset(self._known)
        asked: list[list[tuple[int, bool]]] = [[] for _ in range(exchange.world_size)]
        for rank in sorted(needed):
            if not sight.sees(exchange.rank, rank):
                asked[sight.readers[rank]].append((rank, rank in states))
            elif rank not in self._known:
                self._known[rank] = open_shards(rank)
        questions = exchange.all_to_all("ask for headers", [json.dumps(each).encode() for each in asked])
        exchange.bytes_read += sum(shard.header_bytes for shards in self._known.values() for shard in shards)
        answers: dict[bytes, bytes] = {}  # ranks of one node ask for the same
        for question in questions:
            if question not in answers:
                answers[question] = self._answer(question, exchange, manifest.world_size)
        heard = exchange.all_to_all("send headers", [answers[question] for question in questions])
        for there, answer in zip(asked, heard, strict=True):
            parts = iter(unpack(answer))
            for rank, with_state in there:
                count = 1 + (manifest.shards[rank].base is not None)
                headers = [bytes(next(parts)) for _ in range(count)]
                self._known[rank] = elsewhere(rank, headers, bytes(next(parts)) if with_state else None)
        self.block_bytes: dict[int, int] = {}
        self.shards: dict[int, PlannedShard] = {}

    def _answer(self, question: bytes, exchange: Exchange, world_size: int) -> bytes:
        parts: list[bytes] = []
        for rank, with_state in strict_json.loads(question):
            if type(rank) is not int or rank not in self._homes:
                raise ValueError(f"asked for the headers of rank {rank!r} of {world_size}, which others read")
            shards = self._known[rank]
            parts += [shard.header() for shard in shards]
            if with_state:
                parts.append(bytes(shards[0].state_extent()))
        exchange.bytes_read += sum(map(len, parts))
        return pack(parts)

    def of(self, rank: int) -> Opened:
        """A rank's shard, and its base. REQUIRES: it was `needed`."""
        return self._known[rank]

    def planned(self, reads: Sequence[Read], files: Files) -> list[Read]:
        """The same reads, of files as `handing` takes them, which from now on are in `shards`."""
        by_identity: dict[int, PlannedShard] = {}
        for rank, shards in self._known.items():
            for which, shard in enumerate(shards):
                number, index = FILES_A_RANK * rank + which, shard.index
                planned = PlannedShard(
                    number, rank, files.path(rank, which), index.size, index.blocks, index.hashes, files,
                    self._opener(rank, which),
                )  # fmt: skip
                by_identity[id(shard)] = self.shards[number] = planned
                if rank in self._homes:
                    self.block_bytes[number] = index.blocks.block_bytes
        return [_of(read, by_identity) for read in reads]

    def _opener(self, rank: int, which: int) -> Callable[[], Shard]:
        return lambda: self._open(rank)[which]


def _of(read: Read, planned: Mapping[int, PlannedShard]) -> Read:
    spans = [replace(span, shard=planned[id(span.shard)]) for span in read.spans]
    return Read(read.tensor, spans, read.dtype)
