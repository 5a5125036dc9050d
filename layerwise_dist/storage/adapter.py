# SPDX-License-Identifier: Apache-2.0
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

from layerwise_dist import _native
from layerwise_dist.errors import ConfigError, DeadlineError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.gathered import Laid, gather
from layerwise_dist.storage.readers import Readers
from layerwise_dist.storage.recycling import Recycler
from layerwise_dist.storage.removal import remove, remove_if_empty
from layerwise_dist.storage.reports import BaseReport, ShardReport
from layerwise_dist.storage.shard_layout import ShardLayout, Source, state_extent
from layerwise_dist.supervision import background
from layerwise_dist.supervision.patience import stuck_calls

log = logging.getLogger("layerwise_dist")


def _choose_backend(wanted: str, rank: int) -> str:
    """ "uring", "posix" or "nvm". Raises ConfigError where io_uring is asked for by name and refused."""
    if wanted in ("posix", "nvm"):
        return wanted
    refusal = _native.WriterPool.probe_uring()
    if refusal is None:
        return "uring"
    if wanted == "uring":
        raise ConfigError(
            f"writer.backend = 'uring': io_uring is not available to this process: {refusal}; use 'posix' or 'auto'"
        )
    log.warning("rank %d: io_uring is refused here (%s): writing by threads, which costs a little more", rank, refusal)
    return "posix"


class PCCheckAdapter:
    """Writes this rank's shards below `root`.

    Not thread-safe: `begin` belongs to the training thread; an attempt's `persist` may run on one other thread.
    """

    pooled = False  # whether all that is written must lie in the pool

    def __init__(
        self, env: _native.Env, root: str, *, rank: int, world_size: int, backend: str = "auto", queue_depth: int = 4,
        block_bytes: int = 1 << 20, direct_io: bool = True, file_mode: int = 0o600, dir_mode: int = 0o700,
        spares: int = 0, hash: bool = True, patience_s: float = 1e9, failed: background.Failed = background.log_only,
        reads: str = "auto",
    ) -> None:  # fmt: skip
        """`allocate_staging_buffer` starts the writer. `spares`: how many files of retired checkpoints may wait to be
        written over; 0: they are removed. `hash`: whether tensors are hashed; header and state always are. A disk from
        which nothing comes for `patience_s` seconds is an OSError to who reads. `failed` hears of a thread that came to
        nothing by an error that nobody expected. `reads`: how shards are read, as `_native.WriterPool` has it.

        With `backend` "nvm", `env` is an NvmEnv. Raises ConfigError where "uring" is refused or "nvm" finds no DAX.
        """
        env.confine(root)
        self.hash = hash
        self.recycler = Recycler(env, root, rank, limit=spares, file_mode=file_mode, failed=failed)
        self.failed = failed
        self.env, self.root, self.rank, self.world_size = env, root, rank, world_size
        self.file_mode, self.dir_mode = file_mode, dir_mode
        self.block_bytes, self._queue_depth = block_bytes, queue_depth
        self.readers = Readers(queue_depth, patience_s=patience_s, reads=reads)
        self.backend = _choose_backend(backend, rank)
        self.buffers: _native.BufferPool | None = None
        self._pool: _native.WriterPool | None = None
        self._outgrown: list[_native.WriterPool] = []
        self._writes: set[ShardWrite] = set()  # whose blocks may be under way
        try:
            aligns = env.direct_io(root) if direct_io else None
        except OSError as error:
            if self.backend != "nvm" or error.errno != errno.EOPNOTSUPP:
                raise
            raise ConfigError(
                f"writer.backend = 'nvm': {root} is not on a DAX file system of persistent memory ({error.strerror}); "
                "use 'auto', or mount one with -o dax"
            ) from error
        # At least what any dtype needs: tensors are also viewed in buffers that are laid out as the file is.
        self.direct, self.memory_align = False, 64
        if aligns is not None and max(aligns) <= 4096:
            self.direct, self.memory_align = True, max(aligns[0], 64)
        if direct_io and not self.direct:
            log.warning(
                "rank %d: %s does not support direct I/O: writing through the page cache, which is slower", rank, root
            )

    @property
    def bases(self) -> PCCheckAdapter:
        return self

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

    def lay_out(self, layers: Sequence[tuple[str, Sequence[Source]]], gathered: Collection[int]) -> Laid:
        """The static layout for these layers; `gathered` ones are written out of one buffer each."""
        shard = ShardLayout(layers, self.memory_align, self.block_bytes)
        segments, extents = gather(shard, gathered)
        plan = _native.Plan(shard.blocks, segments, shard.tensors + len(extents), shard.end)
        return Laid(shard, plan, extents)

    def begin(self, attempt: AttemptId, shard: ShardLayout, plan: _native.Plan | None) -> ShardWrite:
        """Orders the attempt's folder and this rank's partial file, and returns at once: they are made on a thread of
        the writer's. If they can't be, the shard's blocks fail, and `persist` raises the OSError.
        """
        assert plan is not None, "lay_out() has made one"
        folder = os.path.join(self.root, attempt.folder)
        write = ShardWrite(self, attempt, shard, self.shard_writer(plan, folder), folder)
        self._writes.add(write)
        return write

    def unbegun(self, attempt: AttemptId) -> Unbegun:
        """An attempt that failed before it was begun."""
        return Unbegun(self, attempt)

    def writer_of(self, plan: _native.Plan, partial: str) -> _native.ShardWriter:
        """Of a new file, which is hashed. Raises OSError."""
        return _native.ShardWriter(self.env, self._started, plan, partial, self.file_mode, self.direct)

    def shard_writer(
        self, plan: _native.Plan, folder: str, before: _native.ShardWriter | None = None
    ) -> _native.ShardWriter:
        """Of this rank's file in `folder`, which is being made: over a retired one if one waits, else new. It replaces
        the file of the writer `before`, which is aborted.
        """
        return _native.ShardWriter.order(
            self.env, self._started, plan, folder,
            os.path.join(folder, filenames.shard_file(self.rank) + filenames.PARTIAL),
            self.dir_mode, self.file_mode, self.direct, self.hash, reuse=self.recycler.take(), before=before,
        )  # fmt: skip

    @property
    def _started(self) -> _native.WriterPool:
        assert self._pool is not None, "allocate_staging_buffer() comes first"
        return self._pool

    def over(self, write: ShardWrite) -> None:
        """Nothing of it is written any more, nor will be."""
        self._writes.discard(write)

    def close(self, timeout_s: float) -> bool:
        """Whether that could be done in time. If not, a call to the disk does not return; what it may still use is
        never freed.
        """
        deadline = time.monotonic() + timeout_s
        removed = self.recycler.close(timeout_s)
        pools = [pool for pool in (*self._outgrown, self._pool) if pool is not None]
        closed = [pool.close(max(0.0, deadline - time.monotonic())) for pool in pools]
        closed.append(self.readers.close(max(0.0, deadline - time.monotonic())))
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


def _end(writer: _native.ShardWriter, keeping: object) -> None:
    """Stops a writer; what it may still read lives until then."""
    writer.abort()


class ShardWrite:
    """One rank's shard of one attempt, from the first block to the durable file."""

    def __init__(
        self, adapter: PCCheckAdapter, attempt: AttemptId, shard: ShardLayout, writer: _native.ShardWriter, folder: str
    ) -> None:
        self.attempt, self.layout, self.folder = attempt, shard, folder
        self._adapter, self._writer = adapter, writer
        self._keeping: object = None  # what is read lives as long
        self._confirm: Callable[[float], None] | None = None
        self._base: Callable[[float], BaseReport] | None = None
        self._ending: list[threading.Thread] = []
        self._state: tuple[int, int] = (0, 0)
        self.state_bytes = 0  # of the state extent
        self._state_hash = 0

    @property
    def in_place(self) -> ShardWrite:
        return self

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
        before, keeping = self._writer, self._keeping
        assert laid.plan is not None, "lay_out() has made one"
        self._writer = self._adapter.shard_writer(laid.plan, self.folder, before)
        end = background.start("layerwise-end", lambda: _end(before, keeping), self._adapter.failed)
        self._ending.append(end)
        self._keeping, self.layout = None, laid.shard

    def set_address(self, tensor: int, address: int) -> None:
        self._writer.set_address(tensor, address)

    def set_addresses(self, addresses: Sequence[int], keeping: object = None) -> None:
        """Of all tensors of the layout; 0 for those whose extent is not submitted before `set_address` was called.

        `keeping` is held until nothing of the memory is read any more, and with it what it keeps alive. Raises
        ValueError.
        """
        self._keeping = keeping
        self._writer.set_addresses(addresses)

    def submit(self, first: int, count: int) -> None:
        """Queues the blocks of `count` layers.

        Their tensors must not change until `evacuate` or `wait_written` says so.
        """
        extents = self.layout.extents[first : first + count]
        if blocks := sum(extent.blocks for extent in extents):
            self._writer.submit(extents[0].first_block, blocks)

    def submit_gathered(self, number: int, tensor: int, buffer: _native.PoolBuffer) -> None:
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

    def seal(
        self, text: bytes, blob: bytes, *, confirm: Callable[[float], None] | None = None,
        base: Callable[[float], BaseReport] | None = None,
    ) -> None:  # fmt: skip
        """Writes the state extent after the layers: what the boundary sealed. Layers may still be on their way to it.

        `confirm(timeout_s)` is asked before the header is written: it raises if what the blocks were read from had
        changed by then. `base(timeout_s)` waits until the frozen parameters that this shard refers to are durable, and
        says what they are.
        """
        self._confirm, self._base = confirm, base
        data = state_extent(text, blob)
        self._state, self.state_bytes = (len(text), len(blob)), len(data)
        self._state_hash = _native.xxh3_64(data)
        self._writer.append(data)

    def persist(self, timeout_s: float) -> ShardReport:
        """Blocks, the base, header, fdatasync, rename, directory flushes: afterwards the shard survives power loss, and
        what it refers to.

        The order is the promise (docs/format/flushes.md). Raises OSError, DeadlineError if the blocks are not written
        within `timeout_s` seconds, or what was given to `seal` raises; the attempt must then be aborted.
        """
        deadline = time.monotonic() + timeout_s
        self._written(timeout_s, deadline)
        if refused := self._writer.reuse_refused():
            level = logging.DEBUG if refused.errno == errno.EBUSY else logging.WARNING  # a reader is nobody's fault
            log.log(level, "rank %d: a new file instead of a retired one: %s", self._adapter.rank, refused)
        for end in self._ending:
            end.join(max(0.0, deadline - time.monotonic()))
        if self._confirm is not None:
            self._confirm(max(0.0, deadline - time.monotonic()))
        self._written(timeout_s, deadline)  # what was still being staged at the first look
        base = self._base(max(0.0, deadline - time.monotonic())) if self._base is not None else None
        adapter, env = self._adapter, self._adapter.env
        hashes = self._writer.hashes_hex()[: 16 * len(self.layout.blocks)] if adapter.hash else None
        header = self.layout.header(
            attempt=self.attempt.text, step=self.attempt.step, rank=adapter.rank, world_size=adapter.world_size,
            hashes=hashes, state=self._state, state_hash=f"{self._state_hash:016x}",
        )  # fmt: skip
        self._writer.finish(header)
        self._over()
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
        self._over()

    def _over(self) -> None:
        """Nothing is read any more: what was kept alive for that may go."""
        self._keeping = self._confirm = self._base = None
        self._adapter.over(self)

    def discard(self) -> None:
        """Removes this rank's files of a decided, uncommitted attempt; the last rank to leave removes the folder."""
        self._adapter.recycler.forget(self.attempt)
        name = filenames.shard_file(self._adapter.rank)
        remove(self._adapter.env, self.folder, (name + filenames.PARTIAL, name))
