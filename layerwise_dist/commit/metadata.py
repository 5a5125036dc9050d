"""Stage 5, `CheckpointMetadataManager`: writes, lists and validates manifests, and knows the lineage.

A checkpoint exists exactly when its manifest does. The lineage is the chain of commits by parent that ends in the
record with the highest seq; a branch record (`branch_<seq>.json`) is a commit without data: it makes a roll-back, or
a fresh start, durable before the first new checkpoint. The bytes are in docs/format.md.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from layerwise_dist import _native
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import layout
from layerwise_dist.storage.layout import AttemptId

log = logging.getLogger("layerwise_dist")

MANIFEST_CAP = 256 << 20
_TAIL = re.compile(rb',"checksum":"([0-9a-f]{16})"\}\n\Z')
_TAIL_BYTES = len(b',"checksum":"0123456789abcdef"}\n')
_HEX16 = r"^[0-9a-f]{16}$"
MOST_ANCESTORS = 64


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ParentRef(_Record):
    seq: int = Field(ge=1, lt=1 << 32)
    attempt: str = Field(pattern=_HEX16)


class ShardRecord(_Record):
    rank: int = Field(ge=0)
    file: str
    nbytes: int = Field(ge=0)
    header_bytes: int = Field(ge=4096)
    header_hash: str = Field(pattern=_HEX16)


class Manifest(_Record):
    """The global commit record. `step` is steps completed; `created` is seconds since 1970; sizes are bytes.

    `ancestors` are the lineage's commits before `parent`, newest first: the way past a parent that is damaged.
    `tag` is the name under which the script saved it; None for those that are made by themselves.
    """

    format: Literal["layerwise-manifest-1"] = "layerwise-manifest-1"
    identity: str = Field(pattern=r"^[0-9a-f]{32}$")
    session: str = Field(pattern=r"^[0-9a-f]{32}$")
    epoch: int = Field(ge=1, lt=1 << 32)
    seq: int = Field(ge=1, lt=1 << 32)
    attempt: str = Field(pattern=_HEX16)
    parent: ParentRef | None
    ancestors: list[ParentRef] = Field(max_length=MOST_ANCESTORS)
    step: int = Field(ge=0, lt=10**10)
    world_size: int = Field(ge=1)
    framework: str
    boundary: str
    tag: str | None = None
    created: float
    software: dict[str, str]
    shards: list[ShardRecord]

    @property
    def attempt_id(self) -> AttemptId:
        return AttemptId(self.epoch, self.seq, self.step)

    @property
    def ref(self) -> ParentRef:
        return ParentRef(seq=self.seq, attempt=self.attempt)

    def light(self) -> Manifest:
        """Without the list of shards."""
        return self.model_copy(update={"shards": []})

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


class Branch(_Record):
    """A commit without data: from here on the lineage continues from `parent` (None: from nothing)."""

    format: Literal["layerwise-branch-1"] = "layerwise-branch-1"
    identity: str = Field(pattern=r"^[0-9a-f]{32}$")
    session: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=1, lt=1 << 32)
    parent: ParentRef | None
    ancestors: list[ParentRef] = Field(max_length=MOST_ANCESTORS)


class Identity(_Record):
    """Made once for a directory; ranks that read different ones do not share a file system."""

    format: Literal["layerwise-identity-1"] = "layerwise-identity-1"
    identity: str = Field(pattern=r"^[0-9a-f]{32}$")


R = TypeVar("R", bound=_Record)


def encode(record: _Record) -> bytes:
    """One line of JSON whose last member is the XXH3-64 of all bytes before it."""
    text = record.model_dump_json()
    if not text.isascii():
        text = json.dumps(json.loads(text), separators=(",", ":"))
    body = text.encode()[:-1]
    return body + b',"checksum":"%016x"}\n' % _native.xxh3_64(body)


def decode(data: bytes, model: type[R], path: str) -> R:
    """Raises DamageError naming `path` for anything but the exact bytes that `encode` makes."""
    match = _TAIL.search(data[-_TAIL_BYTES:])
    if match is None:
        raise DamageError(f"{path}: cut or damaged: it does not end with a checksum")
    body = data[:-_TAIL_BYTES]
    if _native.xxh3_64(body) != int(match[1], 16):
        raise DamageError(
            f"{path}: damaged: its bytes hash to {_native.xxh3_64(body):016x}, it says {match[1].decode()}"
        )
    try:
        return model.model_validate_json(body + b"}")
    except ValidationError as error:
        raise DamageError(f"{path}: not a record of this version: {error}") from None


@dataclass(frozen=True, slots=True)
class Inventory:
    """What lies in a directory: sound manifests and branch records by seq, damage, and everything without a manifest."""

    manifests: dict[int, Manifest]
    branches: dict[int, Branch]
    damaged: dict[str, str]
    unfinished: list[AttemptId]

    @property
    def empty(self) -> bool:
        return not self.manifests and not self.damaged

    @property
    def last_seq(self) -> int:
        seqs = [*self.manifests, *self.branches, *(attempt.seq for attempt in self.unfinished)]
        seqs += [attempt.seq for name in self.damaged if (attempt := layout.parse_folder(name))]
        seqs += [seq for name in self.damaged if (seq := layout.parse_branch(name)) is not None]
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
        return max(epochs, default=0)

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
        return Inventory(manifests, dict(self.branches), dict(self.damaged), list(self.unfinished))

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
        return Inventory(manifests, branches, damaged, unfinished)

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
        return manifest

    def manifest_path(self, attempt: AttemptId) -> str:
        return os.path.join(self.root, attempt.folder, layout.MANIFEST)

    def shard_path(self, manifest: Manifest, rank: int) -> str:
        return os.path.join(self.root, manifest.attempt_id.folder, layout.shard_file(rank))

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

    def _publish(self, folder: str, temporary: str, final: str, record: _Record) -> None:
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

    def collect_leftovers(self, inventory: Inventory) -> None:
        """Cleans up after dead sessions. REQUIRES: the owner lock is held, and no attempt of this session exists.

        What was read is made durable first: a session may have died between a manifest's rename or removal and its
        flush, and what this one builds on, or takes the shards of, must not change with a power failure.
        """
        for attempt in inventory.unfinished:
            try:
                self.env.sync_dir(os.path.join(self.root, attempt.folder))
                self.collect(attempt)
            except OSError as error:
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

    def remove_branch(self, seq: int) -> None:
        self._unlink(os.path.join(self.root, layout.branch_file(seq)))

    def _unlink(self, path: str) -> None:
        try:
            self.env.unlink(path)
        except FileNotFoundError:
            pass


class InDoubt(OSError):
    """A commit whose rename happened and whose flush failed: it may or may not survive. Nothing may be deleted."""
