# SPDX-License-Identifier: Apache-2.0
"""The file systems that are tried, each as a directory that is there for a while, and what makes it.

Disks: one with sectors of 512 bytes, one of 4096.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from system import MAKE, mounted, tool, zero

SMALL, LARGE = os.environ["SMALL_DISK"], os.environ["LARGE_DISK"]
TOP = "/tmp/layerwise-places"
_UNDIRECT = os.path.join(os.path.dirname(__file__), "undirect.py")
Place = Callable[[], AbstractContextManager[str]]
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def on_disk(kind: str, device: str, options: str = "", *more: str) -> Iterator[str]:
    zero(device)
    tool(*MAKE[kind], *more, device)
    with mounted(device, f"{TOP}/disk", kind, options) as point:
        yield point


@contextmanager
def overlay() -> Iterator[str]:
    with on_disk("ext4", SMALL) as disk:
        parts = {name: f"{disk}/{name}" for name in ("lower", "upper", "work")}
        for path in parts.values():
            os.mkdir(path)
        options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
        with mounted("overlay", f"{TOP}/overlay", "overlay", options) as point:
            yield point


@contextmanager
def memory() -> Iterator[str]:
    with mounted("tmpfs", f"{TOP}/memory", "tmpfs", "size=256m") as point:
        yield point


@contextmanager
def nine(options: str) -> Iterator[str]:
    with mounted("shared", f"{TOP}/nine", "9p", f"trans=virtio,version=9p2000.L,{options}") as point:
        yield point


@contextmanager
def nfs() -> Iterator[str]:
    """A server of NFS 4.2 in this machine, exporting a directory of ext4 `sync`, and a mount of it."""
    with ExitStack() as stack:
        disk = stack.enter_context(on_disk("ext4", SMALL))
        for folder in ("/run", "/var/lib"):
            stack.enter_context(mounted("tmpfs", folder, "tmpfs"))
        os.makedirs("/var/lib/nfs/v4recovery")
        for name in ("etab", "rmtab"):
            open(f"/var/lib/nfs/{name}", "w").close()
        stack.enter_context(mounted("nfsd", "/proc/fs/nfsd", "nfsd"))
        for name in ("nfsv4leasetime", "nfsv4gracetime"):
            with open(f"/proc/fs/nfsd/{name}", "w") as file:
                file.write("10")
        tool("exportfs", "-i", "-o", "rw,sync,no_root_squash,fsid=0,insecure,no_subtree_check", f"127.0.0.1:{disk}")
        daemon = subprocess.Popen(["rpc.mountd", "--foreground", "-N", "3"])
        stack.callback(_end, daemon)
        tool("rpc.nfsd", "-N", "3", "-U", "-H", "127.0.0.1", "2")
        stack.callback(tool, "exportfs", "-ua")
        stack.callback(tool, "rpc.nfsd", "0")
        with mounted("127.0.0.1:/", f"{TOP}/nfs", "nfs4", "vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1") as point:
            yield point


@contextmanager
def fuse(*server: str) -> Iterator[str]:
    """A directory of ext4 seen through a process in user space."""
    point = f"{TOP}/fuse"
    with on_disk("ext4", SMALL) as disk:
        os.makedirs(point, exist_ok=True)
        daemon = subprocess.Popen([*server, disk, point])
        try:
            deadline = time.monotonic() + 60
            while not os.path.ismount(point):
                if time.monotonic() > deadline or daemon.poll() is not None:
                    raise RuntimeError(f"{server[0]} did not mount")
                time.sleep(0.05)
            yield point
        finally:
            tool("umount", point)
            daemon.wait(60)


@contextmanager
def quota(nbytes: int) -> Iterator[str]:
    """As a user who may take so many bytes, whom root's rights do not exempt."""
    with on_disk("ext4", SMALL, "usrquota", "-O", "quota") as disk:
        allow(nbytes)
        yield disk


def allow(nbytes: int) -> None:
    """What user 0 may take of the disk with quota; 0 is no limit."""
    q_setquota, user, limits = 0x800008, 0, 1
    blocks = nbytes // 1024
    asked = struct.pack("=8QI4x", blocks, blocks, 0, 0, 0, 0, 0, 0, limits)
    if _libc.quotactl((q_setquota << 8) | user, SMALL.encode(), 0, asked) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "quotactl")


def without_exemption() -> None:
    """This process gives up CAP_SYS_RESOURCE, with which quotas are no limit."""
    version, cap_sys_resource = 0x20080522, 24
    head = struct.pack("=Ii", version, 0)
    held = ctypes.create_string_buffer(24)
    if _libc.capget(head, held) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("=6I", held.raw))
    words[0] &= ~(1 << cap_sys_resource)
    if _libc.capset(head, struct.pack("=6I", *words)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(60)


# What makes each, as the table says it: what any machine has, and what is tried in a virtual one.
LOCAL: list[tuple[str, str, Place]] = [
    ("ext4, 512-byte sectors", "mke2fs -t ext4", partial(on_disk, "ext4", SMALL)),
    ("ext4, 4096-byte sectors", "mke2fs -t ext4", partial(on_disk, "ext4", LARGE)),
    ("ext4, data=journal", "mount -o data=journal", partial(on_disk, "ext4", SMALL, "data=journal")),
    ("xfs, 512-byte sectors", "mkfs.xfs", partial(on_disk, "xfs", SMALL)),
    ("xfs, 4096-byte sectors", "mkfs.xfs", partial(on_disk, "xfs", LARGE)),
    ("btrfs", "mkfs.btrfs", partial(on_disk, "btrfs", SMALL)),
    ("btrfs, no copy on write", "mount -o nodatacow", partial(on_disk, "btrfs", SMALL, "nodatacow")),
    ("btrfs, compressed", "mount -o compress=zstd", partial(on_disk, "btrfs", SMALL, "compress=zstd")),
    ("overlayfs over ext4", "mount -t overlay", overlay),
    ("tmpfs", "mount -t tmpfs", memory),
    ("FUSE over ext4", "bindfs", partial(fuse, "bindfs", "-f")),
    ("FUSE that refuses O_DIRECT", "tests/vm/guest/undirect.py", partial(fuse, sys.executable, _UNDIRECT)),
]
SHARED: list[tuple[str, str, Place]] = [
    ("NFS 4.2 over loopback, exported `sync`", "mount -t nfs4", nfs),
    ("9p, uncached", "mount -t 9p -o cache=none", partial(nine, "cache=none,access=any")),
    ("9p, cached", "mount -t 9p -o cache=mmap", partial(nine, "cache=mmap,access=any")),
]


def empty(folder: str) -> None:
    for name in os.listdir(folder):
        if name != "lost+found":
            shutil.rmtree(os.path.join(folder, name))


def remove_points() -> None:
    """Where they were mounted. Raises OSError if one still is."""
    for name in os.listdir(TOP):
        os.rmdir(os.path.join(TOP, name))
    os.rmdir(TOP)
