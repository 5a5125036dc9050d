# SPDX-License-Identifier: Apache-2.0
"""Describes the machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

from layerwise_dist import _native
from layerwise_dist._version import __version__
from layerwise_dist.storage.mounts import mount_of


def describe(directory: str) -> dict[str, Any]:
    """CPU, cores, memory (bytes), kernel, file system and its direct I/O alignment (bytes), and the software."""
    import torch

    mount = mount_of(directory)
    try:
        aligns = _native.PosixEnv().direct_io(directory)
    except OSError:
        aligns = None
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "file_system": mount.kind if mount is not None else "unknown",
        "device": mount.source if mount is not None else "unknown",
        "direct_io": None if aligns is None else {"memory": aligns[0], "offset": aligns[1]},
        "hash": _native.hash_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "layerwise_dist": __version__,
    }


def line(machine: dict[str, Any]) -> str:
    """The same in one line for people."""
    direct = machine["direct_io"]
    aligned = f"direct I/O {direct['memory']}/{direct['offset']}" if direct else "no direct I/O"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, Linux {machine['kernel']}, "
        f"{machine['file_system']} on {machine['device']} ({aligned}), hash {machine['hash']}, "
        f"torch {machine['torch']}, Python {machine['python']}, layerwise_dist {machine['layerwise_dist']}"
    )


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for text in lines:
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.machine()
