# SPDX-License-Identifier: Apache-2.0
"""Peak memory over a stretch of a run."""

from __future__ import annotations

import ctypes
import gc
import os


def start_peak() -> None:
    """Gives freed memory back to the kernel and begins to watch for a new peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5): sets the peak of the resident set to what it is now


def peak() -> int:
    """Bytes: the peak of this process's resident set since `start_peak`, and what its children hold now."""
    return _status("self", "VmHWM") + sum(_status(child, "RssAnon") for child in _children())


def _children() -> list[str]:
    found = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children", encoding="ascii") as file:
                found += file.read().split()
        except FileNotFoundError:
            continue  # the thread has ended
    return found


def _status(process: str, key: str) -> int:
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as lines:
            for line in lines:
                if line.startswith(key + ":"):
                    return 1024 * int(line.split()[1])
    except FileNotFoundError:
        pass  # the child has ended
    return 0
