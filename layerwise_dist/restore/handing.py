# SPDX-License-Identifier: Apache-2.0
"""Reads what this rank needs of shards. A block that several ranks need is read and verified by one of them, which
hands it to the others; where all need all, as under DDP, each reads its share.

For each file one rank, the one that has read its header, hears which blocks each rank needs, and says who reads those
that several do (`_deal`). Blocks that nobody else needs are read straight into place where the tensor
takes the bytes of the file as they are. The rest goes through a buffer of a few blocks, also what is handed on.

On disks of nodes a block is read by a rank that sees the file: one that needs it, or else the one that has read the
header.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from layerwise_dist.commit.exchange import PART_BYTES, Exchange, PeerFailed
from layerwise_dist.errors import DamageError
from layerwise_dist.restore import collector, filling
from layerwise_dist.restore.filling import Read
from layerwise_dist.restore.headers import FILES_A_RANK
from layerwise_dist.restore.placing import File, Spans
from layerwise_dist.restore.planned import PlannedShard, Readable
from layerwise_dist.restore.sight import Sight
from layerwise_dist.restore.states import pack, unpack
from layerwise_dist.storage import strict_json

BUFFER_BYTES = 8 << 20  # of blocks that are read at once to be handed on, or of one block where that is larger
# Of blocks that go straight into place at once: between two calls others hear that this rank gets on.
_AT_ONCE_BYTES = 256 << 20
# Numbers in a row: file, first and last block; and who reads them, and which set of ranks needs them.
_NEED, _DEALT = 3, 5


class Handing:
    """One rank's part of it. All ranks together: `plan`, then `load`."""

    @collector.resting()
    def __init__(
        self, exchange: Exchange, reads: Sequence[Read], shards: Mapping[int, PlannedShard],
        block_bytes: Mapping[int, int], sight: Sight,
    ) -> None:  # fmt: skip
        """`shards` by number: those that `reads` are of, and those whose headers this rank has read where not all see
        them. `block_bytes` of the files whose headers this rank has read.
        """
        self._exchange, self._shards, self._block_bytes, self._sight = exchange, shards, block_bytes, sight
        self._dealt: dict[int, list[tuple[int, int, list[int]]]] = {}  # what this rank reads for others too, by file
        self._lacks: dict[int, int] = {}  # bytes that are still to come, by the rank that reads them
        self._scratch = torch.empty(PART_BYTES, dtype=torch.uint8, device="cpu")
        spans = Spans(shards, reads)
        self._targets, self._apart = spans.targets, spans.apart
        self._files: dict[int, File] = spans.files()

    @property
    def bytes_held(self) -> int:
        """Of what this rank fills, as the files have it."""
        return sum(read.tensor.numel() * read.dtype.itemsize for read in (*self._apart, *self._reads))

    @property
    def _reads(self) -> list[Read]:
        return [target.read for target in self._targets]

    @collector.resting()
    def plan(self) -> None:
        """Raises DamageError for what can't be handed over, and what `Exchange.all_to_all` raises."""
        exchange = self._exchange
        for read in self._apart:
            self._check_seen([span.shard for span in read.spans])
        needs = [array("Q") for _ in range(exchange.world_size)]
        for number, file in self._files.items():
            home = needs[self._sight.readers[number // FILES_A_RANK]]
            for first, last in file.runs(1, 2):
                home.extend((number, first, last))
        heard = exchange.all_to_all("plan the reading", [each.tobytes() for each in needs])
        told = exchange.all_to_all("deal out the reading", self._deal(heard))
        for message in told:
            sets, rows = unpack(message)
            ranks = strict_json.loads(bytes(sets))
            for number, first, last, reader, which in np.frombuffer(rows, dtype="<u8").reshape(-1, _DEALT).tolist():
                if number not in self._files:  # read for others only
                    self._files[number] = File(self._shards[number])
                file = self._files[number]
                if reader == exchange.rank:
                    others = [rank for rank in ranks[which] if rank != reader]
                    self._dealt.setdefault(number, []).append((first, last, others))
                    file.set_apart(first, last, reader)
                else:
                    nbytes = file.bytes_of(first, last)
                    self._lacks[reader] = self._lacks.get(reader, 0) + nbytes[1] - nbytes[0]
                    file.set_apart(first, last, reader)

    def _check_seen(self, shards: Sequence[Readable]) -> None:
        for shard in shards:
            if not self._sight.sees(self._exchange.rank, shard.index.rank):
                raise DamageError(
                    f"the shard of rank {shard.index.rank} is on another node, and has elements that lie across "
                    "blocks, which are not handed over: no writer of this format makes such a file"
                )

    def _deal(self, heard: Sequence[bytes]) -> list[bytes]:
        """For the files whose headers this rank has read: to each rank, who reads which of the blocks that it needs,
        and which it reads for others.
        """
        world, me = self._exchange.world_size, self._exchange.rank
        load = dict.fromkeys(range(world), 0)
        sets: dict[tuple[int, ...], int] = {}
        rows = [array("Q") for _ in range(world)]
        for number, first, last, ranks in _needed(heard):
            seeing = [rank for rank in ranks if self._sight.sees(rank, number // FILES_A_RANK)]
            if len(ranks) == len(seeing) == 1:
                continue  # it reads them, and nobody else has to know
            nbytes = self._block_bytes[number]
            which = sets.setdefault(ranks, len(sets))
            step = max(1, min(BUFFER_BYTES // nbytes, -(-(last + 1 - first) // max(1, len(seeing)))))
            for begin, end in _cut(first, last, step):
                reader = min(seeing or [me], key=lambda rank: (load[rank], (rank - me) % world))
                load[reader] += (end - begin + 1) * nbytes
                for rank in {*ranks, reader}:
                    rows[rank].extend((number, begin, end, reader, which))
        known = json.dumps(list(sets)).encode()
        return [pack([known, each.tobytes()]) for each in rows]

    def load(self) -> None:
        """On DamageError or OSError live tensors may be partly overwritten. Raises PeerFailed where another rank's
        blocks do not come, and what `Exchange.all_to_all` raises.
        """
        exchange = self._exchange
        exchange.take_blocks(self._take)
        exchange.all_to_all("begin to read", [b""] * exchange.world_size)
        for number in sorted(self._files):
            self._read(number, self._files[number])
        filling.load(self._apart)
        exchange.done()
        exchange.wait_for_blocks(lambda: [rank for rank, nbytes in self._lacks.items() if nbytes > 0])
        if any(nbytes > 0 for nbytes in self._lacks.values()):
            exchange.check_others()
            raise PeerFailed(
                f"blocks of rank(s) {sorted(rank for rank, n in self._lacks.items() if n > 0)} did not come"
            )
        for target in self._targets:
            target.finish()
        exchange.wait_until_done()

    def _read(self, number: int, file: File) -> None:
        exchange = self._exchange
        step = max(1, BUFFER_BYTES // file.block_bytes)
        buffered: list[tuple[int, int, list[int]]] = list(self._dealt.get(number, ()))
        buffered += [(begin, end, []) for first, last in file.runs(2) for begin, end in _cut(first, last, step)]
        for first, last, others in sorted(buffered):
            exchange.check_others()
            begin, end = file.bytes_of(first, last)
            memory = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
            file.shard.read_into([(begin, end, memory.data_ptr())])
            if others:
                exchange.send_block(number, begin, memoryview(memory.numpy().data), others)
            file.place(begin, end, memory)
        for first, last in file.runs(1):
            for begin, end in _cut(first, last, max(1, _AT_ONCE_BYTES // file.block_bytes)):
                exchange.check_others()
                file.shard.read_into(file.straight(*file.bytes_of(begin, end)))

    def _take(self, number: int, offset: int, content: memoryview) -> None:
        """On the exchange's thread. Raises ValueError for what nobody is to send."""
        file = self._files.get(number)
        reader = None if file is None else file.reader_of(offset, len(content))
        if file is None or reader is None or len(content) > PART_BYTES:
            raise ValueError(f"{len(content)} bytes of file {number} at {offset}, which were not asked for")
        self._scratch.numpy()[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        file.place(offset, offset + len(content), self._scratch)
        self._lacks[reader] -= len(content)


def _needed(heard: Sequence[bytes]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """The needs of all ranks, of each block together: file, first, last, and the ranks that need these."""
    events: dict[int, list[tuple[int, int, int]]] = {}
    for rank, message in enumerate(heard):
        for number, first, last in np.frombuffer(message, dtype="<u8").reshape(-1, _NEED).tolist():
            events.setdefault(number, []).extend(((first, 1, rank), (last + 1, 0, rank)))
    for number in sorted(events):
        needing: set[int] = set()
        begun = 0
        for at, begins, rank in sorted(events[number]):
            if at > begun and needing:
                yield number, begun, at - 1, tuple(sorted(needing))
            begun = at
            if begins:
                needing.add(rank)
            else:
                needing.discard(rank)


def _cut(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(first, last + 1, step):
        yield begin, min(begin + step - 1, last)
