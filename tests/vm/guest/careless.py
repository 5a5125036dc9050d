# SPDX-License-Identifier: Apache-2.0
"""Mutations of the job whose power is cut: each leaves out one flush, and announces its commits all the same. They
change the process that calls them, so that is one of its own.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.records import Manifest, Record, encode

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_FDATASYNC = 75  # on x86_64
_libc = ctypes.CDLL(None, use_errno=True)


def folder() -> dict[str, Any]:
    """A manifest is renamed into place, and announced without a flush of its folder."""

    def into_place(self: CheckpointMetadataManager, folder: str, temporary: str, final: str) -> None:
        self.env.rename(os.path.join(folder, temporary), os.path.join(folder, final))

    CheckpointMetadataManager._into_place = into_place  # type: ignore[method-assign]
    return {}


def manifest() -> dict[str, Any]:
    """A manifest has its name flushed, but not what is in it."""

    plain = CheckpointMetadataManager._write

    def write(self: CheckpointMetadataManager, path: str, record: Record) -> None:
        if not isinstance(record, Manifest):
            return plain(self, path, record)
        self._unlink(path)
        with open(path, "xb") as file:
            file.write(encode(record))

    CheckpointMetadataManager._write = write  # type: ignore[method-assign]
    return {}


def shards() -> dict[str, Any]:
    """Shards have their names flushed, but not what is in them. Through the page cache: with direct I/O the disk has
    been told all of it, and where both are on one disk, the flush of the manifest covers it.
    """
    plain = CheckpointMetadataManager._write

    def write(self: CheckpointMetadataManager, path: str, record: Record) -> None:
        plain(self, path, record)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    CheckpointMetadataManager._write = write  # type: ignore[method-assign]
    _without_fdatasync()
    return {"writer": {"direct_io": "off"}}


# What is left out, by the name that a log has after its disk's; each returns the settings that the job needs for it.
CARELESS = {"folder": folder, "manifest": manifest, "shards": shards}


def _without_fdatasync() -> None:
    """From here on it succeeds and does nothing, in this thread and in those that it starts."""
    load, equal, end, allow, succeed = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
    steps = ((load, 0, 0, 0), (equal, 0, 1, _FDATASYNC), (end, 0, 0, succeed), (end, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    for words in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, ctypes.addressof(program), 0, 0)):
        if _libc.prctl(*(ctypes.c_ulong(word) for word in words)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl")
