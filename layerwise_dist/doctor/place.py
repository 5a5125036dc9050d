# SPDX-License-Identifier: Apache-2.0
"""What a directory is: its mount, the device below it, its free space.

Read from /proc and /sys; what they do not tell is None.

Formats: proc(5), section /proc/pid/mountinfo; Documentation/ABI/stable/sysfs-block of the kernel.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from layerwise_dist.storage import network

MEMORY = frozenset(("tmpfs", "ramfs", "devtmpfs", "hugetlbfs"))
LOCAL = frozenset("ext2 ext3 ext4 xfs btrfs f2fs zfs bcachefs jfs reiserfs nilfs2".split())
_VIRTUAL_PATH = re.compile(r"/(virtio\d+|vbd-\d+|xen|vmbus|hyperv|block/loop\d+|block/nbd\d+)")
_VIRTUAL_MODEL = re.compile(r"qemu|vbox|vmware|virtual|elastic block|persistentdisk|msft", re.IGNORECASE)
_MEMORY_DISK = re.compile(r"(zram|ram|brd)\d+")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. `options` are those of the mount and of the file system, in that order."""

    point: str
    kind: str
    source: str
    options: tuple[str, ...]
    device: tuple[int, int]

    @property
    def where(self) -> str:
        """network, memory, local, or other (layers such as overlay, and what is not known)."""
        if network.name_by_type(self.kind) is not None:
            return "network"
        if self.kind in MEMORY:
            return "memory"
        return "local" if self.kind in LOCAL else "other"


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


def mount_of(directory: str) -> Mount | None:
    """The mount that holds an existing directory."""
    found = network.mounts_and_id(directory)
    return find_mount(*found) if found is not None else None


def find_mount(table: str, mount_id: int) -> Mount | None:
    """The line of a mountinfo table with this id."""
    for line in table.splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if len(fields) < 6 or len(rest) < 3 or fields[0] != str(mount_id):
            continue
        major, minor = fields[2].split(":")
        options = tuple(dict.fromkeys(fields[5].split(",") + rest[2].split(",")))
        return Mount(_plain(fields[4]), rest[0], _plain(rest[1]), options, (int(major), int(minor)))
    return None


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


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
