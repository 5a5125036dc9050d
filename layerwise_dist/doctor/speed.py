# SPDX-License-Identifier: Apache-2.0
"""Measures flushes and throughput: a raw loop, and the engine's own writer.

Everything is written below a folder that the caller made and removes. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from layerwise_dist import _native
from layerwise_dist.doctor.raw_io import in_turn, read_rate
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.recycling import recycles
from layerwise_dist.storage.shard_layout import Source
from layerwise_dist.tensors.slices import Slice

_SOURCE_BYTES = 256 << 20  # memory that the data comes from; larger amounts go through it several times
_LAYER_BYTES = 16 << 20
_SECTOR = 4096
_PATIENCE_S = 600.0  # for one shard
_CLOSE_S = 60.0
_RETIRE_S = 30.0  # until it waits to be written over
_FLUSH_BUDGET_S = 5.0
_BUDGET_S = 15.0  # after which no further round begins


@dataclass(frozen=True, slots=True)
class Flushes:
    """`flush`: one written sector and fdatasync; `commit`: a small file made durable under its name."""

    flush: list[float]
    commit: list[float]


@dataclass(slots=True)
class Rates:
    """Bytes a second, one number a round. `first` and `writer_first` go into new files, the others over a written one.

    `read` is direct, `read_ahead` through the page cache, both of a file that is not in it; empty without direct I/O.
    `writer` is empty where files of retired checkpoints are not reused, both of the writer's where none was measured.
    """

    first: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    deeper: list[float] = field(default_factory=list)
    larger: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    read_ahead: list[float] = field(default_factory=list)
    writer_first: list[float] = field(default_factory=list)
    writer: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Shape:
    """How data is cut and how much of it is on its way at once."""

    depth: int
    block: int

    @property
    def deeper(self) -> Shape:
        return Shape(min(64, self.depth * 4), self.block)

    @property
    def larger(self) -> Shape:
        return Shape(self.depth, min(64 << 20, self.block * 4))


def flush_times(folder: str, direct: bool, count: int) -> Flushes:
    """At most `count` of each, and fewer where they take longer than some seconds. Raises OSError."""
    with mmap.mmap(-1, _SECTOR) as page:
        page.write(os.urandom(_SECTOR))
        fd = _create(os.path.join(folder, "flush"), direct)
        try:
            for sector in range(16):
                os.pwrite(fd, page, sector * _SECTOR)
            os.fsync(fd)
            order = itertools.cycle(range(16))

            def flush() -> None:
                os.pwrite(fd, page, next(order) * _SECTOR)
                os.fdatasync(fd)

            flushes = _timed(flush, count)
        finally:
            os.close(fd)
    parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:

        def commit() -> None:
            new = _create(os.path.join(folder, "record.tmp"), direct=False)
            try:
                os.pwrite(new, b"{}\n", 0)
                os.fdatasync(new)
            finally:
                os.close(new)
            os.rename("record.tmp", "record", src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)

        return Flushes(flushes, _timed(commit, max(3, count // 4)))
    finally:
        os.close(parent)


@dataclass(frozen=True, slots=True)
class Manner:
    """How the engine would write: "uring", "posix" or "nvm"; whether it hashes; `writer.recycle`."""

    backend: str
    hash: bool
    recycle: Literal["auto", True, False]


def write_rates(
    folder: str, *, nbytes: int, shape: Shape, direct: bool, manner: Manner | None, rounds: int,
    progress: Callable[[str], None],
) -> Rates:  # fmt: skip
    """Raw loops, and shards by `PCCheckAdapter`, in turn; fewer rounds where the disk is slow. Raises OSError.

    Each time runs until the data is flushed. `nbytes` is a multiple of 4096; without `direct`, all goes through the
    page cache, but for what the backend "nvm" maps. Without a `manner`, only the raw loops.
    """
    rates = Rates()
    # Left to the collector: an exception's traceback may hold views of it, and then it could not be closed here.
    memory = mmap.mmap(-1, max(shape.larger.block, min(nbytes, _SOURCE_BYTES)))
    _fill(memory)
    began = time.perf_counter()
    with ExitStack() as stack:
        shards = None
        if manner is not None:
            env = _native.NvmEnv() if manner.backend == "nvm" else _native.PosixEnv()
            shards = stack.enter_context(
                Shards(env, os.path.join(folder, "shards"), memory, nbytes, shape, direct=direct, manner=manner)
            )
        for number in range(1, rounds + 1):
            progress(f"writing, round {number} of {rounds}")
            with RawFile(os.path.join(folder, "raw"), memory, nbytes, direct=direct) as raw:
                rates.first.append(raw.write(shape))
                if shards is not None:
                    rates.writer_first.append(shards.write_new())
                rates.raw.append(raw.write(shape))
                if shards is not None and (again := shards.write_over()) is not None:
                    rates.writer.append(again)
                rates.deeper.append(raw.write(shape.deeper))
                rates.larger.append(raw.write(shape.larger))
                if direct:
                    rates.read.append(raw.read(shape, direct=True))
                    rates.read_ahead.append(raw.read(shape, direct=False))
            if time.perf_counter() - began > _BUDGET_S:
                break
    return rates


median = statistics.median


class RawFile:
    """A new file with its space reserved, written by threads that do nothing but pwrite; removed at the end."""

    def __init__(self, path: str, memory: mmap.mmap, nbytes: int, direct: bool) -> None:
        self._path, self._fd = path, _create(path, direct)
        try:
            _allocate(self._fd, nbytes)
        except OSError:
            os.close(self._fd)
            raise
        self._memory, self._nbytes = memory, nbytes

    def write(self, shape: Shape) -> float:
        began = time.perf_counter()
        block, view = shape.block, memoryview(self._memory)

        def one(index: int) -> None:
            offset = index * block
            length = min(block, self._nbytes - offset)
            place = _place(self._memory, offset, length)
            left = view[place : place + length]
            while left:
                done = os.pwrite(self._fd, left, offset)
                left, offset = left[done:], offset + done

        in_turn(-(-self._nbytes // block), shape.depth, one)
        os.fdatasync(self._fd)
        return self._nbytes / (time.perf_counter() - began)

    def read(self, shape: Shape, *, direct: bool) -> float:
        """Bytes a second from the disk; without `direct` the kernel reads ahead."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return read_rate(fd, self._nbytes, block_bytes=shape.block, depth=shape.depth, direct=direct)
        finally:
            os.close(fd)

    def __enter__(self) -> RawFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        os.unlink(self._path)


class Shards:
    """One rank's shards of a state of `nbytes`, written as a job writes them: new at first, later over retired ones."""

    def __init__(
        self, env: _native.Env, root: str, memory: mmap.mmap, nbytes: int, shape: Shape, *, direct: bool, manner: Manner
    ) -> None:
        os.mkdir(root, 0o700)
        self._root, self._nbytes = root, nbytes
        self._adapter = PCCheckAdapter(
            env, root, rank=0, world_size=1, backend=manner.backend, queue_depth=shape.depth, block_bytes=shape.block,
            direct_io=direct or manner.backend == "nvm", hash=manner.hash,
            spares=1 if recycles(env, root, manner.recycle) else 0,
        )  # fmt: skip
        self._anchor = (ctypes.c_char * len(memory)).from_buffer(memory)
        base = ctypes.addressof(self._anchor)
        layers, self._addresses = [], []
        for index, offset in enumerate(range(0, nbytes, _LAYER_BYTES)):
            size = min(_LAYER_BYTES, nbytes - offset)
            address = base + _place(memory, offset, size)
            part = Slice.whole("param", f"layer.{index}.weight", "U8", (size,))
            layers.append((f"layer.{index}", [Source(part, address % self._adapter.memory_align)]))
            self._addresses.append(address)
        self._laid = self._adapter.lay_out(layers, ())
        self._adapter.allocate_staging_buffer(size_mb=self._adapter.bounce_bytes / 2**20)
        self._numbers = itertools.count(1)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._adapter.close(_CLOSE_S)

    def write_new(self) -> float:
        """Bytes a second into a new file, which is then retired. Raises OSError."""
        attempt, rate = self._write()
        recycler, folder = self._adapter.recycler, os.path.join(self._root, attempt.folder)
        recycler.retire(attempt)
        # The folder goes last: the file then waits to be written over, or was removed because it may not be.
        deadline = time.monotonic() + _RETIRE_S
        while os.path.isdir(folder) and time.monotonic() < deadline:
            time.sleep(1e-3)
        return rate

    def write_over(self) -> float | None:
        """Bytes a second over the retired file; None where retired files are not reused. Raises OSError."""
        if not self._adapter.recycler.waiting():
            return None
        attempt, rate = self._write()
        self._adapter.recycler.forget(attempt)
        shutil.rmtree(os.path.join(self._root, attempt.folder))
        return rate

    def _write(self) -> tuple[AttemptId, float]:
        number = next(self._numbers)
        attempt = AttemptId(1, number, number)
        began = time.perf_counter()
        write = self._adapter.begin(attempt, self._laid.shard, self._laid.plan)
        try:
            write.set_addresses(self._addresses)
            write.submit(0, len(self._laid.shard.extents))
            write.seal(b"{}", b"")
            write.persist(_PATIENCE_S)
        except BaseException:
            write.abort()
            raise
        return attempt, self._nbytes / (time.perf_counter() - began)


def _create(path: str, direct: bool) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)


def _allocate(fd: int, nbytes: int) -> None:
    """Reserves space, as the writer does. A file system that cannot is not an error; os.posix_fallocate would write."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0 and ctypes.get_errno() != errno.EOPNOTSUPP:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _place(memory: mmap.mmap, offset: int, length: int) -> int:
    """Where in memory the data of a file range comes from: an amount larger than it goes through it again."""
    place = offset % len(memory)
    return place if place + length <= len(memory) else 0


def _fill(memory: mmap.mmap) -> None:
    """Random bytes, so that a file system that compresses gains nothing by it."""
    step = 1 << 20
    for offset in range(0, len(memory), step):
        memory[offset : offset + step] = os.urandom(min(step, len(memory) - offset))


def _timed(action: Callable[[], None], count: int) -> list[float]:
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < count and time.perf_counter() - began < _FLUSH_BUDGET_S:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times
