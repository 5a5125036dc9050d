# SPDX-License-Identifier: Apache-2.0
"""What the kernel, and the container around it, allow this process. Each is tried, not guessed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import stat
import struct
from pathlib import Path

from layerwise_dist import _native

_CAP_IPC_LOCK = 14
_FLOCK = "hhqqi4x"  # struct flock with 64-bit offsets


def uring_refusal() -> str | None:
    """None where the writer can use io_uring; otherwise what forbids it."""
    error = _native.WriterPool.probe_uring()
    if error is None:
        return None
    said = error.strerror or str(error)
    if error.errno == errno.ENOSYS:
        if not said.startswith("io_uring_queue_init"):  # there is one, without what the writer needs of it
            return f"the kernel is too old ({said})"
        return "the kernel was built without it, or a container's seccomp profile hides it"
    if error.errno == errno.EPERM:
        state = _proc("/proc/sys/kernel/io_uring_disabled")
        if state in ("1", "2"):
            return f"the sysctl kernel.io_uring_disabled is {state}"
        if re.search(r"^Seccomp:\s*2$", _proc("/proc/self/status"), re.MULTILINE):
            return "the seccomp profile of this container forbids it"
        return "a security module of the kernel forbids it"
    if error.errno == errno.ENOMEM:
        return "there is not enough lockable memory (ulimit -l)"
    return said


def has_dax(directory: str) -> bool:
    """Whether files there can be mapped with MAP_SYNC, as persistent memory is written. Raises OSError."""
    try:
        _native.NvmEnv().probe(directory)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def lockable_bytes() -> int | None:
    """How much memory this process may lock for registered buffers; None: no limit applies to it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    caps = re.search(r"^CapEff:\s*([0-9a-f]+)$", _proc("/proc/self/status"), re.MULTILINE)
    free = caps is not None and int(caps[1], 16) >> _CAP_IPC_LOCK & 1
    return None if limit == resource.RLIM_INFINITY or free else limit


def is_locked(path: str) -> bool:
    """Whether a live job holds this owner file's lock. Only asks; False for what is not there or may not be opened."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False  # opening a pipe would wait, and a device may act
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
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
