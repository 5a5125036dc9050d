# SPDX-License-Identifier: Apache-2.0
"""File systems that are not a local disk: what other machines, or a process in user space, may write to unseen; memory.

The one list of them, by both names that Linux gives a file system: the number of statfs(2) and the type in mountinfo.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Shared:
    name: str
    magics: tuple[int, ...]  # f_type of statfs(2); none where no such number is published
    types: tuple[str, ...]  # in /proc/self/mountinfo


_SHARED = (
    _Shared("NFS", (0x6969,), ("nfs", "nfs4")),
    _Shared("SMB", (0x517B, 0xFE534D42), ("smbfs", "smb3")),
    _Shared("CIFS", (0xFF534D42,), ("cifs",)),
    _Shared("9P", (0x01021997,), ("9p",)),
    _Shared("FUSE", (0x65735546,), ("fuse", "virtiofs")),
    _Shared("Lustre", (0x0BD00BD0,), ("lustre",)),
    _Shared("GPFS", (0x47504653,), ("gpfs",)),
    _Shared("Ceph", (0x00C36400,), ("ceph",)),
    _Shared("BeeGFS", (0x19830326,), ("beegfs", "beegfs_nodev")),
    _Shared("PanFS", (0xAAD7AAEA,), ("panfs",)),
    _Shared("OrangeFS", (0x20030528,), ("orangefs", "pvfs2")),
    _Shared("AFS", (0x5346414F, 0x6B414653), ("afs",)),
    _Shared("Coda", (0x73757245,), ("coda",)),
    _Shared("OCFS2", (0x7461636F,), ("ocfs2",)),
    _Shared("GFS2", (0x01161970,), ("gfs2",)),
    _Shared("NCP", (0x564C,), ("ncp", "ncpfs")),
    _Shared("VirtualBox", (0x786F4256,), ("vboxsf",)),
    _Shared("GlusterFS", (), ("glusterfs",)),
    _Shared("WEKA", (), ("wekafs",)),
)
_BY_MAGIC = {magic: shared.name for shared in _SHARED for magic in shared.magics}
_BY_TYPE = {kind: shared.name for shared in _SHARED for kind in shared.types}


def name_by_magic(magic: int) -> str | None:
    """The name of the shared file system with this f_type of statfs(2); None for any other."""
    return _BY_MAGIC.get(magic)


def name_by_type(kind: str) -> str | None:
    """The name of the shared file system with this type in mountinfo, `fuse.*` included; None for any other.

    `fuseblk` is none: a local disk, though statfs(2) gives it FUSE's number, and a process writes to it.
    """
    return _BY_TYPE.get("fuse" if kind.startswith("fuse.") else kind)


_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}


def memory_by_magic(magic: int) -> str | None:
    """The name of the file system in memory with this f_type of statfs(2), which no power loss survives."""
    return _MEMORY.get(magic)
