# SPDX-License-Identifier: Apache-2.0
"""A benchmark's own folder below DIR, made only if there is room, and always removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise_dist.supervision.processes import terminable
from layerwise_dist.supervision.scratch import scratch

CHECKPOINTS_AT_ONCE = 8  # two kept, two in flight, three files to be reused, and one being removed


class TooLittleRoom(Exception):
    """DIR, or the machine's memory, is too small for what was asked."""


@contextmanager
def workplace(directory: str, *, disk_bytes: int, memory_bytes: int) -> Iterator[Path]:
    """A new empty folder below `directory`, which must exist. Removed at the end, by SIGINT and SIGTERM too.

    `disk_bytes` and `memory_bytes` are the most that the benchmark takes at one time. Raises TooLittleRoom naming both
    what is needed and what is there, and OSError for a directory that cannot be written.
    """
    free = os.statvfs(directory)
    _enough(disk_bytes, free.f_bavail * free.f_frsize, f"free space in {directory}")
    _enough(memory_bytes, available_memory(), "memory")
    with terminable(), scratch(directory, "layerwise-bench-") as folder:
        yield folder


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo has no MemAvailable")


def _enough(needed: int, there: int, what: str) -> None:
    if needed > there:
        raise TooLittleRoom(
            f"the benchmark needs {needed / 1e9:.1f} GB of {what}, and there are {there / 1e9:.1f} GB: "
            "choose smaller sizes or another place"
        )
