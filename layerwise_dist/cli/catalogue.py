# SPDX-License-Identifier: Apache-2.0
"""The contents of one checkpoint directory, for the commands."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

from layerwise_dist import _native
from layerwise_dist.commit.holding import hold_chosen
from layerwise_dist.commit.metadata import NO_LOCKS, CheckpointMetadataManager, Inventory
from layerwise_dist.commit.records import BaseRecord, Manifest, ShardRecord
from layerwise_dist.commit.shards import open_base, open_shard
from layerwise_dist.errors import DamageError, NotFoundError
from layerwise_dist.restore.choice import Wish, candidates, tell_passed_by
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.odd import oddity
from layerwise_dist.storage.protocols import FileLock
from layerwise_dist.storage.reader import Shard

Status = Literal["newest", "lineage", "abandoned"]
_READERS = 4  # threads
_LISTED = 20


class WrongUsage(Exception):
    """The command cannot do what it was asked: no such directory, no such step."""


class Catalogue:
    """One directory, read once. Raises WrongUsage for what is no checkpoint directory, else OSError."""

    def __init__(self, directory: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(directory))
        if not os.path.isdir(self.root):
            raise WrongUsage(f"{directory}: {'not a directory' if os.path.lexists(self.root) else 'no such directory'}")
        self.manager = CheckpointMetadataManager(_native.PosixEnv(), self.root)
        self.inventory: Inventory = self.manager.inventory()
        found = self.inventory
        known = found.manifests or found.branches or found.damaged or found.unfinished
        if not known and not os.path.lexists(os.path.join(self.root, filenames.IDENTITY)):
            raise WrongUsage(f"{directory}: holds no checkpoints of layerwise_dist")

    @cached_property
    def lineage(self) -> list[Manifest]:
        return self.inventory.lineage()

    @cached_property
    def damaged_records(self) -> dict[str, str]:
        """What is wrong with records, by name: of their bytes, or that the newest branch continues from nothing."""
        found = self.inventory
        if found.dangling is None or found.newest is None:
            return found.damaged
        return {**found.damaged, filenames.branch_file(found.newest.seq): found.dangling}

    def odd(self) -> list[str]:
        """Entries whose names are like ours and are none, in words: nothing reads or removes them."""
        names = sorted(self.inventory.odd.items())
        found = [f"{name!r}: {problem}; nothing reads or removes it" for name, problem in names]
        return [f"odd: {each}" for each in found[:_LISTED]] + (
            [f"odd: and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
        )

    def odd_commits(self) -> dict[str, str]:
        """Those of them that hold a manifest, which nobody will take."""
        found = self.inventory.odd.items()
        paths = {name: os.path.join(self.root, name, filenames.MANIFEST) for name, _ in found}
        return {
            name: f"{name!r} holds a {filenames.MANIFEST} that no restore reads: {problem}"
            for name, problem in found
            if os.path.lexists(paths[name])
        }

    def status(self, manifest: Manifest) -> Status:
        """newest: what restore tries first; lineage: what it falls back to; abandoned: never chosen automatically."""
        seqs = [commit.seq for commit in self.lineage]
        if manifest.seq not in seqs:
            return "abandoned"
        return "newest" if manifest.seq == seqs[0] else "lineage"

    def chosen(self, step: int | None = None, tag: str | None = None) -> Manifest:
        """What `restore(step=...)` or `restore(tag=...)` takes; without either, what `restore()` tries first. Raises
        WrongUsage, or DamageError where `restore()` does.
        """
        if step is not None and tag is not None:
            raise WrongUsage("give --step or --tag, not both")
        if step is None and tag is None:
            return self._newest()
        try:
            return candidates(self.inventory, Wish(step=step, tag=tag), self.root)[0]
        except NotFoundError:
            manifests = self.inventory.manifests.values()
            if tag is not None:
                tags = sorted({manifest.tag for manifest in manifests if manifest.tag is not None})
                more = f", and {len(tags) - 8} more" if len(tags) > 8 else ""
                raise WrongUsage(
                    f"{self.root} has no checkpoint under the tag {tag!r}; it has {', '.join(tags[:8]) or 'none'}{more}"
                ) from None
            steps = sorted({manifest.step for manifest in manifests})
            raise WrongUsage(f"{self.root} has no checkpoint of step {step}; it has {self._short(steps)}") from None

    def take(self, step: int | None = None, tag: str | None = None) -> tuple[Manifest, FileLock]:
        """What `chosen` gives, and the hold on it: retention passes it by. Looked for anew where that has removed it
        since this directory was read. Raises as `chosen`, NotFoundError, or OSError where there are no locks.
        """

        def choose(inventory: Inventory) -> Manifest:
            self.inventory = inventory
            vars(self).pop("lineage", None)
            return self.chosen(step, tag)

        return hold_chosen(self.manager, choose, self.inventory)

    @contextmanager
    def held(self, step: int | None = None, tag: str | None = None) -> Iterator[Manifest]:
        """The same for as long as this lasts. Where the file system has no locks, the checkpoint may go meanwhile."""
        lock: FileLock | None = None
        try:
            manifest, lock = self.take(step, tag)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            manifest = self.chosen(step, tag)
        try:
            yield manifest
        finally:
            if lock is not None:
                lock.release()

    def _newest(self) -> Manifest:
        found = candidates(self.inventory, Wish(), self.root)
        if not found:
            raise WrongUsage(
                f"{self.root} has no committed checkpoint in its lineage; see layerwise ls, or give --step"
            )
        tell_passed_by(self.inventory, found[0], Wish())
        return found[0]

    def here(self, manifest: Manifest) -> list[ShardRecord]:
        """The shards that lie in this directory, or should: all but those of other nodes, where each has its own."""
        for ranks in manifest.places or ():
            if any(os.path.lexists(self.manager.shard_path(manifest, rank)) for rank in ranks):
                return [manifest.shards[rank] for rank in ranks]
        return manifest.shards

    def bases_here(self, manifest: Manifest) -> list[tuple[int, BaseRecord]]:
        """The frozen parameters that those refer to, with their ranks."""
        return [(record.rank, record.base) for record in self.here(manifest) if record.base is not None]

    def missing(self, manifest: Manifest) -> str | None:
        """What a look at sizes alone finds wrong with the shards, or with what they refer to, or None."""
        shards = self.here(manifest)
        files = [(record.file, self.manager.shard_path(manifest, record.rank), record.nbytes) for record in shards]
        for rank, base in self.bases_here(manifest):
            path = self.manager.base_path(base.attempt, rank)
            files.append((os.path.relpath(path, self.root), path, base.nbytes))
        for name, path, expected in files:
            try:
                kind, nbytes = self.manager.env.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                if self.still_there(manifest):
                    return f"{name} is missing"
                return None
            except OSError as error:
                if (what := oddity(error, path)) is not None:
                    return what
                raise
            if kind != "file":
                return f"{name} is not a regular file"
            if nbytes != expected:
                return f"{name} is {nbytes} bytes long, the manifest says {expected}"
        return None

    def bases(self) -> list[dict[str, Any]]:
        """The folders of frozen parameters: of how many bytes, and which commits refer to them."""
        found = []
        for base in self.inventory.bases:
            try:
                nbytes, _ = measure(os.path.join(self.root, filenames.base_folder(base)))
            except FileNotFoundError:
                continue  # removed while this looks
            referring = [m for m in self.inventory.manifests.values() if base in m.bases]
            found.append({
                "attempt": base, "folder": filenames.base_folder(base), "bytes": nbytes,
                "seqs": sorted(manifest.seq for manifest in referring),
                "steps": sorted({manifest.step for manifest in referring}),
            })  # fmt: skip
        return found

    def still_there(self, manifest: Manifest) -> bool:
        """Whether it is committed now: a job that runs retires old checkpoints, manifest first, while this reads."""
        try:
            self.manager.read_manifest(manifest.attempt_id)
        except FileNotFoundError:
            return False
        except DamageError:
            return True
        return True

    def folder(self, attempt: AttemptId) -> str:
        return os.path.join(self.root, attempt.folder)

    @contextmanager
    def shards(self, manifest: Manifest) -> Iterator[ShardOpener]:
        pool = _native.WriterPool(_READERS)
        try:
            yield ShardOpener(self.manager, manifest, pool)
        finally:
            pool.close()

    @staticmethod
    def _short(steps: list[int]) -> str:
        if not steps:
            return "none"
        return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{len(steps)} between {steps[0]} and {steps[-1]}"


def measure(folder: str) -> tuple[int, float]:
    """(bytes of its files, time of its last change in seconds since 1970); of itself if it is no folder."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries), os.stat(folder).st_mtime
    except OSError:
        info = os.lstat(folder)  # raises where it is gone
        if stat.S_ISDIR(info.st_mode):
            raise
        return info.st_size, info.st_mtime


class ShardOpener:
    """Opens the files of one commit with their headers checked against its manifest. Raises DamageError or OSError."""

    def __init__(self, manager: CheckpointMetadataManager, manifest: Manifest, pool: _native.WriterPool) -> None:
        self._manager, self._manifest, self._pool = manager, manifest, pool

    def open(self, rank: int) -> Shard:
        return open_shard(self._manager, self._pool, self._manifest, rank)

    def open_base(self, rank: int) -> Shard | None:
        """The frozen parameters that the rank's shard refers to."""
        return open_base(self._manager, self._pool, self._manifest, rank)
