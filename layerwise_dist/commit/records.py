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
MOST_ANCESTORS = 64


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ParentRef(Record):
    seq: int = Field(ge=1, lt=1 << 32)
    attempt: str = Field(pattern=_HEX16)


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

    `ancestors` are the lineage's commits before `parent`, newest first: the way past a parent that is damaged.
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
    ancestors: list[ParentRef] = Field(max_length=MOST_ANCESTORS)
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
    """A commit without data: from here on the lineage continues from `parent` (None: from nothing)."""

    format: Literal["layerwise-branch-1"] = "layerwise-branch-1"
    identity: str = Field(pattern=r"^[0-9a-f]{32}$")
    session: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=1, lt=1 << 32)
    parent: ParentRef | None
    ancestors: list[ParentRef] = Field(max_length=MOST_ANCESTORS)


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

        Where the lineage goes on from is then unknown: following the newest commit could bring an abandoned branch
        back.
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
