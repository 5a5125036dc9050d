"""The records of a checkpoint directory, and their bytes (docs/format.md): one line of JSON that ends with its own hash."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from layerwise_dist import _native
from layerwise_dist.errors import DamageError
from layerwise_dist.storage.layout import AttemptId

MOST_ANCESTORS = 64
_TAIL = re.compile(rb',"checksum":"([0-9a-f]{16})"\}\n\Z')
_TAIL_BYTES = len(b',"checksum":"0123456789abcdef"}\n')
_HEX16 = r"^[0-9a-f]{16}$"


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
