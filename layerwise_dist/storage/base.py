"""A rank's frozen parameters in a file of their own, a shard without state, which many checkpoints refer to.

`<dir>/base/<attempt>/rank_<rank>.safetensors` is named after the attempt that wrote it. No manifest is beside it: it counts
as long as a checkpoint's manifest names it. The order of flushes is in docs/format.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerwise_dist import _native
from layerwise_dist.storage import layout
from layerwise_dist.storage.layout import AttemptId
from layerwise_dist.storage.shard import ShardLayout, Source, state_extent

if TYPE_CHECKING:
    from layerwise_dist.storage.adapter import PCCheckAdapter

# The only extent of such a file. No module's name can clash with it.
_EXTENT = "(frozen)"
_NO_STATE = state_extent(b"", b"")


def lay_out(sources: Sequence[Source], memory_align: int, block_bytes: int) -> ShardLayout:
    return ShardLayout([(_EXTENT, sources)], memory_align, block_bytes)


def plan(shard: ShardLayout, gathered: Sequence[int]) -> Any:
    """The native plan. These blocks are written from memory of their own each, numbered on from the layout's tensors."""
    apart = dict(zip(gathered, range(shard.tensors, shard.tensors + len(gathered)), strict=True))
    segments = [segment for segment in shard.segments if segment[0] not in apart]
    segments += [(block, 0, tensor, 0, shard.blocks[block][1]) for block, tensor in apart.items()]
    return _native.Plan(shard.blocks, sorted(segments), shard.tensors + len(apart), shard.end)


@dataclass(frozen=True, slots=True)
class BaseReport:
    """What a manifest says of a rank's base: who wrote it, sizes in bytes, and the XXH3-64 of its header."""

    attempt: str
    nbytes: int
    header_bytes: int
    header_hash: int


class BaseFile:
    """The file while it is written. Its blocks are hashed always, also with `hash: false`: that is how a change is found."""

    def __init__(self, adapter: PCCheckAdapter, attempt: AttemptId, shard: ShardLayout, plan: Any) -> None:
        """Creates the folders and the partial file. Raises OSError."""
        self.attempt, self.layout = attempt, shard
        self._env, self._adapter = adapter.env, adapter
        self._bases = os.path.join(adapter.root, layout.BASES)
        self._folder = os.path.join(adapter.root, layout.base_folder(attempt.text))
        self._final = os.path.join(self._folder, layout.shard_file(adapter.rank))
        for folder in (self._bases, self._folder):
            try:
                self._env.make_dir(folder, adapter.dir_mode)
            except FileExistsError:
                pass  # of an earlier base, or another rank was first
        self._writer = adapter.writer_of(plan, self._final + layout.PARTIAL)

    @property
    def blocks(self) -> int:
        return len(self.layout.blocks)

    @property
    def bytes_written(self) -> int:
        return self._writer.bytes_written

    def set_addresses(self, addresses: Sequence[int]) -> None:
        self._writer.set_addresses(addresses)

    def set_address(self, tensor: int, address: int) -> None:
        self._writer.set_address(tensor, address)

    def submit(self, first: int, count: int) -> None:
        """Queues blocks. Their memory must stay mapped until `wait` says that they are written."""
        self._writer.submit(first, count)

    def wait(self, timeout_s: float) -> bool:
        """Whether, within the time, all that was queued was written and hashed. Raises OSError if some of it failed."""
        if not self._writer.wait(timeout_s):
            return False
        if error := self._writer.error():
            raise error
        return True

    def hash(self, block: int) -> int | None:
        """Of what was written."""
        return self._writer.block_hash(block)

    def publish(self) -> BaseReport:
        """Header, fdatasync, rename, flushes of both folders. REQUIRES: every block is written. Raises OSError.

        Afterwards the file survives power loss as soon as `<dir>` is flushed, which every shard that refers to it does.
        """
        adapter, env = self._adapter, self._env
        header = self.layout.header(
            attempt=self.attempt.text, step=self.attempt.step, rank=adapter.rank, world_size=adapter.world_size,
            hashes=self._writer.hashes_hex(), state=(0, 0), state_hash=f"{_native.xxh3_64(_NO_STATE):016x}",
        )  # fmt: skip
        self._writer.finish(header)
        env.rename(self._final + layout.PARTIAL, self._final)
        env.sync_dir(self._folder)
        env.sync_dir(self._bases)
        return BaseReport(self.attempt.text, self.layout.end, len(header), _native.xxh3_64(header))

    def abort(self) -> None:
        """Stops writing. Idempotent; does nothing to a published file."""
        self._writer.abort()

    def discard(self) -> None:
        """Removes the file, published or not. REQUIRES: no attempt refers to it, or ever will. Raises OSError."""
        self.abort()
        for victim in (self._final + layout.PARTIAL, self._final):
            try:
                self._env.unlink(victim)
            except FileNotFoundError:
                pass
        try:
            self._env.remove_dir(self._folder)
        except OSError:
            pass  # other ranks' files are in it
