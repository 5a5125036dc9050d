# SPDX-License-Identifier: Apache-2.0
"""The training process's half of a shard in monitor mode: stages into the pool, and says what is where.

The monitor's half is `holding.py`. A buffer is this side's until it is given, and comes back when it is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict

from layerwise_dist import _native
from layerwise_dist.commit.metadata import ParentRef
from layerwise_dist.commit.records import BoundaryKind
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.monitor.connection import MonitorLink
from layerwise_dist.monitor.messages import Counts, Follow, Give, Opened, Returned, SaidSource, State, Written
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.gathered import Laid, gather
from layerwise_dist.storage.readers import Readers
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.storage.shard_layout import ShardLayout, Source, state_extent
from layerwise_dist.supervision.patience import DISK_SHARE

_STATE_PIECE = 256 << 10  # bytes of the state that go through the pool at once
_ASK_S = 10.0


class PoolFull(LayerwiseError):
    """The pool had no room for the boundary's state in time. Ends the attempt."""


class StagedWrite:
    """As `storage.adapter.ShardWrite`, but the blocks lie in the pool and the file is the monitor's."""

    in_place = None

    def __init__(self, adapter: StagingAdapter, attempt: AttemptId, layout: ShardLayout) -> None:
        self.attempt, self.layout = attempt, layout
        self._adapter = adapter
        self._keeping: object = None
        self._confirm: Callable[[float], None] | None = None
        self._lengths = (0, 0)
        self.state_bytes = 0
        self._sealed = False
        self._written: Counts = {}  # the monitor's counts, once it is durable

    @property
    def writes(self) -> int:
        return self._written.get("writes", 0)

    @property
    def bytes_written(self) -> int:
        return self._written.get("bytes_written", 0)

    @property
    def bytes_copied(self) -> int:
        return self._written.get("bytes_copied", self.state_bytes)

    @property
    def bytes_evacuated(self) -> int:
        return 0

    def begin_again(self, laid: Laid) -> None:
        """As `ShardWrite`'s. What was given comes back as ever."""
        self._keeping, self.layout = None, laid.shard
        self._adapter.say_begin(self)

    def set_addresses(self, addresses: Sequence[int], keeping: object = None) -> None:
        """Of memory that the monitor does not see; `keeping` is held until all of it was given."""
        self._keeping = keeping

    def submit_gathered(self, number: int, tensor: int, buffer: _native.PoolBuffer) -> None:
        """Gives a buffer, in which a layer lies as in the file, to the monitor."""
        self._adapter.give(
            self, buffer,
            {"t": "give", "seq": self.attempt.seq, "extent": number, "place": buffer.place, "nbytes": buffer.nbytes},
        )  # fmt: skip

    def leases_over(self) -> bool:
        return True

    def wait_written(self, timeout_s: float) -> bool:
        """Whether, within the deadline, everything that was given was written, or has failed."""
        return self._adapter.wait_returned(self, timeout_s)

    def block_times(self) -> list[tuple[int, int]]:
        """As `ShardWrite`'s; the processes have one clock. Raises LayerwiseError if the monitor is gone."""
        times = self._adapter.link.ask("times of blocks", {"t": "times", "seq": self.attempt.seq}, _ASK_S)
        return [(begin, end) for begin, end in times]

    def seal(
        self, text: bytes, blob: bytes, *, confirm: Callable[[float], None] | None = None,
        base: Callable[[float], BaseReport] | None = None,
    ) -> None:  # fmt: skip
        """As `ShardWrite`'s: gives the monitor what the boundary sealed, piece by piece. Raises PoolFull."""
        assert base is None, "there are no bases here: frozen parameters are staged with the rest"
        self._confirm = confirm
        data = text + blob
        self._lengths, self.state_bytes = (len(text), len(blob)), len(state_extent(text, blob))
        for begin in range(0, len(data), _STATE_PIECE):
            self._adapter.give_bytes(self, data[begin : begin + _STATE_PIECE])

    def persist(self, timeout_s: float) -> None:
        """Tells the monitor that it has all, which then makes it durable. Raises what `confirm` of `seal` raises."""
        if self._confirm is not None:
            self._confirm(timeout_s)
        self._keeping = self._confirm = None
        self._sealed = True
        self._adapter.link.send({"t": "sealed", "seq": self.attempt.seq, "state": self._lengths})

    def abort(self) -> None:
        """The monitor hears of it by ``failed``, or by `discard`."""
        self._keeping = self._confirm = None

    def discard(self) -> None:
        if not self._sealed:
            self._adapter.link.send({"t": "drop", "seq": self.attempt.seq})

    def done(self, counts: Counts) -> None:
        self._written = counts


class StagingAdapter:
    """As `storage.adapter.PCCheckAdapter`, for a pool that the monitor writes from.

    `begin` and `lay_out` belong to the training thread; the rest is thread-safe.
    """

    pooled = True
    bases = None

    def __init__(
        self, link: MonitorLink, config: LayerwiseConfig, facts: Opened,
        written: Callable[[AttemptId, int], None],
    ) -> None:  # fmt: skip
        """`facts` are what the monitor found out about the directory; `written(attempt, nbytes)` hears of shards that
        are durable.
        """
        self.link, self.rank = link, link.rank
        self.direct, self.memory_align = facts["direct"], facts["memory_align"]
        self.block_bytes = config.writer.block_kb << 10
        self.bounce_bytes = self.block_bytes * config.writer.queue_depth
        patience_s = DISK_SHARE * config.commit.timeout_s
        self.readers = Readers(config.writer.queue_depth, patience_s=patience_s, reads=config.reader.direct_io)
        self.buffers: _native.BufferPool | None = None
        self._timeout_s, self._on_written = config.fence_timeout_s, written
        self._layouts = 0
        self._newest: tuple[ShardLayout, int] | None = None
        self._changed = threading.Condition()
        self._given: dict[int, tuple[StagedWrite, _native.PoolBuffer]] = {}  # by place
        self._writes: dict[int, StagedWrite] = {}  # not durable yet, by seq
        link.on("returned", self._returned)
        link.on("written", self._note_written)
        link.on_lost(lambda _: self._take_back(list(self._given)))

    def allocate_staging_buffer(self, size_mb: float) -> None:
        """Lays a pool of `size_mb` MiB into the memory file: all of it is taken at once. Raises OSError.

        Once more for a larger one: what is on its way keeps the old one.
        """
        self.buffers, begin = _native.BufferPool.shared(self.link.process.memory, int(size_mb * 2**20))
        self.link.send({"t": "pool", "begin": begin, "nbytes": self.buffers.capacity})

    def lay_out(self, layers: Sequence[tuple[str, Sequence[Source]]], gathered: Collection[int]) -> Laid:
        """The layout, which the monitor makes from the same layers."""
        shard = ShardLayout(layers, self.memory_align, self.block_bytes)
        _, extents = gather(shard, gathered)
        self._layouts += 1
        self._newest = shard, self._layouts
        named: list[tuple[str, list[SaidSource]]] = [
            (name, [(asdict(source.slice), source.address_mod, source.wrapped) for source in sources])
            for name, sources in layers
        ]
        self.link.send({"t": "layout", "number": self._layouts, "layers": named})
        return Laid(shard, None, extents)

    def begin(self, attempt: AttemptId, shard: ShardLayout, plan: _native.Plan | None) -> StagedWrite:
        """The monitor begins the file; if it cannot, the coordinator aborts the attempt."""
        write = StagedWrite(self, attempt, shard)
        with self._changed:
            self._writes = {seq: each for seq, each in self._writes.items() if seq > attempt.seq - 64}
            self._writes[attempt.seq] = write
        self.say_begin(write)
        return write

    def say_begin(self, write: StagedWrite) -> None:
        """Once more for an attempt that begins again, with another layout."""
        assert self._newest is not None and self._newest[0] is write.layout, "lay_out() comes first"
        attempt = write.attempt
        self.link.send({"t": "begin", "seq": attempt.seq, "step": attempt.step, "layout": self._newest[1]})

    def unbegun(self, attempt: AttemptId) -> None:
        """What is left of an attempt that was not begun: the monitor's to remove."""

    # -- buffers ------------------------------------------------------------------------------------------------

    def give(self, write: StagedWrite, buffer: _native.PoolBuffer, message: Give | State) -> None:
        """`message` says what is in the buffer."""
        with self._changed:
            if self.link.lost is not None:
                buffer.release()
                return
            self._given[message["place"]] = write, buffer
        self.link.send(message)

    def give_bytes(self, write: StagedWrite, data: bytes) -> None:
        """Raises PoolFull."""
        assert self.buffers is not None, "allocate_staging_buffer() comes first"
        buffer = self.buffers.acquire(len(data), self._timeout_s)
        if buffer is None:
            raise PoolFull(
                f"{len(data)} bytes of state found no room in the pool (pool_mb) within fence_timeout_s = "
                f"{self._timeout_s:g} s: the disk is too slow"
            )
        with memoryview(buffer) as view:
            view.cast("B")[: len(data)] = data
        self.give(
            write, buffer, {"t": "state", "seq": write.attempt.seq, "place": buffer.place, "nbytes": buffer.nbytes}
        )

    def wait_returned(self, write: StagedWrite, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(
                lambda: all(owner is not write for owner, _ in self._given.values()), deadline - time.monotonic()
            )

    def _returned(self, message: Returned) -> None:
        self._take_back(message["places"])

    def _take_back(self, places: Sequence[int]) -> None:
        with self._changed:
            for place in places:
                if (found := self._given.pop(place, None)) is not None:
                    found[1].release()
            self._changed.notify_all()

    def _note_written(self, message: Written) -> None:
        with self._changed:
            write = self._writes.pop(message["seq"], None)
        if write is not None:
            write.done(message["counts"])
            self._on_written(write.attempt, write.bytes_written)

    def close(self, timeout_s: float) -> bool:
        """The pool ends with the last buffer; the monitor is let go of. Whether the readers ended in time."""
        closed = self.readers.close(timeout_s)
        if not closed:
            _native.keep_forever(self)
        self.link.close()
        self._take_back(list(self._given))
        self._newest = None
        return closed


class RemoteCommitter:
    """Asks rank 0's committer (`commit.session.CommitRequests`), which the monitor holds."""

    def __init__(self, link: MonitorLink, timeout_s: float) -> None:
        self._link, self._timeout_s = link, timeout_s
        self._boundary_kind: BoundaryKind = "explicit"

    @property
    def boundary_kind(self) -> BoundaryKind:
        return self._boundary_kind

    @boundary_kind.setter
    def boundary_kind(self, kind: BoundaryKind) -> None:
        if kind != self._boundary_kind:
            self._boundary_kind = kind
            self._link.send({"t": "boundary kind", "kind": kind})

    def tag(self, seq: int, tag: str) -> None:
        self._link.send({"t": "tag", "seq": seq, "tag": tag})

    def hold(self, held: bool) -> None:
        """Raises CommitError or DeadlineError if what is chosen can't be held; that it is over needs no answer."""
        if held:
            self._link.ask("hold retention", {"t": "hold"}, self._timeout_s)
        else:
            self._link.send({"t": "release"})

    def follow(self, head: ParentRef | None, branch_seq: int | None) -> tuple[str | None, list[str]]:
        """Raises OSError, InDoubt (as OSError) or OwnerError, as the monitor did; CommitError or DeadlineError."""
        told = head.model_dump(mode="json") if head is not None else None
        message: Follow = {"t": "follow", "head": told, "branch_seq": branch_seq}
        text, bases = self._link.ask("continue the lineage", message, self._timeout_s)
        return text, bases
