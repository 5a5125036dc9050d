# SPDX-License-Identifier: Apache-2.0
"""The seams of stage 4: what Python asks of the operating system, and of the writer of shards, whichever process it is
in.

The contracts are `csrc/include/layerwise/env.h` and the docstrings of `storage.adapter`.
What hands an Env to the native core takes a `_native.Env`; all else works with any `Env`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from layerwise_dist import _native
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.gathered import Laid
from layerwise_dist.storage.readers import Readers
from layerwise_dist.storage.reports import BaseReport, ShardReport
from layerwise_dist.storage.shard_layout import ShardLayout, Source


class FileLock(Protocol):
    """A lock on a file, and what is in it."""

    def release(self) -> None: ...
    def write(self, data: bytes, /) -> None: ...
    def read(self, cap: int, /) -> bytes: ...
    def held_path_is_mine(self) -> bool: ...


class Env(Protocol):
    """The way to the operating system, as `_native.Env`. Any thread may call any method. Each raises OSError."""

    def confine(self, root: str, /) -> None: ...
    def let_go(self) -> None: ...
    def make_dir(self, path: str, mode: int, /) -> None: ...
    def reuse(self, src: str, dst: str, mode: int, /) -> _native.WritableFile: ...
    def rename(self, src: str, dst: str, /) -> None: ...
    def sync_dir(self, path: str, /) -> None: ...
    def unlink(self, path: str, /) -> None: ...
    def remove_dir(self, path: str, /) -> None: ...
    def list_dir(self, path: str, /) -> list[str]: ...
    def stat(self, path: str, /) -> tuple[str, int]: ...
    def write_file(self, path: str, data: bytes, mode: int, /) -> None: ...
    def read_file(self, path: str, cap: int, /) -> bytes: ...
    def lock(self, path: str, mode: int, /) -> FileLock: ...
    def hold(self, path: str, alone: bool = False, /) -> FileLock: ...
    def file_system(self, path: str, /) -> int: ...
    def direct_io(self, path: str, /) -> tuple[int, int] | None: ...


class Leftover(Protocol):
    """What this rank has on disk of an attempt, however far it came."""

    attempt: AttemptId

    def abort(self) -> None:
        """Stops writing."""
        ...

    def discard(self) -> None:
        """Removes this rank's files. REQUIRES: it is aborted, and will never be committed. Raises OSError."""
        ...


class Write(Leftover, Protocol):
    """A shard that can be made durable: all that a commit needs of one."""

    def persist(self, timeout_s: float) -> ShardReport | None:
        """None: another process makes it durable, and reports it (`commit.ledger.Ledger.written`).

        Raises OSError, LayerwiseError.
        """
        ...


class InPlaceWrite(Protocol):
    """The part of a write that reads the model's own memory."""

    def set_address(self, tensor: int, address: int) -> None: ...
    def submit(self, first: int, count: int) -> None: ...
    def evacuate(self, first: int, count: int, timeout_s: float) -> bool: ...


class ShardWrite(Write, Protocol):
    """One rank's shard of one attempt, from its first block on. Calls as `storage.adapter.ShardWrite`."""

    layout: ShardLayout
    state_bytes: int

    @property
    def in_place(self) -> InPlaceWrite | None:
        """None: all that is written must lie in the pool."""
        ...

    @property
    def writes(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def bytes_copied(self) -> int: ...
    @property
    def bytes_evacuated(self) -> int: ...
    def begin_again(self, laid: Laid) -> None: ...
    def set_addresses(self, addresses: Sequence[int], keeping: object = None) -> None: ...
    def submit_gathered(self, number: int, tensor: int, buffer: _native.PoolBuffer) -> None: ...
    def leases_over(self) -> bool: ...
    def wait_written(self, timeout_s: float) -> bool: ...
    def block_times(self) -> list[tuple[int, int]]: ...
    def seal(
        self, text: bytes, blob: bytes, *, confirm: Callable[[float], None] | None = None,
        base: Callable[[float], BaseReport] | None = None,
    ) -> None: ...  # fmt: skip


class BaseWriter(Protocol):
    """What a base needs of a `PCCheckAdapter`."""

    env: _native.Env
    root: str
    rank: int
    world_size: int
    dir_mode: int
    memory_align: int
    block_bytes: int

    def writer_of(self, plan: _native.Plan, partial: str) -> _native.ShardWriter: ...


class ShardWriterAdapter(Protocol):
    """The writer as engine and capture see it, in this process or in the monitor. Calls as `PCCheckAdapter`."""

    rank: int
    pooled: bool  # whether all that is written must lie in the pool
    direct: bool
    memory_align: int
    buffers: _native.BufferPool | None  # None until `allocate_staging_buffer`
    readers: Readers

    @property
    def bounce_bytes(self) -> int: ...
    @property
    def bases(self) -> BaseWriter | None:
        """None: there are no bases, frozen parameters are staged with the rest."""
        ...

    def allocate_staging_buffer(self, size_mb: float) -> None: ...
    def lay_out(self, layers: Sequence[tuple[str, Sequence[Source]]], gathered: Collection[int]) -> Laid: ...
    def begin(self, attempt: AttemptId, shard: ShardLayout, plan: _native.Plan | None) -> ShardWrite: ...
    def unbegun(self, attempt: AttemptId) -> Leftover | None:
        """Of an attempt that failed before it was begun. None: what there is, another process removes."""
        ...

    def close(self, timeout_s: float) -> bool: ...
