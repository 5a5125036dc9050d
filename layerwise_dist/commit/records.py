"""The records of a directory: manifests, branch records and its identity; and what they make together: the lineage.

The bytes are in docs/format.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from layerwise_dist import _native
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import layout
from layerwise_dist.storage.layout import AttemptId

_TAIL = re.compile(rb',"checksum":"([0-9a-f]{16})"\}\n\Z')
_TAIL_BYTES = len(b',"checksum":"0123456789abcdef"}\n')
_HEX16 = r"^[0-9a-f]{16}$"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ParentRef(Record):
    seq: int = Field(ge=1, lt=1 << 32)
    attempt: str = Field(pattern=_HEX16)


class Span(Record):
    """Commits of one branch: those whose seq is `first` to `last`."""

    first: int = Field(ge=0, lt=1 << 32)
    last: int = Field(ge=1, lt=1 << 32)

    def holds(self, seq: int) -> bool:
        return self.first <= seq <= self.last


class BaseRecord(Record):
    """A rank's frozen parameters: the file of the shard's name in the folder of the attempt that wrote it."""

    attempt: str = Field(pattern=_HEX16)
    nbytes: int = Field(ge=0)
    header_bytes: int = Field(ge=4096)
    header_hash: str = Field(pattern=_HEX16)


class ShardRecord(Record):
    rank: int = Field(ge=0)
    file: str
    nbytes: int = Field(ge=0)
    header_bytes: int = Field(ge=4096)
    header_hash: str = Field(pattern=_HEX16)
    base: BaseRecord | None = None


class Manifest(Record):
    """The global commit record. `step` is steps completed; `created` is seconds since 1970; sizes are bytes.

    `branch` is the seq of the branch record that it was written after; 0 if there was none. One branch at a time is
    written, so a branch is a range of seqs. `before` are those of older branches that it descends from, newest first.
    `root` is the oldest branch that it descends from, which other branches may share.
    `tag` is the name under which the script saved it; None for those that are made by themselves.
    `bases` are the attempts that wrote what its shards refer to, in order, each once.
    """

    format: Literal["layerwise-manifest-1"] = "layerwise-manifest-1"
    identity: str = Field(pattern=r"^[0-9a-f]{32}$")
    session: str = Field(pattern=r"^[0-9a-f]{32}$")
    epoch: int = Field(ge=1, lt=1 << 32)
    seq: int = Field(ge=1, lt=1 << 32)
    attempt: str = Field(pattern=_HEX16)
    parent: ParentRef | None
    branch: int = Field(ge=0, lt=1 << 32)
    before: list[Span]
    root: int = Field(ge=0, lt=1 << 32)
    step: int = Field(ge=0, lt=10**10)
    world_size: int = Field(ge=1)
    framework: str
    boundary: str
    places: list[list[int]] | None = None  # ranks whose shards lie in one directory, where not all do
    tag: str | None = None
    created: float
    software: dict[str, str]
    bases: list[str] = []
    shards: list[ShardRecord]

    @property
    def spans(self) -> list[Span]:
        """The commits that it descends from, and itself."""
        return [Span(first=self.branch, last=self.seq), *self.before]

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
        """Of its own shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def base_nbytes(self) -> int:
        """Of the frozen parameters that it refers to, as other checkpoints may."""
        return sum(shard.base.nbytes for shard in self.shards if shard.base is not None)


class Branch(Record):
    """A commit without data: from here on the lineage continues from `parent` (None: from nothing).

    `before` and `root` are as in the manifests that follow.
    """

    format: Literal["layerwise-branch-1"] = "layerwise-branch-1"
    identity: str = Field(pattern=r"^[0-9a-f]{32}$")
    session: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=1, lt=1 << 32)
    parent: ParentRef | None
    before: list[Span]
    root: int = Field(ge=0, lt=1 << 32)

    @property
    def branch(self) -> int:
        return self.seq

    @property
    def spans(self) -> list[Span]:
        return self.before


class Identity(Record):
    """Made once for a directory; ranks that read different ones do not share a file system."""

    format: Literal["layerwise-identity-1"] = "layerwise-identity-1"
    identity: str = Field(pattern=r"^[0-9a-f]{32}$")


R = TypeVar("R", bound=Record)


def bases_of(shards: Iterable[ShardRecord]) -> list[str]:
    """The attempts that wrote the bases which these refer to, in order, each once."""
    return sorted({shard.base.attempt for shard in shards if shard.base is not None})


def encode(record: Record) -> bytes:
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
    """What lies in a directory: sound manifests and branch records by seq, damage, and everything without a manifest.

    `bases` are the attempts of which there is a folder of frozen parameters; `taken` are seqs for which
    no branch record can be written, since something that is not ours lies there.
    """

    manifests: dict[int, Manifest]
    branches: dict[int, Branch]
    damaged: dict[str, str]
    unfinished: list[AttemptId]
    bases: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.manifests and not self.branches and not self.damaged

    @property
    def last_seq(self) -> int:
        seqs = [*self.manifests, *self.branches, *(attempt.seq for attempt in self.unfinished)]
        seqs += [*self._damaged_seqs, *self._damaged_branches, *self.taken]
        seqs += [seq for _, seq in self._wrote_bases]
        return max(seqs, default=0)

    @property
    def newest(self) -> Manifest | Branch | None:
        """The sound record that was written last."""
        records: dict[int, Manifest | Branch] = {**self.manifests, **self.branches}
        return records[max(records)] if records else None

    @property
    def damaged_commits(self) -> dict[AttemptId, str]:
        """What is wrong with damaged manifests, by what the folder's name says."""
        named = ((layout.parse_folder(name), problem) for name, problem in self.damaged.items())
        return {attempt: problem for attempt, problem in named if attempt is not None}

    @property
    def _damaged_seqs(self) -> list[int]:
        return [attempt.seq for attempt in self.damaged_commits]

    @property
    def newest_damage(self) -> int:
        """The seq of the newest damaged manifest; 0 if there is none. Retention leaves what is older alone."""
        return max(self._damaged_seqs, default=0)

    @property
    def _damaged_branches(self) -> dict[int, str]:
        named = ((layout.parse_branch(name), problem) for name, problem in self.damaged.items())
        return {seq: problem for seq, problem in named if seq is not None}

    @property
    def lost(self) -> str | None:
        """Why it is not known where the lineage goes on, if it is not. Any guess could bring an abandoned branch back.

        The newest branch record is never removed. So if newer commits than the newest sound record are damaged, either
        they are of its own branch, or the damaged record of theirs is here.
        """
        newest = self.newest
        for seq, problem in self._damaged_branches.items():
            if newest is None or seq > newest.seq:
                return f"{problem}; it said from which commit the newest branch goes on"
        if newest is None or self.dangling is None:
            return None
        newer = [problem for attempt, problem in self.damaged_commits.items() if attempt.seq > newest.seq]
        return "; ".join([*newer, self.dangling])

    @property
    def dangling(self) -> str | None:
        """What is wrong with the newest sound record if it is a branch record that goes on from a commit which is gone.

        Retention removes that only when there are newer commits on the branch.
        """
        newest = self.newest
        parent = newest.parent if isinstance(newest, Branch) else None
        if newest is None or parent is None or parent.seq in self._damaged_seqs:
            return None
        found = self.manifests.get(parent.seq)
        if found is not None and found.ref == parent:
            return None
        return (
            f"{layout.branch_file(newest.seq)}: the commit that it goes on from (seq {parent.seq}, attempt "
            f"{parent.attempt}) is not there"
        )

    def lineage(self) -> list[Manifest]:
        """The commits that restore may choose from, newest first: what the newest record descends from. None if that is
        `lost`. A commit that is missing or damaged hides none before it. One that was copied here from elsewhere counts
        only if it is gone on from.
        """
        newest = self.newest
        if newest is None or self.lost is not None:
            return []

        def belongs(manifest: Manifest) -> bool:
            mine = manifest.identity == newest.identity and any(span.holds(manifest.seq) for span in newest.spans)
            return mine or manifest.ref == newest.parent

        return sorted(filter(belongs, self.manifests.values()), key=lambda manifest: -manifest.seq)

    def lineage_damage(self) -> dict[AttemptId, str]:
        """What is wrong with damaged manifests that are, or may be, of the lineage."""
        newest = self.newest
        if newest is None:
            return self.damaged_commits

        def belongs(seq: int) -> bool:
            return seq > newest.seq or any(span.holds(seq) for span in newest.spans)

        return {attempt: problem for attempt, problem in self.damaged_commits.items() if belongs(attempt.seq)}

    def family(self) -> list[Manifest]:
        """The lineage, and the abandoned branches that have grown from the same start; oldest first."""
        newest = self.newest
        if newest is None or self.lost is not None:
            return []
        mine = (newest.identity, newest.root)
        return [found for _, found in sorted(self.manifests.items()) if (found.identity, found.root) == mine]

    def is_next(self, manifest: Manifest) -> bool:
        """Whether the lineage goes on from this commit with nothing left behind: no newer commit of it, sound or
        damaged.
        """
        newest = self.newest
        if newest is None or self.newest_damage > newest.seq:
            return False
        return manifest.ref == (newest.ref if isinstance(newest, Manifest) else newest.parent)

    @property
    def last_epoch(self) -> int:
        epochs = [manifest.epoch for manifest in self.manifests.values()] + [a.epoch for a in self.unfinished]
        epochs += [attempt.epoch for attempt in self.damaged_commits]
        epochs += [epoch for epoch, _ in self._wrote_bases]
        return max(epochs, default=0)

    @property
    def _wrote_bases(self) -> list[tuple[int, int]]:
        return [found for base in self.bases if (found := layout.parse_base(base)) is not None]

    def light(self) -> Inventory:
        """Without the lists of shards, which are most of it: enough to know the lineage by."""
        manifests = {seq: manifest.light() for seq, manifest in self.manifests.items()}
        rest = (list(self.unfinished), list(self.bases), list(self.taken))
        return Inventory(manifests, dict(self.branches), dict(self.damaged), *rest)
