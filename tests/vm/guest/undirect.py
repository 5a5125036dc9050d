# SPDX-License-Identifier: Apache-2.0
"""A file system in user space that shows a folder as it is, and refuses O_DIRECT wherever it sees it: in an open, and
in reads and writes of a file on which it was turned on since.

undirect.py FOLDER POINT

Runs until it is unmounted. Needs Debian's python3-fusepy and libfuse2, which tests/vm/filesystems.sh unpacks.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from fusepy import FUSE, FuseOSError, Operations

_ATTRIBUTES = ("atime", "ctime", "mtime", "gid", "mode", "nlink", "size", "uid", "ino", "blocks", "blksize")
_SPACE = ("bavail", "bfree", "blocks", "bsize", "favail", "ffree", "files", "flag", "frsize", "namemax")


class Undirect(Operations):
    """`fi` is libfuse's fuse_file_info, which has the flags of an open and the descriptor that it gave."""

    use_ns = True

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self, op: str, path: str, *rest: Any) -> Any:
        return super().__call__(op, None if path is None else self._folder + path, *rest)

    # -- files ----------------------------------------------------------------------------------------------------

    def open(self, path: str, fi: Any) -> int:
        return self._opened(path, fi, 0)

    def create(self, path: str, mode: int, fi: Any) -> int:
        return self._opened(path, fi, mode)

    def _opened(self, path: str, fi: Any, mode: int) -> int:
        _refuse_direct(fi)
        # The kernel sees to O_APPEND, and to a file's end once it is open.
        fi.fh = os.open(path, (fi.flags & ~os.O_APPEND) | os.O_CLOEXEC, mode)
        return 0

    def read(self, path: str, size: int, offset: int, fi: Any) -> bytes:
        _refuse_direct(fi)
        return os.pread(fi.fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fi: Any) -> int:
        _refuse_direct(fi)
        return os.pwrite(fi.fh, data, offset)

    def truncate(self, path: str, length: int, fi: Any = None) -> None:
        os.truncate(path if fi is None else fi.fh, length)

    def fsync(self, path: str, datasync: int, fi: Any) -> None:
        (os.fdatasync if datasync else os.fsync)(fi.fh)

    def flush(self, path: str, fi: Any) -> None:
        pass  # of the page cache, by the kernel, at each close

    def release(self, path: str, fi: Any) -> None:
        os.close(fi.fh)

    # -- names ----------------------------------------------------------------------------------------------------

    def getattr(self, path: str, fi: Any = None) -> dict[str, int]:
        found = os.lstat(path) if fi is None else os.fstat(fi.fh)
        return {f"st_{name}": getattr(found, f"st_{name}{'_ns' if 'time' in name else ''}") for name in _ATTRIBUTES}

    def readdir(self, path: str, fi: Any) -> list[str]:
        return [".", "..", *os.listdir(path)]

    def fsyncdir(self, path: str, datasync: int, fi: Any) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, self._folder + new)

    def link(self, target: str, source: str) -> None:
        os.link(self._folder + source, target)

    def symlink(self, target: str, source: str) -> None:
        os.symlink(source, target)

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(path)
        return {f"f_{name}": getattr(found, f"f_{name}") for name in _SPACE}

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(path, ns=times)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(path, uid, gid, follow_symlinks=False)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)


def _refuse_direct(fi: Any) -> None:
    if fi.flags & os.O_DIRECT:
        raise FuseOSError(errno.EINVAL)


if __name__ == "__main__":
    FUSE(Undirect(sys.argv[1]), sys.argv[2], raw_fi=True, foreground=True, nothreads=True, hard_remove=True)
