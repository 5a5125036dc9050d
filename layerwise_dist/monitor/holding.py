# SPDX-License-Identifier: Apache-2.0
"""The monitor's half of a shard: takes what was staged, and acknowledges a shard once it has all of it.

A shard is *held* once every extent and the state of its attempt were given, and the training process has said that all
of it is final. From then on nothing that happens to that process changes it: it is reported as staged, and made
durable.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from layerwise_dist import _native
from layerwise_dist.commit.messages import Failed
from layerwise_dist.commit.participant import Participant
from layerwise_dist.monitor.messages import Begin, Counts, Drop, Give, Layout, Pool, Returned, Sealed, State, Written
from layerwise_dist.storage.adapter import PCCheckAdapter, ShardWrite
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.gathered import Laid
from layerwise_dist.storage.reports import ShardReport
from layerwise_dist.storage.shard_layout import Source
from layerwise_dist.tensors.slices import Slice

log = logging.getLogger("layerwise_dist")

_REMEMBERED = 4  # attempts whose times may still be asked for


class HeldWrite:
    """A `ShardWrite` that tells the training process once it is durable."""

    def __init__(self, write: ShardWrite, tell: Callable[[Written], None]) -> None:
        self.attempt, self.shard = write.attempt, write
        self._tell = tell

    def persist(self, timeout_s: float) -> ShardReport:
        report = self.shard.persist(timeout_s)
        shard = self.shard
        counts: Counts = {
            "writes": shard.writes,
            "bytes_written": shard.bytes_written,
            "bytes_copied": shard.bytes_copied,
        }
        self._tell({"t": "written", "seq": self.attempt.seq, "counts": counts})
        return report

    def abort(self) -> None:
        self.shard.abort()

    def discard(self) -> None:
        self.shard.discard()


class _Coming:
    """An attempt that is not here as a whole."""

    def __init__(self, write: HeldWrite, laid: Laid) -> None:
        self.write = write
        self.gathered = laid.gathered
        self.missing = {number for number, extent in laid.gathered.items() if extent.nbytes}
        self.state = bytearray()


class StagedShards:
    """One rank's shards on their way. Belongs to one thread, but for `give_back`.

    Every message that names an attempt which has ended here is passed by, and its buffer given back.
    """

    def __init__(
        self, adapter: PCCheckAdapter, participant: Participant, epoch: int, memory: int, wake: int,
        tell: Callable[[Written | Returned], None],
    ) -> None:  # fmt: skip
        """`memory` is the pool's memory file, `wake` an eventfd that counts up when `give_back` has to be called."""
        self._adapter, self._participant, self._epoch = adapter, participant, epoch
        self._memory, self._wake, self._tell = memory, wake, tell
        self._pools: list[tuple[int, int, _native.BufferPool]] = []  # where it begins and ends
        self._layouts: dict[int, Laid] = {}
        self._coming: dict[int, _Coming] = {}
        self._recent: deque[HeldWrite] = deque(maxlen=_REMEMBERED)

    # -- what the training process says -------------------------------------------------------------------------

    def pool(self, message: Pool) -> None:
        """Raises ValueError or OSError for one that is not there."""
        begin, nbytes = message["begin"], message["nbytes"]
        pool = _native.BufferPool.attached(self._memory, begin, nbytes, self._wake)
        self._pools.append((begin, begin + nbytes, pool))

    def layout(self, message: Layout) -> None:
        layers = [
            (name, [Source(_slice(part), address_mod, wrapped) for part, address_mod, wrapped in sources])
            for name, sources in message["layers"]
        ]
        # Everything is gathered: nothing else of the training process's memory is to be had here.
        self._layouts = {message["number"]: self._adapter.lay_out(layers, range(len(layers)))}

    def begin(self, message: Begin) -> None:
        """A shard, or once more one that is not sealed yet, with another layout."""
        attempt = AttemptId(self._epoch, message["seq"], message["step"])
        laid = self._layouts[message["layout"]]
        before = self._coming.pop(attempt.seq, None)
        self._participant.began(attempt)
        if before is not None:
            write = before.write
            write.shard.begin_again(laid)
        else:
            write = HeldWrite(self._adapter.begin(attempt, laid.shard, laid.plan), self._tell)
            self._recent.append(write)
        self._coming[attempt.seq] = _Coming(write, laid)

    def give(self, message: Give) -> None:
        """An extent lies in the pool, as it will in the file."""
        buffer = self._adopt(message)
        coming = self._coming.get(message["seq"])
        if coming is None:
            buffer.release()
            return
        number = message["extent"]
        extent = coming.gathered[number]
        if extent.nbytes != buffer.nbytes:
            raise ValueError(f"extent {number} has {extent.nbytes} bytes, the buffer {buffer.nbytes}")
        coming.write.shard.submit_gathered(number, extent.tensor, buffer)
        coming.missing.discard(number)

    def state(self, message: State) -> None:
        buffer = self._adopt(message)
        if (coming := self._coming.get(message["seq"])) is not None:
            coming.state += buffer
        buffer.release()

    def sealed(self, message: Sealed) -> None:
        """All of it was given, and is final: acknowledged, if that is so."""
        coming = self._coming.pop(message["seq"], None)
        if coming is None:
            return
        attempt, (text, blob) = coming.write.attempt, message["state"]
        if coming.missing or len(coming.state) != text + blob:
            lacking = f"{len(coming.missing)} extents" if coming.missing else "a part of the state"
            self._participant.failed(attempt, f"the monitor lacks {lacking} of it", coming.write)
            return
        data = bytes(coming.state)
        coming.write.shard.seal(data[:text], data[text:])
        self._participant.staged(coming.write)

    def failed(self, message: Failed) -> None:
        """The training process gives an attempt up, and has warned of it."""
        coming = self._coming.pop(message["seq"], None)
        attempt = AttemptId(self._epoch, message["seq"], message["step"])
        write = coming.write if coming is not None else None
        self._participant.failed(attempt, message["error"], write, final=message["final"], told=True)

    def drop(self, message: Drop) -> None:
        """The coordinator has aborted it before it was sealed."""
        if (coming := self._coming.pop(message["seq"], None)) is not None:
            self._participant.failed(coming.write.attempt, "aborted before it was sealed", coming.write, told=True)

    def times(self, seq: int) -> list[tuple[int, int]]:
        return next((each.shard.block_times() for each in self._recent if each.attempt.seq == seq), [])

    # -- otherwise ----------------------------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        """The training process is gone: what it has not sealed it never will."""
        for seq in list(self._coming):
            coming = self._coming.pop(seq)
            self._participant.failed(coming.write.attempt, why, coming.write)

    def give_back(self) -> None:
        """Tells the training process which of its buffers are free again. On any one thread."""
        places = [place for _, _, pool in list(self._pools) for place in pool.take_returned()]
        if places:
            self._tell({"t": "returned", "places": places})

    def _adopt(self, message: Give | State) -> _native.PoolBuffer:
        place = message["place"]
        for begin, end, pool in self._pools:
            if begin <= place < end:
                return pool.adopt(place, message["nbytes"])
        raise ValueError(f"a buffer at {place}, but there is no pool")


def _slice(fields: dict[str, Any]) -> Slice:
    members: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Slice(**members)
