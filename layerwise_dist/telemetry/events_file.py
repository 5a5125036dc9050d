# SPDX-License-Identifier: Apache-2.0
"""Appends events to a file, one JSON object a line, and reopens the file if it was moved away."""

from __future__ import annotations

import json
import os
import stat
from typing import Any


def path_of_rank(events: str, directory: str, rank: int) -> str:
    """Rank 0 has the name itself, the others their number before its suffix. Never below `directory` through a link:
    the name is one of its entries.
    """
    path = os.path.join(directory, events)
    stem, suffix = os.path.splitext(path)
    return path if rank == 0 else f"{stem}.{rank:05d}{suffix}"


class EventsFile:
    """Belongs to one thread, but for `leave_to_parent`."""

    name = "events"

    def __init__(self, path: str, mode: int) -> None:
        """`mode`: bits of the file, if it is made."""
        self.path, self._mode = path, mode
        self._file = -1
        self._identity = (0, 0)
        self._torn = False  # a line of it is there in part only

    def write(self, event: dict[str, Any]) -> None:
        """Raises OSError: then the line is lost, and the next one stands on a line of its own all the same."""
        self._open()
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        wrote = 0
        try:
            while wrote < len(line):
                wrote += os.write(self._file, line[wrote:])
        finally:
            if wrote:
                self._torn = wrote < len(line)

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1  # first: a child that is forked here would close it once more
            os.close(file)

    def leave_to_parent(self) -> None:
        """In a forked child."""
        self.close()

    def _open(self) -> None:
        if self._file >= 0:
            try:
                found = os.stat(self.path, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == self._identity:
                    return
            except FileNotFoundError:
                pass
            self.close()  # rotated, or removed
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(self.path, flags, self._mode)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{self.path}: is not a regular file")
            self._torn = found.st_size > 0 and os.pread(file, 1, found.st_size - 1) != b"\n"
        except BaseException:
            os.close(file)
            raise
        self._file, self._identity = file, (found.st_dev, found.st_ino)
