# SPDX-License-Identifier: Apache-2.0
"""Checkpoint directories with odd entries, what lies outside of them, and links that come at the worst moment."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerwise_dist as lwd
from layerwise_dist.capture import survey

NOBODY = 65534
_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


@contextmanager
def bases_of_any_size() -> Iterator[None]:
    """Frozen parameters go into bases, however small they are."""
    before, survey.LEAST_BASE_BYTES = survey.LEAST_BASE_BYTES, 1
    try:
        yield
    finally:
        survey.LEAST_BASE_BYTES = before


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that a change would show in: names, kinds, modes, owners, times, content."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else path.readlink() if path.is_symlink() else None
        found[str(path.relative_to(folder))] = (
            info.st_ino, info.st_mode, info.st_uid, info.st_nlink, info.st_mtime_ns, info.st_ctime_ns, content,
        )  # fmt: skip
    return found


class Job:
    """A layer that is frozen, in a base of its own, and one that is trained."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        self.model[0].requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model[1].parameters(), lr=0.01, momentum=0.9)

    def attach(self, folder: Path, **options: Any) -> Any:
        return lwd.attach(self.model, self.optimizer, dir=str(folder), **options)

    def train(self, ckpt: Any, steps: int) -> None:
        """So many more, each committed."""
        for step in ckpt.steps(ckpt.completed + steps):
            self.optimizer.zero_grad()
            self.model(torch.ones(2, 6)).square().mean().backward()
            self.optimizer.step()
            del step
        ckpt.wait(ckpt.completed)

    def run(self, folder: Path, steps: int, *, step: int | None = None, **options: Any) -> int:
        """One session: what it restored, and trains on."""
        with self.attach(folder, **options) as ckpt:
            restored = ckpt.restore(step=step) if step is not None else ckpt.restore()
            self.train(ckpt, steps)
        return restored


def step_folder(root: Path, step: int) -> Path:
    return sorted(root.glob(f"step_{step:010d}-*"))[-1]


def move_out(path: Path, outside: Path) -> Path:
    """Archives a folder and links it back in its place. Returns where it is now."""
    target = outside / path.name
    path.rename(target)
    path.symlink_to(target)
    return target


# -- odd entries -------------------------------------------------------------------------------------------------------


def _link(path: Path, spare: Path) -> None:
    """To what was there."""
    if path.exists():
        path.rename(spare)
    else:
        spare.write_bytes(b"outside")
    path.symlink_to(spare)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(path.parent, os.O_PATH)
        made.bind(f"/proc/self/fd/{here}/{path.name}")  # the path itself may be too long for an address
        os.close(here)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "link": _link,
    "dangling": lambda path, spare: path.symlink_to(spare / "nowhere"),
    "folder": lambda path, spare: path.mkdir(),
    "pipe": lambda path, spare: os.mkfifo(path),
    "socket": lambda path, spare: _socket(path),
    "device": lambda path, spare: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}


def put_odd(path: Path, kind: str, spare: Path) -> None:
    """In the place of what is there, if anything is."""
    if kind != "link" and os.path.lexists(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    MAKERS[kind](path, spare)


def kind_of(path: Path) -> int:
    return stat.S_IFMT(path.lstat().st_mode)


# -- links that come at the worst moment -------------------------------------------------------------------------------


def exchange(folder: int, one: str, other: str) -> bool:
    """Two names of an open folder. Whether both were there."""
    return _libc.renameat2(folder, one.encode(), folder, other.encode(), _EXCHANGE) == 0


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _CallInfo(ctypes.Structure):
    """struct ptrace_syscall_info, as far as the number of the call."""

    _fields_ = [("op", ctypes.c_uint8), ("arch", ctypes.c_uint32), ("ip", ctypes.c_uint64), ("sp", ctypes.c_uint64),
                ("number", ctypes.c_uint64), ("arguments", ctypes.c_uint64 * 6)]  # fmt: skip


# Calls that take a path, or act on what one led to.
_WITH_PATHS = {
    "x86_64": {2, 4, 6, 21, 74, 75, 82, 83, 84, 87, 90, 91, 217, 257, 258, 262, 263, 264, 267, 268, 269, 316, 332, 437},
    "aarch64": {33, 34, 35, 38, 48, 52, 53, 56, 61, 78, 79, 82, 83, 276, 291, 437},
}.get(os.uname().machine)


def _counts(pid: int, every: bool) -> bool:
    """Whether the child stands at the beginning of a call that takes a path; or at any end of any call."""
    info = _CallInfo()
    if every or _WITH_PATHS is None:
        return True
    _ptrace(0x420E, pid, ctypes.sizeof(info), ctypes.addressof(info))  # PTRACE_GET_SYSCALL_INFO
    return info.op == 1 and info.number in _WITH_PATHS


def at_call(
    number: int, action: Callable[[], int], happens: Callable[[], None], *, every: bool = False
) -> tuple[int, int]:
    """Runs `action` in a child, and `happens` here while the child stands at its call of this number to the kernel: of
    those that take a path; with `every`, of all, their beginnings and ends.

    Returns how many calls there were, and what `action` returned.
    """
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            _ptrace(0, 0)  # PTRACE_TRACEME
            os.kill(os.getpid(), signal.SIGSTOP)
            code = action()
        finally:
            _libc._exit(code)  # not os._exit: tests/coverage.sh has that write a file, by calls that would count here
    try:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSTOPPED(status), status
        _ptrace(0x4200, pid, 0, 0x100001)  # PTRACE_SETOPTIONS: TRACESYSGOOD, EXITKILL
        calls, deliver = 0, 0
        while True:
            _ptrace(24, pid, 0, deliver)  # PTRACE_SYSCALL
            _, status = os.waitpid(pid, 0)
            if not os.WIFSTOPPED(status):
                pid = 0
                return calls, os.waitstatus_to_exitcode(status)
            deliver = os.WSTOPSIG(status)
            if deliver == signal.SIGTRAP | 0x80:
                deliver = 0
                if _counts(pid, every):
                    if calls == number:
                        happens()
                    calls += 1
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextmanager
def other_user(folder: Path, swaps: list[tuple[str, str]]) -> Iterator[None]:
    """Another user who exchanges these names of `folder`, which he may write to, as fast as he can."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            while os.getppid() != 1:
                for one, other in swaps:
                    exchange(fd, one, other)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)
