"""What the kernel, and the container's rules around it, let this process do. Each is tried, not guessed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import resource
import struct
from pathlib import Path

_IO_URING_SETUP = 425  # the same number on every architecture
_PARAMS_BYTES = 120  # sizeof(struct io_uring_params)
_MAP_SHARED_VALIDATE, _MAP_SYNC = 0x03, 0x80000
_CAP_IPC_LOCK = 14
_FLOCK = "hhqqi4x"  # struct flock with 64-bit offsets


def uring_refusal() -> str | None:
    """None where an io_uring can be set up; otherwise what forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(_PARAMS_BYTES)
    fd = libc.syscall(_IO_URING_SETUP, 4, params)
    if fd >= 0:
        os.close(fd)
        return None
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        return "the kernel was built without it, or a container's seccomp profile hides it"
    if code == errno.EPERM:
        state = _proc("/proc/sys/kernel/io_uring_disabled")
        if state in ("1", "2"):
            return f"the sysctl kernel.io_uring_disabled is {state}"
        if re.search(r"^Seccomp:\s*2$", _proc("/proc/self/status"), re.MULTILINE):
            return "the seccomp profile of this container forbids it"
        return "a security module of the kernel forbids it"
    if code == errno.ENOMEM:
        return "there is not enough lockable memory (ulimit -l)"
    return os.strerror(code)


def dax_refusal(directory: str) -> str | None:
    """None where a file can be mapped with MAP_SYNC. Makes a file `dax` there, which the caller removes.

    Raises OSError when that file cannot be made.
    """
    fd = os.open(os.path.join(directory, "dax"), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, bytes(mmap.PAGESIZE), 0)
        try:
            mmap.mmap(fd, mmap.PAGESIZE, flags=_MAP_SHARED_VALIDATE | _MAP_SYNC).close()
        except OSError as error:
            return error.strerror or str(error)
        return None
    finally:
        os.close(fd)


def lockable_bytes() -> int | None:
    """How much memory this process may lock for registered buffers; None: no limit applies to it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    caps = re.search(r"^CapEff:\s*([0-9a-f]+)$", _proc("/proc/self/status"), re.MULTILINE)
    free = caps is not None and int(caps[1], 16) >> _CAP_IPC_LOCK & 1
    return None if limit == resource.RLIM_INFINITY or free else limit


def is_locked(path: str) -> bool:
    """Whether a live job holds this owner file's lock. Only asks; False for what is not there or may not be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(fd)


def flushes_are_hooked() -> str | None:
    """The preloaded library that turns every fsync of this process into nothing, if there is one."""
    for name in re.split(r"[ :]", os.environ.get("LD_PRELOAD", "") + " " + _proc("/etc/ld.so.preload").strip()):
        if "eatmydata" in name:
            return name
    return None


def _proc(path: str) -> str:
    try:
        return Path(path).read_text().rstrip("\n")
    except OSError:
        return ""
