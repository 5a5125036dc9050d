# SPDX-License-Identifier: Apache-2.0
"""The file of a rank's frozen parameters: a shard without state, which many checkpoints refer to.

`<dir>/base/<attempt>/rank_<rank>.safetensors` is named after the attempt that wrote it. No manifest is beside it: it
counts as long as a checkpoint's manifest names it. The order of flushes is in docs/format/flushes.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from layerwise_dist import _native
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import BaseWriter
from layerwise_dist.storage.removal import remove
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.storage.shard_layout import ShardLayout, Source, state_extent
from layerwise_dist.tensors.slices import Slice

# The only extent of such a file. No module's name can clash with it.
_EXTENT = "(frozen)"
_NO_STATE = state_extent(b"", b"")


# Blocks of so many bytes are with the writer at once. More would not be faster, and a shard's own blocks, which
# training may wait for, come after them.
_RUN_BYTES = 32 << 20


class BaseFile:
    """The file while it is written. Its blocks are hashed always, also with `hash: false`: that is how a change is
    found.

    Attributes:
        layout: where each byte of each slice goes.
        run: blocks that may be with the writer at once.
    """

    def __init__(self, adapter: BaseWriter, attempt: AttemptId, slices: Sequence[tuple[Slice, bool]]) -> None:
        """Of these slices, each with whether the optimizer has it as a DTensor.

        Raises UnsupportedError for more than a header holds.
        """
        sources = [Source(part, wrapped=wrapped) for part, wrapped in slices]
        self.attempt, self.layout = (
            attempt,
            ShardLayout([(_EXTENT, sources)], adapter.memory_align, adapter.block_bytes),
        )
        self.run = max(1, min(len(self.layout.blocks), _RUN_BYTES // adapter.block_bytes))
        self._env, self._adapter = adapter.env, adapter
        self._bases = os.path.join(adapter.root, filenames.BASES)
        self._folder = os.path.join(adapter.root, filenames.base_folder(attempt.text))
        self._final = os.path.join(self._folder, filenames.shard_file(adapter.rank))
        self._writer: _native.ShardWriter | None = None
        self._aborted = False

    def begin(self) -> None:
        """Creates the folders and the partial file. Raises OSError."""
        adapter = self._adapter
        for folder in (self._bases, self._folder):
            try:
                self._env.make_dir(folder, adapter.dir_mode)
            except FileExistsError:
                pass  # of an earlier base, or another rank was first
        # Each block comes out of one of `run` places in memory.
        segments = [(block, 0, block % self.run, 0, nbytes) for block, (_, nbytes) in enumerate(self.layout.blocks)]
        plan = _native.Plan(self.layout.blocks, segments, self.run, self.layout.end)
        self._writer = adapter.writer_of(plan, self._final + filenames.PARTIAL)
        if self._aborted:
            self._writer.abort()

    @property
    def bytes_written(self) -> int:
        return self._writer.bytes_written if self._writer is not None else 0

    @property
    def _begun(self) -> _native.ShardWriter:
        assert self._writer is not None, "begin() comes first"
        return self._writer

    def set_addresses(self, addresses: Sequence[int]) -> None:
        """Of the `run` places."""
        self._begun.set_addresses(addresses)

    def submit(self, first: int, count: int) -> None:
        """Queues at most `run` blocks, which lie in their places until `wait` says that they are written."""
        self._begun.submit(first, count)

    def wait(self, timeout_s: float) -> bool:
        """Whether, within the time, all that was queued was written and hashed. Raises OSError if some of it failed."""
        if not self._begun.wait(timeout_s):
            return False
        if error := self._begun.error():
            raise error
        return True

    def hash(self, block: int) -> int | None:
        """Of what was written."""
        return self._begun.block_hash(block)

    def publish(self) -> BaseReport:
        """Header, fdatasync, rename, flushes of both folders. REQUIRES: every block is written. Raises OSError.

        Afterwards the file survives power loss as soon as `<dir>` is flushed, which every shard that refers to it does.
        """
        adapter, env = self._adapter, self._env
        header = self.layout.header(
            attempt=self.attempt.text, step=self.attempt.step, rank=adapter.rank, world_size=adapter.world_size,
            hashes=self._begun.hashes_hex(), state=(0, 0), state_hash=f"{_native.xxh3_64(_NO_STATE):016x}",
        )  # fmt: skip
        self._begun.finish(header)
        env.rename(self._final + filenames.PARTIAL, self._final)
        env.sync_dir(self._folder)
        env.sync_dir(self._bases)
        return BaseReport(self.attempt.text, self.layout.end, len(header), _native.xxh3_64(header))

    def abort(self, timeout_s: float = math.inf) -> bool:
        """Stops writing. Idempotent; does nothing to a published file. Whether it could be done in time."""
        self._aborted = True
        return self._writer is None or self._writer.abort(timeout_s)

    def discard(self) -> None:
        """Removes the file, published or not. REQUIRES: no attempt refers to it, or ever will. Raises OSError."""
        self.abort()
        name = os.path.basename(self._final)
        remove(self._env, self._folder, (name + filenames.PARTIAL, name))
