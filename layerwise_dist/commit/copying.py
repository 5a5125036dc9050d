# SPDX-License-Identifier: Apache-2.0
"""A copy of one checkpoint that needs nothing else: shards, the frozen parameters that they refer to, identity, and
last the manifest, without which there is no checkpoint.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from layerwise_dist import _native
from layerwise_dist.commit.holding import held
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Identity, Manifest
from layerwise_dist.commit.shards import open_base, open_shard
from layerwise_dist.errors import DamageError, DirectoryError, NotFoundError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.odd import kind_at
from layerwise_dist.storage.reader import Shard
from layerwise_dist.units import size

log = logging.getLogger("layerwise_dist")

Advance = Callable[[int], None]
_CHUNK = 8 << 20  # bytes read and written at once
_READERS = 4  # threads


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file below the directory, of the rank's shard or base. `nbytes` as the manifest says."""

    rank: int
    base: bool
    name: str
    nbytes: int


class CheckpointCopy:
    """In order: `write`, `verify`, `publish`. A context manager: what is not published is removed again."""

    def __init__(self, source: CheckpointMetadataManager, manifest: Manifest, target: str) -> None:
        """`target` is made. Raises DirectoryError where it can't be or must not be, NotFoundError where the checkpoint
        was removed or shards lie on other nodes, or OSError.
        """
        self._source, self._manifest = source, manifest
        self.target = os.path.abspath(target)
        self.files = list(_files(source, manifest))
        self._hashes: dict[str, list[int]] = {}  # of the chunks of each file
        self._made: list[tuple[str, bool]] = []  # path, and whether it is a folder; in the order in which it was made
        self._published = False
        self._check()
        self._env = _native.PosixEnv()
        self._file_mode = _mode(self._of_source(self.files[0].name)) | 0o600
        self._dir_mode = _mode(source.root) | 0o700
        self._manager = CheckpointMetadataManager(self._env, self.target, file_mode=self._file_mode)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def _check(self) -> None:
        parent = os.path.dirname(self.target)
        if os.path.lexists(self.target):
            raise DirectoryError(f"{self.target} already exists, and nothing is overwritten: choose another name")
        if not os.path.isdir(parent):
            raise DirectoryError(f"{parent}: no such directory")
        if os.path.commonpath([os.path.realpath(parent), os.path.realpath(self._source.root)]) == os.path.realpath(
            self._source.root
        ):
            raise DirectoryError(f"{self.target} is inside {self._source.root}, which it would copy")
        away = [file.rank for file in self.files if kind_at(self._source.env, self._of_source(file.name)) is None]
        if away and self._manifest.places is None:
            if kind_at(self._source.env, self._source.manifest_path(self._manifest.attempt_id)) is None:
                raise NotFoundError(f"step {self._manifest.step} is no longer in {self._source.root}")
            missing = next(file for file in self.files if file.rank == away[0]).name
            raise DamageError(f"step {self._manifest.step}: {self._of_source(missing)} is missing")
        if away:
            raise NotFoundError(
                f"{self._source.root} does not have all shards of step {self._manifest.step}: those of rank(s) "
                f"{', '.join(map(str, away[:8]))}{', ...' if len(away) > 8 else ''} are on other nodes; a copy of "
                "some of them is not a checkpoint"
            )
        room = os.statvfs(parent)
        if room.f_bavail * room.f_frsize < self.nbytes:
            raise DirectoryError(
                f"{parent} has room for {size(room.f_bavail * room.f_frsize)}, and the copy takes {size(self.nbytes)}"
            )

    def __enter__(self) -> CheckpointCopy:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published:
            self._remove()

    def write(self, advance: Advance) -> None:
        """Every file, flushed. `advance` gets the count of bytes. Raises DamageError if one is not as long as the
        manifest says, NotFoundError if the checkpoint was removed, DirectoryError, DeadlineError or OSError.
        """
        self._make_dir(self.target)
        try:
            with held(self._source, self._manifest.attempt_id, needed=False):  # what was cut short does not verify
                for file in self.files:
                    self._make_dirs(os.path.dirname(file.name))
                    self._copy(file, advance)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"step {self._manifest.step} is no longer whole in {self._source.root}: {error.filename} is gone"
            ) from None
        self._may_make(os.path.join(self.target, filenames.IDENTITY))
        self._manager.write_identity(Identity(identity=self._manifest.identity))
        for path, is_folder in reversed(self._made):
            if is_folder:
                self._env.sync_dir(path)
        self._env.sync_dir(os.path.dirname(self.target))

    def verify(self, advance: Advance) -> None:
        """Reads what was written, from the disk where that can be, and holds it against the manifest.

        Raises DamageError that says whose damage it is, or OSError.
        """
        with _readers() as pool:
            for file in self.files:
                found = self._problems(self._manager, pool, file)
                found = found or self._otherwise(file, pool)
                if found:
                    there = self._problems(self._source, pool, file)
                    whose = "was damaged before it was copied" if there else "reads back differently from its new place"
                    raise DamageError(f"step {self._manifest.step}: {file.name} {whose}: {(there or found)[0]}")
                advance(file.nbytes)

    def publish(self) -> None:
        """It is a checkpoint now, and stays one whatever happens. Raises OSError."""
        self._may_make(self._manager.manifest_path(self._manifest.attempt_id))
        self._manager.commit(self._manifest)
        self._published = True

    def _of_source(self, name: str) -> str:
        return os.path.join(self._source.root, name)

    def _copy(self, file: CopiedFile, advance: Advance) -> None:
        path = os.path.join(self.target, file.name)
        source = self._source.env
        assert isinstance(source, _native.Env), "shards are read by the native core"
        read = source.open(self._of_source(file.name))
        try:
            if read.size != file.nbytes:
                raise DamageError(f"{file.name} is {read.size} bytes long, the manifest says {file.nbytes}")
            self._made.append((path, False))
            written = self._env.create(path, self._file_mode)
            try:
                written.allocate(file.nbytes)
                hashes = self._hashes[file.name] = []
                for offset in range(0, file.nbytes, _CHUNK):
                    data = read.pread(min(_CHUNK, file.nbytes - offset), offset)
                    if len(data) != min(_CHUNK, file.nbytes - offset):
                        raise DamageError(f"{file.name} was cut while it was copied")
                    hashes.append(_native.xxh3_64(data))
                    written.pwrite(data, offset)
                    advance(len(data))
                written.sync()
            finally:
                written.close()
        finally:
            read.close()

    def _problems(self, manager: CheckpointMetadataManager, pool: _native.WriterPool, file: CopiedFile) -> list[str]:
        try:
            return self._open(manager, pool, file).verify()
        except DamageError as error:
            return [str(error)]

    def _open(self, manager: CheckpointMetadataManager, pool: _native.WriterPool, file: CopiedFile) -> Shard:
        shard = (open_base if file.base else open_shard)(manager, pool, self._manifest, file.rank)
        assert shard is not None, "the manifest names it"
        return shard

    def _otherwise(self, file: CopiedFile, pool: _native.WriterPool) -> list[str]:
        """Where nothing in the file tells whether it is sound: whether it is what was read."""
        if self._open(self._manager, pool, file).index.hashed:
            return []
        reader = _native.ShardReader(self._env, pool, os.path.join(self.target, file.name))
        for number, expected in enumerate(self._hashes[file.name]):
            offset = number * _CHUNK
            if _native.xxh3_64(reader.read(offset, min(_CHUNK, file.nbytes - offset))) != expected:
                return [f"bytes {offset} to {min(offset + _CHUNK, file.nbytes)} are not those that were written"]
        return []

    def _may_make(self, path: str) -> None:
        self._made += [(path, False), (path + ".tmp", False)]

    def _make_dirs(self, name: str) -> None:
        path = self.target
        for part in name.split(os.sep):
            path = os.path.join(path, part)
            if (path, True) not in self._made:
                self._make_dir(path)

    def _make_dir(self, path: str) -> None:
        self._made.append((path, True))  # before: an interruption may come right after
        try:
            self._env.make_dir(path, self._dir_mode)
        except FileExistsError:
            self._made.pop()
            raise DirectoryError(f"{path} already exists, and nothing is overwritten") from None

    def _remove(self) -> None:
        while self._made:
            path, is_folder = self._made[-1]
            try:
                self._env.remove_dir(path) if is_folder else self._env.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("%s, which is not whole, can't be removed: %s", path, error)
            self._made.pop()


def _files(source: CheckpointMetadataManager, manifest: Manifest) -> Iterator[CopiedFile]:
    for record in manifest.shards:
        shard = os.path.relpath(source.shard_path(manifest, record.rank), source.root)
        yield CopiedFile(record.rank, False, shard, record.nbytes)
        if record.base is not None:
            base = os.path.relpath(source.base_path(record.base.attempt, record.rank), source.root)
            yield CopiedFile(record.rank, True, base, record.base.nbytes)


def _mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode) & 0o777


@contextmanager
def _readers() -> Iterator[_native.WriterPool]:
    pool = _native.WriterPool(_READERS)
    try:
        yield pool
    finally:
        pool.close()
