# SPDX-License-Identifier: Apache-2.0
"""What is mounted where a directory is, as /proc tells it.

Format: proc(5), section /proc/pid/mountinfo.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from layerwise_dist.storage import network
from layerwise_dist.storage.protocols import Env

MEMORY = frozenset(("tmpfs", "ramfs", "devtmpfs", "hugetlbfs"))
LOCAL = frozenset("ext2 ext3 ext4 xfs btrfs f2fs zfs bcachefs jfs reiserfs nilfs2".split())
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


def network_at(env: Env, directory: str) -> str | None:
    """The name of the shared file system that an existing directory is on; None for any other. Raises OSError.

    Both names are asked for: statfs(2) in a 9P mount gives the number of the disk that its server has.
    """
    name = network.name_by_magic(env.file_system(directory))
    if name is None and (mount := mount_of(directory)) is not None:
        name = network.name_by_type(mount.kind)
    return name


def mount_of(directory: str) -> Mount | None:
    """The mount that holds an existing directory."""
    found = mounts_and_id(directory)
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


def mounts_and_id(directory: str) -> tuple[str, int] | None:
    """The text of /proc/self/mountinfo, and in it the id of the mount that holds an existing directory: mounts may lie
    over one another. None where the kernel does not tell.
    """
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return None
    finally:
        os.close(fd)
    wanted = re.search(r"^mnt_id:\s*(\d+)$", info, re.MULTILINE)
    return (table, int(wanted[1])) if wanted else None


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
