# SPDX-License-Identifier: Apache-2.0
"""Takes files out of the page cache, so that they are read from the disk, or into it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from layerwise_dist.bench.failure import BenchFailed

_PIECE = 8 << 20


def make_cold(paths: list[Path]) -> None:
    """Takes the files out of the page cache. Raises BenchFailed if some of one stays."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            left = _cached_pages(file)
        finally:
            os.close(file)
        if left:
            raise BenchFailed(f"{path.name}: {left} pages stay in the page cache: reads would not come from the disk")


def make_warm(paths: list[Path]) -> None:
    """Reads the files into the page cache. Raises BenchFailed if some of one is not there then: too little memory."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(_PIECE):
                pass
            missing = -(-os.fstat(file.fileno()).st_size // mmap.PAGESIZE) - _cached_pages(file.fileno())
        if missing > 0:
            raise BenchFailed(f"{path.name}: {missing} pages do not stay in the page cache: there is too little memory")


def _cached_pages(file: int) -> int:
    nbytes = os.fstat(file).st_size
    if nbytes == 0:
        return 0
    pages = -(-nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    # A private writable mapping, so that ctypes may take its address; nothing is written.
    with mmap.mmap(file, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        first = ctypes.c_char.from_buffer(view)
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), found)
        number = ctypes.get_errno()
        del first
    if result != 0:
        raise OSError(number, os.strerror(number))
    return sum(flags & 1 for flags in found)
