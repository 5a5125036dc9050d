# SPDX-License-Identifier: Apache-2.0
"""What a directory is on: the device below its mount, its free space.

Read from /sys; what it does not tell is None.

Format: Documentation/ABI/stable/sysfs-block of the kernel.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from layerwise_dist.storage.mounts import Mount

_VIRTUAL_PATH = re.compile(r"/(virtio\d+|vbd-\d+|xen|vmbus|hyperv|block/loop\d+|block/nbd\d+)")
_VIRTUAL_MODEL = re.compile(r"qemu|vbox|vmware|virtual|elastic block|persistentdisk|msft", re.IGNORECASE)
_MEMORY_DISK = re.compile(r"(zram|ram|brd)\d+")


@dataclass(frozen=True, slots=True)
class Device:
    """The lowest block device below a mount; None where the kernel does not say."""

    name: str
    rotational: bool | None
    virtual: bool
    volatile_cache: bool | None

    @property
    def memory(self) -> bool:
        return _MEMORY_DISK.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes and files that a user without privileges may still take; `files` is None where they are not counted."""

    free: int
    total: int
    files: int | None


def nearest(directory: str) -> str:
    """The directory itself, or the nearest parent that exists. Raises NotADirectoryError, PermissionError, OSError."""
    path = os.path.abspath(os.path.expanduser(directory))
    while True:
        try:
            os.lstat(path)
            break
        except FileNotFoundError:
            path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
    return os.path.realpath(path)


def device_of(mount: Mount, sysfs: str = "/sys") -> Device | None:
    """The disk below a mount, through partitions and through the first leg of device mapper and md."""
    number = mount.device
    if number[0] == 0:  # btrfs, zfs and overlays have numbers of their own
        try:
            rdev = os.stat(mount.source).st_rdev
        except (OSError, ValueError):
            return None
        number = (os.major(rdev), os.minor(rdev))
    node = os.path.realpath(f"{sysfs}/dev/block/{number[0]}:{number[1]}")
    if number[0] == 0 or not os.path.isdir(node):
        return None
    while True:
        if os.path.exists(f"{node}/partition"):
            node = os.path.dirname(node)
        legs = sorted(os.listdir(f"{node}/slaves")) if os.path.isdir(f"{node}/slaves") else []
        if not legs:
            break
        node = os.path.realpath(f"{node}/slaves/{legs[0]}")
    rotational, cache = _line(f"{node}/queue/rotational"), _line(f"{node}/queue/write_cache")
    model = f"{_line(f'{node}/device/vendor') or ''} {_line(f'{node}/device/model') or ''}"
    return Device(
        os.path.basename(node),
        None if rotational is None else rotational == "1",
        bool(_VIRTUAL_PATH.search(node) or _VIRTUAL_MODEL.search(model)),
        None if cache is None else cache == "write back",
    )


def space_of(directory: str) -> Space:
    """Raises OSError."""
    found = os.statvfs(directory)
    unit = found.f_frsize
    return Space(found.f_bavail * unit, found.f_blocks * unit, found.f_favail if found.f_files else None)


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
