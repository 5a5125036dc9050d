"""Stage 4, `PCCheckAdapter`: one pool of writer threads, several checkpoints in flight, one shard file each.

After PCcheck (ASPLOS'25): a checkpoint is a pipeline of blocks, and the next may start before the last is durable.
Unlike it, a shard is published only after its last block and its header were flushed.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from layerwise_dist import _native
from layerwise_dist.errors import ConfigError, DeadlineError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.gathered import GatheredExtent, gather
from layerwise_dist.storage.recycling import Recycler
from layerwise_dist.storage.removal import remove, remove_if_empty
from layerwise_dist.storage.reports import BaseReport, ShardReport
from layerwise_dist.storage.shard_layout import ShardLayout, Source, state_extent
from layerwise_dist.supervision import background
from layerwise_dist.supervision.patience import stuck_calls

log = logging.getLogger("layerwise_dist")


class Laid(NamedTuple):
    """A layout, the native plan made from it, and its gathered extents by number."""

    shard: ShardLayout
    plan: Any
    gathered: dict[int, GatheredExtent]


def _choose_backend(wanted: str, rank: int) -> str:
    """ "uring", "posix" or "nvm". Raises ConfigError where io_uring is asked for by name and refused."""
    if wanted in ("posix", "nvm"):
        return wanted
    refusal = _native.WriterPool.probe_uring()
    if refusal is None:
        return "uring"
    if wanted == "uring":
        raise ConfigError(
            f"writer.backend = 'uring': this process may not use io_uring: {refusal}; use 'posix' or 'auto'"
        )
    log.warning("rank %d: io_uring is refused here (%s): writing by threads, which costs a little more", rank, refusal)
    return "posix"


class PCCheckAdapter:
    """Writes this rank's shards below `root`.

    Not thread-safe: `begin` belongs to the training thread; an attempt's `persist` may run on one other thread.
    """

    pooled = False  # whether all that is written must lie in the pool

    def __init__(
        self, env: Any, root: str, *, rank: int, world_size: int, backend: str = "auto", queue_depth: int = 4,
        block_bytes: int = 1 << 20, direct_io: bool = True, file_mode: int = 0o600, dir_mode: int = 0o700,
        spares: int = 0, hash: bool = True, patience_s: float = 1e9,
    ) -> None:  # fmt: skip
        """`allocate_staging_buffer` starts the writer. `spares`: how many files of retired checkpoints may wait to be
        written over; 0: they are removed. `hash`: whether tensors are hashed; header and state always are. A disk from
        which nothing comes for `patience_s` seconds is an OSError to who reads.

        With `backend` "nvm", `env` is an NvmEnv. Raises ConfigError where "uring" is refused or "nvm" finds no DAX.
        """
        env.confine(root)
        self.hash = hash
        self.recycler = Recycler(env, root, rank, limit=spares, file_mode=file_mode)
        self.env, self.root, self.rank, self.world_size = env, root, rank, world_size
        self.file_mode, self.dir_mode = file_mode, dir_mode
        self.block_bytes, self._queue_depth, self._patience_s = block_bytes, queue_depth, patience_s
        self.backend = _choose_backend(backend, rank)
        self.buffers: Any = None
        self._pool: Any = None
        self._outgrown: list[Any] = []
        self._readers: Any = None
        self._writes: set[ShardWrite] = set()  # whose blocks may be under way
        try:
            aligns = env.direct_io(root) if direct_io else None
        except OSError as error:
            if self.backend != "nvm" or error.errno != errno.EOPNOTSUPP:
                raise
            raise ConfigError(
                f"writer.backend = 'nvm': {root} is on no DAX file system of persistent memory ({error.strerror}); "
                "use 'auto', or mount one with -o dax"
            ) from error
        self.direct = aligns is not None and max(aligns) <= 4096
        # At least what any dtype needs: tensors are also viewed in buffers that are laid out as the file is.
        self.memory_align = max(aligns[0] if self.direct else 1, 64)
        if direct_io and not self.direct:
            log.warning("rank %d: %s takes no direct I/O: writing through the page cache, which is slower", rank, root)

    @property
    def bounce_bytes(self) -> int:
        """What the writer takes of the pool for itself."""
        return self._queue_depth * self.block_bytes

    def allocate_staging_buffer(self, size_mb: float) -> None:
        """Starts the writer, with one bounded piece of memory of `size_mb` MiB for bounce buffers, evacuation and
        staging.

        Later than the adapter is made, since how much is right depends on the state, which the first update makes. Once
        more for a larger pool: what is on its way keeps the old one, which stays until `close`.
        """
        if self._pool is not None:
            self._outgrown.append(self._pool)
        self.buffers = _native.BufferPool(int(size_mb * 2**20))
        core = "uring" if self.backend == "uring" else "posix"  # mapped files are written by threads
        self._pool = _native.WriterPool(self._queue_depth, core, self.buffers, self.block_bytes)

    @property
    def pool(self) -> Any:
        """The threads that read, apart from the writer. Made when needed."""
        if self._readers is None:
            self._readers = _native.WriterPool(self._queue_depth, patience_s=self._patience_s)
        return self._readers

    def lay_out(self, layers: Sequence[tuple[str, Sequence[Source]]], gathered: Collection[int]) -> Laid:
        """The static layout for these layers, of which `gathered` ones are written out of one buffer each."""
        shard = ShardLayout(layers, self.memory_align, self.block_bytes)
        segments, extents = gather(shard, gathered)
        plan = _native.Plan(shard.blocks, segments, shard.tensors + len(extents), shard.end)
        return Laid(shard, plan, extents)

    def begin(self, attempt: AttemptId, shard: ShardLayout, plan: Any) -> ShardWrite:
        """Orders the attempt's folder and this rank's partial file, and returns at once: they are made on a thread of
        the writer's. If they can't be, the shard's blocks fail, and `persist` raises the OSError.
        """
        folder = os.path.join(self.root, attempt.folder)
        write = ShardWrite(self, attempt, shard, self.shard_writer(plan, folder), folder)
        self._writes.add(write)
        return write

    def unbegun(self, attempt: AttemptId) -> Unbegun:
        """An attempt that failed before it was begun."""
        return Unbegun(self, attempt)

    def writer_of(self, plan: Any, partial: str) -> Any:
        """A `_native.ShardWriter` of a new file, which hashes. Raises OSError."""
        return _native.ShardWriter(self.env, self._pool, plan, partial, self.file_mode, self.direct)

    def shard_writer(self, plan: Any, folder: str, before: Any = None) -> Any:
        """Of this rank's file in `folder`, which is being made: over a retired one if one waits, else new. It replaces
        the file of the writer `before`, which is aborted.
        """
        return _native.ShardWriter.order(
            self.env, self._pool, plan, folder,
            os.path.join(folder, filenames.shard_file(self.rank) + filenames.PARTIAL),
            self.dir_mode, self.file_mode, self.direct, self.hash, reuse=self.recycler.take(), before=before,
        )  # fmt: skip

    def over(self, write: ShardWrite) -> None:
        """Nothing of it is written any more, nor will be."""
        self._writes.discard(write)

    def close(self, timeout_s: float) -> bool:
        """Whether that could be done in time. If not, a call to the disk does not return; what it may still use is
        never freed.
        """
        deadline = time.monotonic() + timeout_s
        removed = self.recycler.close(timeout_s)
        pools = [pool for pool in (*self._outgrown, self._pool, self._readers) if pool is not None]
        closed = [pool.close(max(0.0, deadline - time.monotonic())) for pool in pools]
        if not all(closed):
            _native.keep_forever((self, list(self._writes)))
        return removed and all(closed)


class Unbegun:
    """An attempt without a shard of this rank: at most its folder is there, which goes once no rank needs it."""

    def __init__(self, adapter: PCCheckAdapter, attempt: AttemptId) -> None:
        self._adapter, self.attempt = adapter, attempt

    def abort(self) -> None:
        """Nothing is being written."""

    def discard(self) -> None:
        remove_if_empty(self._adapter.env, os.path.join(self._adapter.root, self.attempt.folder))


def _nothing(timeout_s: float) -> None:
    return None


def _end(writer: Any, keeping: object) -> None:
    """Stops a writer; what it may still read lives until then."""
    writer.abort()


class ShardWrite:
    """One rank's shard of one attempt, from the first block to the durable file."""

    pooled = False  # as the adapter's

    def __init__(
        self, adapter: PCCheckAdapter, attempt: AttemptId, shard: ShardLayout, writer: Any, folder: str
    ) -> None:
        self.attempt, self.layout, self.folder = attempt, shard, folder
        self._adapter, self._writer = adapter, writer
        # Asked before the header is written; it raises if what the blocks were read from had changed by then.
        self.confirm: Callable[[float], None] = _nothing
        # Waits until the frozen parameters that this shard refers to are durable, and says what they are.
        self.base: Callable[[float], BaseReport] | None = None
        self._ending: list[threading.Thread] = []
        self._state: tuple[int, int] = (0, 0)
        self.state_bytes = 0  # of the state extent
        self._state_hash = 0

    @property
    def writes(self) -> int:
        """Blocks of layers and state that were written, each by one call to the kernel."""
        return self._writer.completed

    @property
    def pending(self) -> int:
        """Blocks of layers that are queued, and not written yet."""
        return self._writer.pending

    @property
    def bytes_written(self) -> int:
        return self._writer.bytes_written

    @property
    def bytes_copied(self) -> int:
        """By the writer: partial sectors, evacuated blocks, and the state extent."""
        return self._writer.bytes_copied

    @property
    def bytes_evacuated(self) -> int:
        return self._writer.bytes_evacuated

    def begin_again(self, laid: Laid) -> None:
        """Another layout for the same attempt: what was written goes, with its file. REQUIRES: nothing is being staged,
        and the state was not appended.

        Does not wait for blocks that are being written: they go into a file without a name.
        """
        before = self._writer
        self._writer = self._adapter.shard_writer(laid.plan, self.folder, before)
        # With `confirm`, what is leased stays alive until nothing reads it any more.
        keeping = self.confirm
        end = background.start("layerwise-end", lambda: _end(before, keeping), self._adapter.recycler.failed)
        self._ending.append(end)
        self.confirm = _nothing
        self.layout = laid.shard

    def set_address(self, tensor: int, address: int) -> None:
        self._writer.set_address(tensor, address)

    def set_addresses(self, addresses: Sequence[int]) -> None:
        """Of all tensors of the layout; 0 for those whose extent is not submitted before `set_address` was called."""
        self._writer.set_addresses(addresses)

    def submit(self, first: int, count: int) -> None:
        """Queues the blocks of `count` layers.

        Their tensors must not change until `evacuate` or `wait_written` says so.
        """
        extents = self.layout.extents[first : first + count]
        if blocks := sum(extent.blocks for extent in extents):
            self._writer.submit(extents[0].first_block, blocks)

    def submit_gathered(self, number: int, tensor: int, buffer: Any) -> None:
        """Queues the blocks of a layer that lies in a buffer of the pool, which goes back once they are written."""
        extent = self.layout.extents[number]
        self._writer.set_address(tensor, buffer.address)
        self._writer.submit_buffer(extent.first_block, extent.blocks, buffer)

    def evacuate(self, first: int, count: int, timeout_s: float) -> bool:
        """Whether, within the deadline, the tensors of these layers may be overwritten: written, or copied away."""
        extents = self.layout.extents[first : first + count]
        blocks = sum(extent.blocks for extent in extents)
        return not blocks or self._writer.evacuate(extents[0].first_block, blocks, timeout_s)

    def leases_over(self) -> bool:
        """Whether no memory of the caller's is needed any more."""
        return self._writer.leased == 0

    def wait_written(self, timeout_s: float) -> bool:
        """Whether, within the deadline, everything queued was both written and hashed, or has failed."""
        return self._writer.wait(timeout_s)

    def block_times(self) -> list[tuple[int, int]]:
        """When each block of the layers began and ended: nanoseconds of `time.monotonic_ns()`, 0 if not yet."""
        return self._writer.block_times()

    def append_state(self, text: bytes, blob: bytes) -> None:
        """Writes the state extent behind the layers: what the boundary sealed."""
        data = state_extent(text, blob)
        self._state, self.state_bytes = (len(text), len(blob)), len(data)
        self._state_hash = _native.xxh3_64(data)
        self._writer.append(data)

    def persist(self, timeout_s: float) -> ShardReport:
        """Blocks, the base, header, fdatasync, rename, directory flushes: afterwards the shard survives power loss, and
        what it refers to.

        The order is the promise (docs/format.md, "Order of flushes"). Raises OSError, or DeadlineError when the blocks
        are not written in `timeout_s` seconds, or what `confirm` and `base` raise; the attempt must then be aborted.
        """
        deadline = time.monotonic() + timeout_s
        self._written(timeout_s, deadline)
        if refused := self._writer.reuse_refused():
            level = logging.DEBUG if refused.errno == errno.EBUSY else logging.WARNING  # a reader is nobody's fault
            log.log(level, "rank %d: a new file instead of a retired one: %s", self._adapter.rank, refused)
        for end in self._ending:
            end.join(max(0.0, deadline - time.monotonic()))
        self.confirm(max(0.0, deadline - time.monotonic()))
        self._written(timeout_s, deadline)  # what was still being staged at the first look
        base = self.base(max(0.0, deadline - time.monotonic())) if self.base is not None else None
        adapter, env = self._adapter, self._adapter.env
        hashes = self._writer.hashes_hex()[: 16 * len(self.layout.blocks)] if adapter.hash else None
        header = self.layout.header(
            attempt=self.attempt.text, step=self.attempt.step, rank=adapter.rank, world_size=adapter.world_size,
            hashes=hashes, state=self._state, state_hash=f"{self._state_hash:016x}",
        )  # fmt: skip
        self._writer.finish(header)
        self.confirm, self.base = _nothing, None  # nothing is read any more: what they kept alive may go
        adapter.over(self)
        name = filenames.shard_file(adapter.rank)
        final = os.path.join(self.folder, name)
        env.rename(final + filenames.PARTIAL, final)
        env.sync_dir(self.folder)
        # Each rank flushes the parent too: whose mkdir it was does not tell who crashes first.
        env.sync_dir(adapter.root)
        if time.monotonic() > deadline:
            log.warning("rank %d: %s took longer than %g s to flush", adapter.rank, self.folder, timeout_s)
        adapter.recycler.published(self.attempt, len(header))
        nbytes = self.layout.end + self.state_bytes
        return ShardReport(adapter.rank, name, nbytes, len(header), _native.xxh3_64(header), base)

    def _written(self, timeout_s: float, deadline: float) -> None:
        if not self._writer.wait(max(0.0, deadline - time.monotonic())):
            raise DeadlineError(f"{self.folder}: blocks were still being written after {timeout_s:g} s{stuck_calls()}")
        if error := self._writer.error():
            raise error

    def abort(self) -> None:
        """Stops writing and closes, as long as the disk takes for that; the poisoned file stays until `discard`. Never
        raises for a closed one.
        """
        self._writer.abort()
        for end in self._ending:
            end.join()
        self.confirm, self.base = _nothing, None
        self._adapter.over(self)

    def discard(self) -> None:
        """Removes this rank's files of a decided, uncommitted attempt; the last rank to leave removes the folder."""
        self._adapter.recycler.forget(self.attempt)
        name = filenames.shard_file(self._adapter.rank)
        remove(self._adapter.env, self.folder, (name + filenames.PARTIAL, name))
