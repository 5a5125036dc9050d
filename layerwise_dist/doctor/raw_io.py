# SPDX-License-Identifier: Apache-2.0
"""Reads and writes without this library, for `doctor` and `bench` to compare it with: blocks of one size, with one
thread for each block in flight. The system calls release the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_HUGE = 2 << 20


def io_memory(nbytes: int) -> memoryview:
    """New memory as the native core takes its own: aligned to pages and, where the kernel gives them, in huge ones."""
    found = mmap.mmap(-1, -(-nbytes // _HUGE) * _HUGE + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        found.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(found)) % _HUGE
    return memoryview(found)[begin : begin + nbytes]


def read_rate(file: int, nbytes: int, *, block_bytes: int, depth: int, direct: bool) -> float:
    """Bytes a second of reads of so much of an open file. Not `direct`: the kernel reads ahead as it does for a file
    that is read from its start to its end.
    """
    memory = threading.local()
    if not direct:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def one(index: int) -> None:
        if not hasattr(memory, "block"):
            memory.block = io_memory(block_bytes)
        os.preadv(file, [memory.block], index * block_bytes)

    began = time.perf_counter()
    in_turn(-(-nbytes // block_bytes), depth, one)
    return nbytes / (time.perf_counter() - began)


def in_turn(count: int, depth: int, one: Callable[[int], None]) -> None:
    """Calls `one(0)` to `one(count - 1)` on `depth` threads, each taking the next, up to the first error, which it
    raises once the calls at hand are over.
    """
    numbers, stop = itertools.count(), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set() and (index := next(numbers)) < count:
                one(index)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(depth) as threads:
        try:
            for future in [threads.submit(work) for _ in range(depth)]:
                future.result()
        finally:
            stop.set()  # an interrupt reaches only who waits here
