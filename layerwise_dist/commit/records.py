# SPDX-License-Identifier: Apache-2.0
"""The records of a directory: manifests, branch records and its identity, as they lie in their files.

The bytes are in docs/format.md. What records make together is in `inventory.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from layerwise_dist import _native
from layerwise_dist.errors import DamageError
from layerwise_dist.storage import filenames, strict_json
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.schemas import HEX16, HEX32, Schema, Unfit, fits
from layerwise_dist.storage.shard_layout import ALIGN, HEADER_CAP

_TAIL = re.compile(rb',"checksum":"([0-9a-f]{16})"\}\n\Z')
_TAIL_BYTES = len(b',"checksum":"0123456789abcdef"}\n')

# A record of all ranks that there can be, each with a base, has half of it.
RECORD_CAP = 64 << 20
LONGEST_TAG = 255
_LONGEST_FRAMEWORK = 1 << 16
_TEXTS, _OBJECT = 1 << 20, 1 << 10  # bytes: more than all texts of a record, and than all of a shard in it
_LAST_TIME = 1e11  # seconds since 1970; the year 5138

# The framework of what `dcp.save()` wrote: keys of a state of its own, which no restore takes.
OF_DCP = "dcp"

BoundaryKind = Literal["explicit", "loader", "inferred", "call"]
Number = Annotated[int, Field(ge=1, lt=filenames.NUMBERS_END)]
NumberOrNone = Annotated[int, Field(ge=0, lt=filenames.NUMBERS_END)]
FileSize = Annotated[int, Field(ge=0, lt=1 << 63)]
HeaderSize = Annotated[int, Field(ge=ALIGN, le=HEADER_CAP, multiple_of=ALIGN)]
Hex16 = Annotated[str, Field(pattern=HEX16)]
Hex32 = Annotated[str, Field(pattern=HEX32)]


class Record(Schema):
    """`format` says which; it is there in every file."""

    def contradiction(self) -> str | None:
        """What its members say against each other. Lengths are compared before anything is made of them."""
        return None


class ParentRef(Record):
    seq: Number
    attempt: Hex16


class Span(Record):
    """Commits of one branch: those whose seq is `first` to `last`."""

    first: NumberOrNone
    last: Number

    def holds(self, seq: int) -> bool:
        return self.first <= seq <= self.last

    @model_validator(mode="after")
    def _forward(self) -> Span:
        if self.first > self.last:
            raise ValueError(f"begins at {self.first} and ends at {self.last}")
        return self


Places = Annotated[list[list[int]], Field(max_length=filenames.RANKS_END)]
Spans = Annotated[list[Span], Field(max_length=100_000)]


class BaseRecord(Record):
    """A rank's frozen parameters: the file of the shard's name in the folder of the attempt that wrote it."""

    attempt: Hex16
    nbytes: FileSize
    header_bytes: HeaderSize
    header_hash: Hex16

    @model_validator(mode="after")
    def _of_an_attempt(self) -> BaseRecord:
        if filenames.parse_base(self.attempt) is None:
            raise ValueError(f"{self.attempt} is not an attempt of any session")
        return self


class ShardRecord(Record):
    rank: int = Field(ge=0, lt=filenames.RANKS_END)
    file: str
    nbytes: FileSize
    header_bytes: HeaderSize
    header_hash: Hex16
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
    identity: Hex32
    session: Hex32
    epoch: Number
    seq: Number
    attempt: Hex16
    parent: ParentRef | None
    branch: NumberOrNone
    before: Spans
    root: NumberOrNone
    step: int = Field(ge=0, lt=filenames.STEPS_END)
    world_size: int = Field(ge=1, le=filenames.RANKS_END)
    framework: str = Field(min_length=1, max_length=_LONGEST_FRAMEWORK)
    boundary: BoundaryKind
    places: Places | None = None  # ranks whose shards lie in one directory, where not all do
    tag: str | None = None
    created: float = Field(ge=0, le=_LAST_TIME)
    software: dict[str, str] = Field(max_length=100)
    bases: list[str] = Field([], max_length=filenames.RANKS_END)
    shards: list[ShardRecord] = Field(max_length=filenames.RANKS_END)

    def contradiction(self) -> str | None:
        return _contradiction(self)

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
    identity: Hex32
    session: Hex32
    seq: Number
    parent: ParentRef | None
    before: Spans
    root: NumberOrNone

    def contradiction(self) -> str | None:
        return _not_after(self.seq, self.parent, self.before, self.root)

    @property
    def branch(self) -> int:
        return self.seq

    @property
    def spans(self) -> list[Span]:
        return self.before


class Identity(Record):
    """Made once for a directory; ranks that read different ones do not share a file system."""

    format: Literal["layerwise-identity-1"] = "layerwise-identity-1"
    identity: Hex32


R = TypeVar("R", bound=Record)


def _contradiction(manifest: Manifest) -> str | None:
    if manifest.attempt != manifest.attempt_id.text:
        return f"attempt is {manifest.attempt}, epoch and seq make it {manifest.attempt_id.text}"
    if problem := _not_after(manifest.seq, manifest.parent, manifest.before, manifest.root):
        return problem
    if not manifest.root <= manifest.branch <= manifest.seq:
        return f"root {manifest.root}, branch {manifest.branch} and seq {manifest.seq} are out of order"
    tag, world_size, shards = manifest.tag, manifest.world_size, manifest.shards
    if tag is not None and not is_tag(tag):
        return f"the tag is not one of 1 to {LONGEST_TAG} printable characters"
    if len(shards) != world_size or any(
        shard.rank != rank or shard.file != filenames.shard_file(rank) for rank, shard in enumerate(shards)
    ):
        return f"it does not list one shard for each of {world_size} ranks"
    if manifest.bases != bases_of(shards):
        return "it lists other bases than its shards refer to"
    places = manifest.places
    if places is not None and (
        sum(map(len, places)) != world_size
        or not all(places)
        or sorted(chain.from_iterable(places)) != list(range(world_size))
    ):
        return f"places do not have each of {world_size} ranks once"
    return None


def _not_after(seq: int, parent: ParentRef | None, before: list[Span], root: int) -> str | None:
    """What says of itself that it descends from something that came later."""
    if parent is not None and parent.seq >= seq:
        return f"seq {seq} continues seq {parent.seq}"
    if any(span.last >= seq for span in before):
        return f"seq {seq} descends from later ones"
    return f"its root {root} is above its seq {seq}" if root > seq else None


def is_tag(text: str) -> bool:
    return 0 < len(text) <= LONGEST_TAG and text.isprintable()


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
    """Raises DamageError naming `path` for anything but what `encode` makes."""
    match = _TAIL.search(data[-_TAIL_BYTES:])
    if match is None:
        raise DamageError(f"{path}: cut or damaged: it does not end with a checksum")
    body = memoryview(data)[:-_TAIL_BYTES]
    found = _native.xxh3_64(body)
    if found != int(match[1], 16):
        raise DamageError(f"{path}: damaged: its bytes hash to {found:016x}, it says {match[1].decode()}")
    try:
        record = _read(data, b"".join((body, b"}")), model)
        if problem := record.contradiction():
            raise ValueError(problem)
        return record
    except (ValueError, Unfit) as error:
        raise DamageError(f"{path}: not a record of this version: {error}") from None


def _read(data: bytes, text: bytes, model: type[R]) -> R:
    """Raises ValueError or Unfit."""
    if len(text) > _TEXTS + _OBJECT * text.count(b"{"):
        raise ValueError(f"{len(text)} bytes, with strings longer than any record has")
    if strict_json.weight(text) <= strict_json.WEIGHT_CAP:
        try:
            found = model.model_validate_json(text)
        except ValidationError:
            pass  # said below, with what else is wrong
        else:
            if encode(found) == data:  # so nothing in it is there twice, or written in two ways
                return found
    tree = strict_json.loads(text)
    _check_format(tree, model)
    return fits(model, tree, "")


def _check_format(tree: Any, model: type[Record]) -> None:
    """Which has a default, for those who make a record, and none in a file."""
    expected = model.model_fields["format"].default
    if type(tree) is not dict or tree.get("format") != expected:
        found = tree.get("format") if type(tree) is dict else f"a {type(tree).__name__}"
        raise ValueError(f"its format is {ascii(found)[:100]}, this version reads {expected!r}")
