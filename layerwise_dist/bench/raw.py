# SPDX-License-Identifier: Apache-2.0
"""The disk's own speed, without this library: direct writes over a written file, and reads. The denominator.

Both move blocks of one size from and to page-aligned memory with one thread for each block in flight; the system calls
release the interpreter's lock. That memory is in huge pages where the kernel gives them, as leased tensors and the
reader's buffers are.
`fio`, where installed, does the same writes; the better of the two counts.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path

from layerwise_dist.capture.pages import back_by_huge_pages
from layerwise_dist.doctor.raw_io import in_turn, read_rate

_SOURCE = 256 << 20  # bytes of memory that the writes go round in: several times the caches, whatever the file's size


class RawFile:
    """A file of `nbytes` bytes (rounded up to whole blocks), written once at the start. Close it."""

    def __init__(self, path: Path, nbytes: int, *, block_bytes: int, depth: int) -> None:
        self.path, self._block, self._depth = path, block_bytes, depth
        self._blocks = -(-nbytes // block_bytes)
        self.nbytes = self._blocks * block_bytes
        source = min(self.nbytes, max(block_bytes, _SOURCE // block_bytes * block_bytes))
        self._memory = mmap.mmap(-1, source, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        piece = os.urandom(1 << 20)
        for offset in range(0, len(self._memory), len(piece)):
            self._memory[offset : offset + len(piece)] = piece[: len(self._memory) - offset]
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        back_by_huge_pages([(begin, len(self._memory))])
        self._file = _open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(self._file, 0, self.nbytes)
            self._write()
        except BaseException:
            self.close()
            raise

    def write(self) -> float:
        """Bytes a second of the loop, its last fdatasync included."""
        return self.nbytes / self._write()

    def _write(self) -> float:
        view = memoryview(self._memory)

        def one(index: int) -> None:
            begin = index * self._block
            source = begin % len(view)
            if os.pwritev(self._file, [view[source : source + self._block]], begin) != self._block:
                raise OSError(f"{self.path}: a short write at {begin}")

        began = time.perf_counter()
        in_turn(self._blocks, self._depth, one)
        os.fdatasync(self._file)
        return time.perf_counter() - began

    def fio(self) -> float | None:
        """Bytes a second by fio's own clock, the same file, block, depth and last flush; None without fio."""
        return None if not has_fio() else max(filter(None, map(self._fio, ("io_uring", "libaio"))), default=None)

    def _fio(self, engine: str) -> float | None:
        ran = subprocess.run(
            ["fio", "--thread", "--name=raw", f"--filename={self.path}", "--rw=write", f"--bs={self._block}",
             f"--iodepth={self._depth}", f"--ioengine={engine}", "--direct=1", f"--size={self.nbytes}", "--overwrite=1",
             "--end_fsync=1", "--output-format=json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode != 0:
            return None  # the engine is not allowed here; the other one, or the loop, stands
        seconds = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"][0]["job_runtime"] / 1e3
        return self.nbytes / seconds if seconds else None

    def close(self) -> None:
        os.close(self._file)


def has_fio() -> bool:
    return shutil.which("fio") is not None


def read(path: Path, *, block_bytes: int, depth: int, direct: bool = True) -> float:
    """Bytes a second of reads of the whole file, `depth` at a time: direct ones, or through the page cache."""
    file = _open_direct(path, os.O_RDONLY) if direct else os.open(path, os.O_RDONLY)
    try:
        return read_rate(file, os.fstat(file).st_size, block_bytes=block_bytes, depth=depth, direct=direct)
    finally:
        os.close(file)


def _open_direct(path: Path, flags: int) -> int:
    """Through the page cache where the file system refuses direct I/O, as the library itself does."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        if flags & os.O_CREAT:
            path.unlink(missing_ok=True)
        return os.open(path, flags, 0o600)
