# SPDX-License-Identifier: Apache-2.0
"""Memory for direct I/O as the native core takes its own: raw loops that are compared with it must not be worse off."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

_HUGE = 2 << 20


def io_memory(nbytes: int) -> memoryview:
    """New memory, aligned to pages and, where the kernel gives them, in huge ones."""
    found = mmap.mmap(-1, -(-nbytes // _HUGE) * _HUGE + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        found.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(found)) % _HUGE
    return memoryview(found)[begin : begin + nbytes]
