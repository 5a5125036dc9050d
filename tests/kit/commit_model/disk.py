# SPDX-License-Identifier: Apache-2.0
"""A node's disk: a MemoryEnv, which forgets what was not flushed. Any operation may fail, or kill whoever does it."""

from __future__ import annotations

import errno
import os
from typing import Protocol

import layerwise_native_testing as testing

from layerwise_dist.commit.metadata import Branch, Manifest, decode
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId

ROOT = "/ckpt"
_CAP = 1 << 20  # bytes: more than any record here


class Killed(BaseException):
    """The process that does this dies here."""


class Witness(Protocol):
    """Who is told of what is about to happen on a disk. `place` is the disk's number."""

    def manifest_appears(self, place: int, manifest: Manifest) -> None: ...
    def branch_appears(self, place: int, seq: int, branch: Branch) -> None: ...
    def branch_goes(self, place: int, seq: int) -> None: ...
    def shard_goes(self, attempt: AttemptId | None, name: str) -> None: ...
    def base_goes(self, base: str) -> None: ...
    def operation_fails(self, kind: str) -> None: ...


class Lock:
    """A lock that can be lost without notice, as on a network file system."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk, self._path = disk, path
        disk.locks[path] = self

    def read(self, cap: int) -> bytes:
        return self._disk.read_file(self._path, cap)

    def write(self, data: bytes) -> None:
        real = self._disk.memory.lock(self._path)
        try:
            self._disk.step("lock_write", self._path)
            real.write(data)
        finally:
            real.release()

    def held_path_is_mine(self) -> bool:
        return True

    def release(self) -> None:
        if self._disk.locks.get(self._path) is self:
            del self._disk.locks[self._path]


class Disk:
    """What the engine calls of an Env."""

    def __init__(self, place: int, witness: Witness) -> None:
        self.place, self._witness = place, witness
        self.memory = testing.MemoryEnv()
        self.locks: dict[str, Lock] = {}
        self.fault: tuple[int, str, int] | None = None  # how many operations of this kind (or "") go well before, errno
        self.fuse: int | None = None  # after so many operations, whoever does the next one is killed
        self.doubts = False  # the flush after the next manifest's rename fails

    # -- what breaks

    def step(self, kind: str, path: str) -> None:
        """One operation begins. Raises Killed or OSError."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Killed
        if self.fault is not None and self.fault[1] in (kind, ""):
            left, wanted, number = self.fault
            self.fault = (left - 1, wanted, number) if left else None
            if not left:
                self._witness.operation_fails(kind)
                raise OSError(number, "injected", path)

    def lose_power(self, seed: int, policy: str) -> None:
        """What was flushed is there afterwards, and of the rest what the policy says."""
        self.memory = self.memory.crash(self.memory.log_size, seed, policy)
        self.locks.clear()
        self.fault = self.fuse = None
        self.doubts = False

    # -- the Env

    def confine(self, root: str) -> None:
        """It has no links."""

    def list_dir(self, path: str) -> list[str]:
        self.step("list_dir", path)
        return self.memory.list_dir(path)

    def stat(self, path: str) -> tuple[str, int]:
        return self.memory.stat(path)

    def read_file(self, path: str, cap: int) -> bytes:
        self.step("read", path)
        return self.memory.read_file(path, cap)

    def make_dir(self, path: str, mode: int) -> None:
        self.step("make_dir", path)
        self.memory.make_dir(path, mode)

    def write_file(self, path: str, data: bytes, mode: int) -> None:
        self.step("write", path)
        self.memory.write_file(path, data, mode)

    def sync_dir(self, path: str) -> None:
        self.step("sync_dir", path)
        self.memory.sync_dir(path)

    def rename(self, source: str, target: str) -> None:
        self.step("rename", target)
        name = os.path.basename(target)
        if name == filenames.MANIFEST:
            # As it is written, be it against itself where a rule is broken, which decode() would not take.
            text = self.memory.read_file(source, _CAP)[:-32] + b"}"
            self._witness.manifest_appears(self.place, Manifest.model_validate_json(text))
            if self.doubts:
                self.doubts, self.fault = False, (0, "sync_dir", errno.EIO)
        elif (seq := filenames.parse_branch(name)) is not None:
            branch = decode(self.memory.read_file(source, _CAP), Branch, source)
            self._witness.branch_appears(self.place, seq, branch)
        self.memory.rename(source, target)

    def unlink(self, path: str) -> None:
        self.step("unlink", path)
        folder, name = os.path.split(path)
        if name.startswith("rank_") and name.endswith(".safetensors"):
            place = os.path.basename(folder)
            if filenames.parse_base(place) is not None:
                self._witness.base_goes(place)
            else:
                self._witness.shard_goes(filenames.parse_folder(place), name)
        elif (seq := filenames.parse_branch(name)) is not None:
            self._witness.branch_goes(self.place, seq)
        self.memory.unlink(path)

    def remove_dir(self, path: str) -> None:
        self.step("remove_dir", path)
        self.memory.remove_dir(path)

    def lock(self, path: str, mode: int) -> Lock:
        self.step("lock", path)
        if path in self.locks:
            raise BlockingIOError(errno.EWOULDBLOCK, "held", path)
        self.memory.lock(path, mode).release()
        return Lock(self, path)

    def hold(self, path: str, alone: bool = False) -> Lock:
        raise OSError(errno.EOPNOTSUPP, "no reader is modeled", path)

    # -- what is on it

    @property
    def there(self) -> Contents:
        return Contents(self.memory)

    def durable(self) -> Contents:
        """What there is at the least if power fails now."""
        return Contents(self.memory.crash(self.memory.log_size, 0, "none"))


class Contents:
    """Which files of checkpoints a memory has."""

    def __init__(self, memory: testing.MemoryEnv) -> None:
        self._memory = memory

    def has_manifest(self, attempt: AttemptId) -> bool:
        return self._has(f"{folder_of(attempt)}/{filenames.MANIFEST}")

    @property
    def branches(self) -> list[int]:
        """Seqs of branch records."""
        return [seq for name in self._memory.list_dir(ROOT) if (seq := filenames.parse_branch(name)) is not None]

    def has_shard(self, attempt: AttemptId, rank: int) -> bool:
        return self._holds(folder_of(attempt), attempt.text, rank)

    def has_base(self, base: str, rank: int) -> bool:
        return self._holds(base_folder_of(base), base, rank)

    def _has(self, path: str) -> bool:
        try:
            self._memory.stat(path)
            return True
        except FileNotFoundError:
            return False

    def _holds(self, folder: str, attempt: str, rank: int) -> bool:
        try:
            found = self._memory.read_file(f"{folder}/{filenames.shard_file(rank)}", 4096)
        except FileNotFoundError:
            return False
        return bytes(found) == content(attempt, rank)


def content(attempt: str, rank: int) -> bytes:
    """Of the file that a rank writes for an attempt: of its shard, or of its frozen parameters."""
    return f"{attempt} of rank {rank}".encode()


def folder_of(attempt: AttemptId) -> str:
    return f"{ROOT}/{attempt.folder}"


def base_folder_of(base: str) -> str:
    return f"{ROOT}/{filenames.base_folder(base)}"
