# SPDX-License-Identifier: Apache-2.0
"""What the programs in the virtual machine ask of its kernel: mounts, mapped devices, and processes with a deadline."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_BLKZEROOUT = 0x127F
_libc = ctypes.CDLL(None, use_errno=True)

# What makes each file system; the disk's name is the last word.
MAKE = {
    "ext4": ("mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}


class ChildError(Exception):
    """A child that failed, or took too long."""


def tool(*words: str, deadline_s: float = 120.0) -> str:
    """Runs a program. Raises RuntimeError with what it said."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=deadline_s)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {(done.stdout + done.stderr).strip()}")
    return done.stdout


def mount(source: str, target: str, kind: str, options: str = "") -> None:
    os.makedirs(target, exist_ok=True)
    if _libc.mount(source.encode(), target.encode(), kind.encode(), 0, options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {kind} of {source}: {os.strerror(number)}", target)


def unmount(target: str, deadline_s: float = 30.0) -> None:
    """Waits for what a killed process had in the kernel, such as rings of io_uring."""
    deadline = time.monotonic() + deadline_s
    while _libc.umount2(target.encode(), 0) != 0:
        number = ctypes.get_errno()
        if number != errno.EBUSY or time.monotonic() > deadline:
            raise OSError(number, os.strerror(number), target)
        time.sleep(0.02)


@contextmanager
def mounted(source: str, target: str, kind: str, options: str = "") -> Iterator[str]:
    mount(source, target, kind, options)
    try:
        yield target
    finally:
        unmount(target)
        if kind == "btrfs":
            # Else it takes an older state under another name for an outdated device of the same file system.
            tool("btrfs", "device", "scan", "--forget")


@contextmanager
def mapped(name: str, table: str) -> Iterator[str]:
    """A device of device-mapper, of one target."""
    tool("dmsetup", "create", "--noudevsync", name, "--table", table)
    try:
        yield f"/dev/mapper/{name}"
    finally:
        tool("dmsetup", "remove", "--retry", "--noudevsync", name)


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def size_of(device: str) -> int:
    """In bytes."""
    with opened(device, os.O_RDONLY) as fd:
        return os.lseek(fd, 0, os.SEEK_END)


def zero(device: str) -> None:
    with opened(device, os.O_RDWR) as fd:
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", 0, os.lseek(fd, 0, os.SEEK_END)))


def in_child(body: Callable[[], Any], *, deadline_s: float = 300.0, dies: bool = False) -> Any:
    """Runs `body` in a process of its own; what it returns must be JSON.

    Raises ChildError. With `dies` it must be killed by SIGKILL, and None is returned.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            os.close(reader)
            try:
                said = {"value": body()}
            except BaseException:
                said = {"error": traceback.format_exc()}
            with os.fdopen(writer, "w") as out:
                json.dump(said, out)
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(writer)
    text, status = _hear(reader, pid, deadline_s)
    if dies:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        raise ChildError(f"it was not killed: {text}")
    if not text:
        raise ChildError(f"it ended without a word, status {status:#x}")
    said = json.loads(text)
    if "error" in said:
        raise ChildError(said["error"])
    return said["value"]


def _hear(reader: int, pid: int, deadline_s: float) -> tuple[str, int]:
    deadline, pieces = time.monotonic() + deadline_s, []
    try:
        while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = os.read(reader, 1 << 16)
            if not piece:
                return b"".join(pieces).decode(), os.waitpid(pid, 0)[1]
            pieces.append(piece)
        raise ChildError(f"not done after {deadline_s:g} s")
    except BaseException:  # Ctrl-C too: nothing may use the mount any more
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(reader)


def import_all(names: list[str]) -> None:
    """What a child will need, it then has from the start. Those that only another machine has are passed over."""
    for name in names:
        if name not in sys.modules and not name.startswith("_"):
            try:
                importlib.import_module(name)
            except ImportError:
                pass
