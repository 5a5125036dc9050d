# SPDX-License-Identifier: Apache-2.0
"""Stage 5, `CheckpointMetadataManager`: writes, lists and validates manifests, and knows the lineage.

A checkpoint exists exactly when its manifest does. The lineage is what the record with the highest seq descends from; a
branch record (`branch_<seq>.json`) is a commit without data: it makes a roll-back, or a fresh start, durable before the
first new checkpoint. The bytes are in docs/format.md.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection
from typing import TypeVar

from layerwise_dist.commit.inventory import Inventory, drop_copies
from layerwise_dist.commit.records import (
    RECORD_CAP,
    Branch,
    Identity,
    Manifest,
    ParentRef,
    Record,
    ShardRecord,
    Span,
    decode,
    encode,
)
from layerwise_dist.errors import DamageError, DirectoryError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.odd import is_no_folder, kind_at, leave, oddity
from layerwise_dist.storage.protocols import Env, FileLock
from layerwise_dist.storage.removal import remove, remove_files
from layerwise_dist.storage.retention import unneeded_bases

__all__ = [
    "Branch", "CheckpointMetadataManager", "Identity", "InDoubt", "Inventory", "Manifest", "ParentRef", "ShardRecord",
    "Span", "decode", "encode",
]  # fmt: skip

log = logging.getLogger("layerwise_dist")

# Where readers cannot hold a checkpoint, none is asked after.
NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)

_LOOKS = 100  # at a directory that changes while its records are read

R = TypeVar("R", bound=Record)


class CheckpointMetadataManager:
    """Manifests of one directory. Reading is for anyone; only the owner's coordinator writes."""

    def __init__(self, env: Env, root: str, *, file_mode: int = 0o600) -> None:
        env.confine(root)
        self.env, self.root, self._file_mode = env, root, file_mode

    # -- reading ------------------------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """Reads every record.

        A damaged one is listed, never raised; OSError is raised: it says nothing of the bytes. Where a running job
        commits and retires meanwhile, the newest record is what was the newest when this began, or newer.
        """
        names = filenames.in_order(self.env.list_dir(self.root))
        for _ in range(_LOOKS):
            found, vanished = self._read_records(names)
            newest = max((*found.manifests, *found.branches), default=0)
            if not vanished and found.lost is None and all(attempt.seq < newest for attempt in found.unfinished):
                return found
            # An attempt that has no manifest is on its way, or was retired since the listing; then a newer record was
            # there before. Older ones are read first, so that this one was found, or was not listed.
            before, names = names, filenames.in_order(self.env.list_dir(self.root))
            if set(names).issubset(before):
                return found
        return found

    def _read_records(self, names: list[str]) -> tuple[Inventory, bool]:
        """The inventory of one listing, and whether a branch record in it was gone before it was read."""
        vanished = False
        manifests: dict[int, Manifest] = {}
        branches: dict[int, Branch] = {}
        damaged: dict[str, str] = {}
        unfinished: list[AttemptId] = []
        odd: dict[str, str] = {}
        of_seq: dict[int, dict[str, Manifest | Branch]] = {}
        taken: list[int] = []
        for name in names:
            attempt, branch_seq = filenames.parse_folder(name), filenames.parse_branch(name)
            try:
                if branch_seq is not None:
                    try:
                        branches[branch_seq] = branch = self._read_branch(name, branch_seq)
                    except FileNotFoundError:
                        vanished = True
                    else:
                        of_seq.setdefault(branch_seq, {})[name] = branch
                elif attempt is not None:
                    try:
                        manifests[attempt.seq] = manifest = self.read_manifest(attempt)
                    except FileNotFoundError:
                        # No folder of ours: of an archive that is not mounted, say. It may refer to what is here.
                        if (why := is_no_folder(self.env, os.path.join(self.root, name))) is not None:
                            raise DamageError(why) from None
                        unfinished.append(attempt)
                    else:
                        of_seq.setdefault(attempt.seq, {})[name] = manifest
                elif (seq := filenames.parse_unfinished_branch(name)) is not None:
                    if kind_at(self.env, os.path.join(self.root, name)) not in (None, "file"):
                        taken.append(seq)  # it stays, in the way of a record of this seq
                elif problem := filenames.odd(name):
                    odd[name] = problem
            except DamageError as error:
                damaged[name] = str(error)
        try:
            identity = self.read_identity().identity
        except (FileNotFoundError, DamageError):
            identity = None
        drop_copies(of_seq, identity, manifests, branches, damaged)
        found = Inventory(manifests, branches, damaged, unfinished, self.bases(), identity, odd, taken)
        return found, vanished

    def read_manifest(self, attempt: AttemptId) -> Manifest:
        """Raises FileNotFoundError (no commit), DamageError, or OSError."""
        path = self.manifest_path(attempt)
        manifest = self._read(path, Manifest)
        if manifest.attempt_id != attempt:
            raise DamageError(f"{path}: is the manifest of step {manifest.step}, attempt {manifest.attempt}")
        return manifest

    def _read_branch(self, name: str, seq: int) -> Branch:
        record = self._read(os.path.join(self.root, name), Branch)
        if record.seq != seq:
            raise DamageError(f"{name}: is the record of seq {record.seq}")
        return record

    def bases(self) -> list[str]:
        """The attempts that have a folder of frozen parameters. Raises OSError."""
        try:
            names = self.env.list_dir(os.path.join(self.root, filenames.BASES))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            if oddity(error, filenames.BASES) is None:
                raise
            return []  # what refers to some is damaged
        return [name for name in names if filenames.parse_base(name) is not None]

    def manifest_path(self, attempt: AttemptId) -> str:
        return os.path.join(self.root, attempt.folder, filenames.MANIFEST)

    def folder(self, attempt: AttemptId) -> str:
        return os.path.join(self.root, attempt.folder)

    def pin_path(self, attempt: AttemptId) -> str:
        return os.path.join(self.root, attempt.folder, filenames.PIN)

    def pinned(self, attempt: AttemptId) -> bool:
        """Whether somebody wants it kept. Whatever lies under that name says so: a checkpoint rather stays once too
        often. Raises OSError.
        """
        return kind_at(self.env, self.pin_path(attempt)) is not None

    def pin(self, attempt: AttemptId) -> bool:
        """Durable when this returns. Whether it was not pinned before. Raises DirectoryError or OSError."""
        path = self.pin_path(attempt)
        kind = kind_at(self.env, path)
        if kind not in (None, "file"):
            raise DirectoryError(f"{path} is not a regular file, so it is not a pin: move it away")
        if kind is None:
            self.env.write_file(path, b"", 0o600)
        self.env.sync_dir(self.folder(attempt))  # of an earlier pin too, which may have died before
        return kind is None

    def unpin(self, attempt: AttemptId) -> bool:
        """Whether it was pinned. Raises OSError."""
        try:
            self.env.unlink(self.pin_path(attempt))
        except FileNotFoundError:
            return False
        self.env.sync_dir(self.folder(attempt))
        return True

    def shard_path(self, manifest: Manifest, rank: int) -> str:
        return os.path.join(self.root, manifest.attempt_id.folder, filenames.shard_file(rank))

    def base_path(self, base: str, rank: int) -> str:
        return os.path.join(self.root, filenames.base_folder(base), filenames.shard_file(rank))

    def read_identity(self) -> Identity:
        return self._read(os.path.join(self.root, filenames.IDENTITY), Identity)

    def _read(self, path: str, model: type[R]) -> R:
        try:
            data = self.env.read_file(path, RECORD_CAP)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise DamageError(f"{path}: is larger than any record, {RECORD_CAP} bytes") from None
            if (what := oddity(error, path)) is not None:
                raise DamageError(what) from None
            raise
        return decode(data, model, path)

    def hold(self, attempt: AttemptId) -> FileLock:
        """While this is held, retention passes the checkpoint by; its shards and what they refer to stay as they are.

        It takes the right to read only, and ends with the process. Raises FileNotFoundError if it is gone,
        BlockingIOError if it is just being removed, OSError with one of `NO_LOCKS` where the file system has no locks.
        """
        return self.env.hold(self.manifest_path(attempt))

    # -- writing ------------------------------------------------------------------------------------------------

    def commit(self, manifest: Manifest) -> None:
        """Makes the checkpoint exist. REQUIRES: every shard it names is durable.

        Raises OSError before the rename (nothing happened), or `InDoubt` when the directory's flush failed after it.
        """
        folder = os.path.join(self.root, manifest.attempt_id.folder)
        self._publish(folder, filenames.MANIFEST_TMP, filenames.MANIFEST, manifest)

    def write_branch(self, branch: Branch) -> None:
        """Makes a roll-back or fresh start durable. Raises as `commit`."""
        name = filenames.branch_file(branch.seq)
        self._publish(self.root, name + ".tmp", name, branch)

    def write_identity(self, identity: Identity) -> None:
        self._publish(self.root, filenames.IDENTITY + ".tmp", filenames.IDENTITY, identity)

    def prepare(self, manifest: Manifest) -> None:
        """The first half of `commit`: its bytes are durable under another name. Raises OSError."""
        self._write(os.path.join(self.root, manifest.attempt_id.folder, filenames.MANIFEST_TMP), manifest)

    def publish(self, attempt: AttemptId) -> None:
        """The second half, of what was prepared. Raises as `commit`."""
        self._into_place(os.path.join(self.root, attempt.folder), filenames.MANIFEST_TMP, filenames.MANIFEST)

    def unprepare(self, attempt: AttemptId) -> None:
        """What was prepared will not be published. Raises OSError."""
        folder = os.path.join(self.root, attempt.folder)
        remove(self.env, folder, [filenames.MANIFEST_TMP])

    def _publish(self, folder: str, temporary: str, final: str, record: Record) -> None:
        path = os.path.join(folder, temporary)
        try:
            self._write(path, record)
            self._into_place(folder, temporary, final)
        except InDoubt:
            raise
        except OSError:
            self._clear(path)  # on a full disk, what could be written of it would stay until the next start
            raise

    def _clear(self, path: str) -> None:
        try:
            self._unlink(path)
        except OSError as error:
            log.warning("%s stays until the next start: %s", path, error)

    def _write(self, path: str, record: Record) -> None:
        self._unlink(path)  # of an earlier try that failed half-way
        self.env.write_file(path, encode(record), self._file_mode)

    def _into_place(self, folder: str, temporary: str, final: str) -> None:
        self.env.rename(os.path.join(folder, temporary), os.path.join(folder, final))
        try:
            self.env.sync_dir(folder)
        except OSError as error:
            raise InDoubt(
                f"{folder}: {final} was renamed into place, but the flush of its directory failed: {error}"
            ) from error

    def withdraw(self, attempt: AttemptId, *, anyway: bool = False) -> None:
        """Ends a checkpoint: once this returns, no crash brings its manifest back, and its shards may be changed.

        Raises BlockingIOError while somebody reads it (`hold`) or has pinned it, unless it must go `anyway`. Raises
        OSError (nothing happened; `oddity` says whether it lies behind a link and stays), or `InDoubt`: a crash may
        bring it back, so that its shards must stay.
        """
        folder = os.path.join(self.root, attempt.folder)
        path = os.path.join(folder, filenames.MANIFEST)
        alone = None if anyway else self._hold_alone(path)
        try:
            # Who pins it holds it: from here on nobody is told that it is pinned.
            if not anyway and self.pinned(attempt):
                raise BlockingIOError(errno.EAGAIN, "it is pinned", path)
            self._unlink(path)
        finally:
            if alone is not None:
                alone.release()
        try:
            self.env.sync_dir(folder)
        except OSError as error:
            said = f"{folder}: {filenames.MANIFEST} was removed, but that could not be flushed"
            raise InDoubt(f"{said}: {error}") from error

    def _hold_alone(self, path: str) -> FileLock | None:
        """Keeps readers from beginning while a manifest goes. None where it is gone, or where nobody can hold one."""
        try:
            return self.env.hold(path, True)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            raise

    def collect(self, attempt: AttemptId) -> None:
        """Removes an attempt that has no manifest: only files that this package named, and the folder if empty."""
        self._remove(attempt.folder, filenames.is_attempt_file)

    def remove_base(self, base: str) -> None:
        """Removes frozen parameters.

        REQUIRES: no manifest refers to them, or ever will, whatever a crash brings back.
        """
        self._remove(filenames.base_folder(base), filenames.is_shard_file)

    def _remove(self, name: str, ours: Callable[[str], bool]) -> None:
        folder = os.path.join(self.root, name)
        try:
            names = list(self.env.list_dir(folder))
        except FileNotFoundError:
            return
        except OSError as error:
            return leave(error, folder)
        remove(self.env, folder, filter(ours, names))

    def flush_records(self, inventory: Inventory) -> list[AttemptId]:
        """Makes what was read durable: a session may have died between a manifest's rename or removal and its flush,
        and what the next one builds on, or takes the shards of, must not change with a power failure.

        REQUIRES: the owner lock is held. Returns the unfinished attempts for which it failed: nobody may touch those.
        Raises OSError if it failed of a commit.
        """
        for manifest in inventory.manifests.values():
            self.env.sync_dir(os.path.join(self.root, manifest.attempt_id.folder))
        doubtful = []
        for attempt in inventory.unfinished:
            try:
                self.env.sync_dir(os.path.join(self.root, attempt.folder))
            except OSError as error:
                log.warning("leftovers of step %d stay until the next start: %s", attempt.step, error)
                doubtful.append(attempt)
        return doubtful

    def collect_leftovers(self, inventory: Inventory, kept: Collection[AttemptId] = ()) -> None:
        """Cleans up after dead sessions, but for what is `kept`: there may be a manifest of it, here or elsewhere.

        REQUIRES: as `flush_records`, which was called for every place; no attempt of this session exists.
        """
        committed = {manifest.attempt_id for manifest in inventory.manifests.values()}
        references_known = not inventory.damaged and committed.issuperset(kept)
        for attempt in inventory.unfinished:
            if attempt not in kept:
                try:
                    self.collect(attempt)
                except OSError as error:
                    log.warning("leftovers of step %d stay until the next start: %s", attempt.step, error)
        for manifest in inventory.manifests.values():
            folder = os.path.join(self.root, manifest.attempt_id.folder)
            remove_files(self.env, folder, filter(filenames.is_leftover_in_commit, self.env.list_dir(folder)))
        remove_files(self.env, self.root, filter(filenames.is_leftover, self.env.list_dir(self.root)))
        for base in unneeded_bases(inventory.bases, inventory.manifests.values()) if references_known else ():
            self.remove_base(base)

    def record_text(self, name: str) -> str:
        """A record as it lies in its file; `name` is a folder's, or a branch record's.

        Raises OSError or DamageError.
        """
        attempt = filenames.parse_folder(name)
        if attempt is not None:
            return encode(self.read_manifest(attempt)).decode()
        return encode(self._read(os.path.join(self.root, name), Branch)).decode()

    def remove_old_branches(self) -> None:
        """All but the newest, which tells which branch newer commits are of though they are damaged. Raises OSError."""
        seqs = [seq for name in self.env.list_dir(self.root) if (seq := filenames.parse_branch(name)) is not None]
        for seq in sorted(seqs)[:-1]:
            self.remove_branch(seq)

    def remove_branch(self, seq: int) -> None:
        remove_files(self.env, self.root, [filenames.branch_file(seq)])

    def _unlink(self, path: str) -> None:
        try:
            self.env.unlink(path)
        except FileNotFoundError:
            pass


class InDoubt(OSError):
    """A commit whose rename happened and whose flush failed: it may or may not survive. Nothing may be deleted."""
