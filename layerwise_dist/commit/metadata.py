"""Stage 5, `CheckpointMetadataManager`: writes, lists and validates manifests, and knows the lineage.

A checkpoint exists exactly when its manifest does. The lineage is the chain of commits by parent that ends in the
record with the highest seq; a branch record (`branch_<seq>.json`) is a commit without data: it makes a roll-back, or
a fresh start, durable before the first new checkpoint. The bytes are in docs/format.md.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from layerwise_dist.commit.records import Branch, Identity, Manifest, ParentRef, R, Record, bases_of, decode, encode
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import layout
from layerwise_dist.storage.layout import AttemptId
from layerwise_dist.storage.retention import unneeded_bases

log = logging.getLogger("layerwise_dist")

MANIFEST_CAP = 256 << 20


@dataclass(frozen=True, slots=True)
class Inventory:
    """What lies in a directory: sound manifests and branch records by seq, damage, and everything without a manifest.

    `bases` are the attempts of which there is a folder of frozen parameters.
    """

    manifests: dict[int, Manifest]
    branches: dict[int, Branch]
    damaged: dict[str, str]
    unfinished: list[AttemptId]
    bases: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.manifests and not self.damaged

    @property
    def last_seq(self) -> int:
        seqs = [*self.manifests, *self.branches, *(attempt.seq for attempt in self.unfinished)]
        seqs += [attempt.seq for name in self.damaged if (attempt := layout.parse_folder(name))]
        seqs += [seq for name in self.damaged if (seq := layout.parse_branch(name)) is not None]
        seqs += [seq for _, seq in self._wrote_bases]
        return max(seqs, default=0)

    @property
    def lost_branch(self) -> str | None:
        """What is wrong with a damaged branch record that is newer than all sound records, if there is one.

        Where the lineage goes on from is then unknown: following the newest commit could bring an abandoned branch back.
        """
        newest = max([*self.manifests, *self.branches], default=0)
        for name, problem in self.damaged.items():
            if (layout.parse_branch(name) or 0) > newest:
                return problem
        return None

    @property
    def last_epoch(self) -> int:
        epochs = [manifest.epoch for manifest in self.manifests.values()] + [a.epoch for a in self.unfinished]
        epochs += [attempt.epoch for name in self.damaged if (attempt := layout.parse_folder(name))]
        epochs += [epoch for epoch, _ in self._wrote_bases]
        return max(epochs, default=0)

    @property
    def _wrote_bases(self) -> list[tuple[int, int]]:
        return [found for base in self.bases if (found := layout.parse_base(base)) is not None]

    def lineage(self, *, unbroken: bool = False) -> list[Manifest]:
        """The commits that restore may choose from, newest first.

        A commit that is missing or damaged is passed over: its child knows what came before it. `unbroken` ends there
        instead, as retention does, which touches nothing that it does not wholly understand.
        """
        records: dict[int, Manifest | Branch] = {**self.manifests, **self.branches}
        if not records:
            return []
        newest = records[max(records)]
        return ([newest] if isinstance(newest, Manifest) else []) + self._before(newest, unbroken)

    def chain(self, head: ParentRef) -> list[Manifest]:
        """The lineage as it was when `head` was its newest commit, newest first; empty if that is not there."""
        manifest = self._sound(head, head.seq + 1)
        return [manifest, *self._before(manifest, False)] if manifest else []

    def _before(self, record: Manifest | Branch, unbroken: bool) -> list[Manifest]:
        chain: list[Manifest] = []
        older: Manifest | Branch | None = record
        while older is not None:
            ways = ([older.parent] if older.parent else []) + ([] if unbroken else older.ancestors)
            older = next((found for way in ways if (found := self._sound(way, older.seq)) is not None), None)
            if older is not None:
                chain.append(older)
        return chain

    def _sound(self, ref: ParentRef, below: int) -> Manifest | None:
        found = self.manifests.get(ref.seq)
        return found if found is not None and ref.seq < below and found.attempt == ref.attempt else None

    def light(self) -> Inventory:
        """Without the lists of shards, which are most of it: enough to know the lineage by."""
        manifests = {seq: manifest.light() for seq, manifest in self.manifests.items()}
        return Inventory(manifests, dict(self.branches), dict(self.damaged), list(self.unfinished), list(self.bases))

    def roots(self) -> set[int]:
        """Seqs of the commits that descend from the same first commit as the lineage's newest, abandoned ones too."""
        chain = self.lineage(unbroken=True)
        if not chain:
            return set()
        family = {manifest.seq for manifest in chain}
        for seq in sorted(self.manifests):
            parent = self.manifests[seq].parent
            if parent is not None and parent.seq in family:
                family.add(seq)
        return family


class CheckpointMetadataManager:
    """Manifests of one directory. Reading is for anyone; only the owner's coordinator writes."""

    def __init__(self, env: Any, root: str, *, file_mode: int = 0o600) -> None:
        self.env, self.root, self._file_mode = env, root, file_mode

    # -- reading ------------------------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """Reads every record. A damaged one is listed, never raised; OSError is raised: it says nothing of the bytes."""
        manifests: dict[int, Manifest] = {}
        branches: dict[int, Branch] = {}
        damaged: dict[str, str] = {}
        unfinished: list[AttemptId] = []
        for name in self.env.list_dir(self.root):
            attempt, branch_seq = layout.parse_folder(name), layout.parse_branch(name)
            try:
                if branch_seq is not None:
                    record = self._read(os.path.join(self.root, name), Branch)
                    if record.seq != branch_seq:
                        raise DamageError(f"{name}: is the record of seq {record.seq}")
                    branches[branch_seq] = record
                elif attempt is not None:
                    try:
                        manifests[attempt.seq] = self.read_manifest(attempt)
                    except FileNotFoundError:
                        unfinished.append(attempt)
            except DamageError as error:
                damaged[name] = str(error)
        return Inventory(manifests, branches, damaged, unfinished, self.bases())

    def read_manifest(self, attempt: AttemptId) -> Manifest:
        """Raises FileNotFoundError (no commit), DamageError, or OSError."""
        path = self.manifest_path(attempt)
        manifest = self._read(path, Manifest)
        if manifest.attempt_id != attempt or manifest.attempt != attempt.text:
            raise DamageError(f"{path}: is the manifest of step {manifest.step}, attempt {manifest.attempt}")
        if [shard.rank for shard in manifest.shards] != list(range(manifest.world_size)) or any(
            shard.file != layout.shard_file(shard.rank) for shard in manifest.shards
        ):
            raise DamageError(f"{path}: does not list one shard for each of {manifest.world_size} ranks")
        if manifest.bases != bases_of(manifest.shards):
            raise DamageError(f"{path}: lists other bases than its shards refer to")
        return manifest

    def bases(self) -> list[str]:
        """The attempts of which there is a folder of frozen parameters. Raises OSError."""
        try:
            names = self.env.list_dir(os.path.join(self.root, layout.BASES))
        except FileNotFoundError:
            return []
        return [name for name in names if layout.parse_base(name) is not None]

    def manifest_path(self, attempt: AttemptId) -> str:
        return os.path.join(self.root, attempt.folder, layout.MANIFEST)

    def shard_path(self, manifest: Manifest, rank: int) -> str:
        return os.path.join(self.root, manifest.attempt_id.folder, layout.shard_file(rank))

    def base_path(self, base: str, rank: int) -> str:
        return os.path.join(self.root, layout.base_folder(base), layout.shard_file(rank))

    def read_identity(self) -> Identity:
        return self._read(os.path.join(self.root, layout.IDENTITY), Identity)

    def _read(self, path: str, model: type[R]) -> R:
        try:
            data = self.env.read_file(path, MANIFEST_CAP)
        except IsADirectoryError:
            raise DamageError(f"{path}: is a directory") from None
        return decode(data, model, path)

    # -- writing ------------------------------------------------------------------------------------------------

    def commit(self, manifest: Manifest) -> None:
        """Makes the checkpoint exist. REQUIRES: every shard it names is durable.

        Raises OSError before the rename (nothing happened), or `InDoubt` when the directory's flush failed after it.
        """
        folder = os.path.join(self.root, manifest.attempt_id.folder)
        self._publish(folder, layout.MANIFEST_TMP, layout.MANIFEST, manifest)

    def write_branch(self, branch: Branch) -> None:
        """Makes a roll-back or fresh start durable. Raises as `commit`."""
        name = layout.branch_file(branch.seq)
        self._publish(self.root, name + ".tmp", name, branch)

    def write_identity(self, identity: Identity) -> None:
        self._publish(self.root, layout.IDENTITY + ".tmp", layout.IDENTITY, identity)

    def _publish(self, folder: str, temporary: str, final: str, record: Record) -> None:
        source = os.path.join(folder, temporary)
        try:
            self.env.unlink(source)  # of an earlier try that failed half-way
        except FileNotFoundError:
            pass
        self.env.write_file(source, encode(record), self._file_mode)
        self.env.rename(source, os.path.join(folder, final))
        try:
            self.env.sync_dir(folder)
        except OSError as error:
            raise InDoubt(
                f"{folder}: {final} was renamed into place, but the flush of its directory failed: {error}"
            ) from error

    def withdraw(self, attempt: AttemptId) -> None:
        """Ends a checkpoint: once this returns, no crash brings its manifest back, and its shards may be changed.

        Raises OSError (nothing happened), or `InDoubt`: a crash may bring it back, so that its shards must stay.
        """
        folder = os.path.join(self.root, attempt.folder)
        self._unlink(os.path.join(folder, layout.MANIFEST))
        try:
            self.env.sync_dir(folder)
        except OSError as error:
            raise InDoubt(f"{folder}: {layout.MANIFEST} was removed, but that could not be flushed: {error}") from error

    def collect(self, attempt: AttemptId) -> None:
        """Removes an attempt that has no manifest: only files that this package named, and the folder if empty."""
        folder = os.path.join(self.root, attempt.folder)
        try:
            names = list(self.env.list_dir(folder))
        except FileNotFoundError:
            return
        for name in names:
            if layout.is_attempt_file(name):
                self._unlink(os.path.join(folder, name))
        try:
            self.env.remove_dir(folder)
        except OSError:
            pass  # a file that is not ours keeps it

    def remove_base(self, base: str) -> None:
        """Removes frozen parameters. REQUIRES: no manifest refers to them, or ever will, whatever a crash brings back."""
        folder = os.path.join(self.root, layout.base_folder(base))
        for name in self.env.list_dir(folder):
            if layout.is_shard_file(name):
                self._unlink(os.path.join(folder, name))
        try:
            self.env.remove_dir(folder)
        except OSError:
            pass  # a file that is not ours keeps it

    def collect_leftovers(self, inventory: Inventory) -> None:
        """Cleans up after dead sessions. REQUIRES: the owner lock is held, and no attempt of this session exists.

        What was read is made durable first: a session may have died between a manifest's rename or removal and its
        flush, and what this one builds on, or takes the shards of, must not change with a power failure.
        """
        references_known = not inventory.damaged
        for attempt in inventory.unfinished:
            try:
                self.env.sync_dir(os.path.join(self.root, attempt.folder))
                self.collect(attempt)
            except OSError as error:
                references_known = False  # if that was the flush, a crash may bring its manifest back
                log.warning("leftovers of step %d stay until the next start: %s", attempt.step, error)
        for manifest in inventory.manifests.values():
            folder = os.path.join(self.root, manifest.attempt_id.folder)
            self.env.sync_dir(folder)
            for name in self.env.list_dir(folder):
                if layout.is_leftover_in_commit(name):
                    self._unlink(os.path.join(folder, name))
        for name in self.env.list_dir(self.root):
            if layout.is_branch_tmp(name) or layout.is_spare(name) or name == layout.IDENTITY + ".tmp":
                self._unlink(os.path.join(self.root, name))
        for base in unneeded_bases(inventory.bases, inventory.manifests.values()) if references_known else ():
            self.remove_base(base)

    def remove_branch(self, seq: int) -> None:
        self._unlink(os.path.join(self.root, layout.branch_file(seq)))

    def _unlink(self, path: str) -> None:
        try:
            self.env.unlink(path)
        except FileNotFoundError:
            pass


class InDoubt(OSError):
    """A commit whose rename happened and whose flush failed: it may or may not survive. Nothing may be deleted."""
