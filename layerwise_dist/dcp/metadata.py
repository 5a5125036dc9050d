# SPDX-License-Identifier: Apache-2.0
"""DCP's `Metadata` as typed JSON, and back (docs/format/state.md, "What dcp.save() wrote").

Each rank's state holds the objects that the rank was given; rank 0's holds the index of all as well. Nothing of it is
pickled, and a reader checks each number against the headers of the shards before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, UnsupportedError
from layerwise_dist.restore.reslice import first_gap
from layerwise_dist.storage import filenames, typed_json
from layerwise_dist.storage.reader import Shard
from layerwise_dist.storage.schemas import Schema, Unfit, fits
from layerwise_dist.tensors.pieces import dtype_code
from layerwise_dist.tensors.slices import DIMENSIONS, Slice

FORMAT: Literal["layerwise-dcp-1"] = "layerwise-dcp-1"

_MEMORY = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve": torch.preserve_format,
}  # fmt: skip
_Sizes = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 63)]], Field(max_length=DIMENSIONS)]
_Rank = Annotated[int, Field(ge=0, lt=filenames.RANKS_END)]


class ChunkSchema(Schema):
    offsets: _Sizes
    sizes: _Sizes
    rank: _Rank
    number: int = Field(ge=1, le=1 << 31)


class TensorSchema(Schema):
    kind: Literal["tensor"]
    dtype: torch.dtype
    shape: _Sizes
    requires_grad: bool
    memory_format: Literal["contiguous", "channels_last", "preserve"]
    pin_memory: bool
    chunks: list[ChunkSchema]

    @model_validator(mode="after")
    def _inside(self) -> TensorSchema:
        for chunk in self.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(self.shape):
                raise ValueError("a chunk of another number of dimensions")
            if any(o + n > g for o, n, g in zip(chunk.offsets, chunk.sizes, self.shape, strict=True)):
                raise ValueError("a chunk outside its tensor")
        return self


class ObjectSchema(Schema):
    kind: Literal["object"]
    rank: _Rank


class IndexSchema(Schema):
    entries: dict[str, Annotated[TensorSchema | ObjectSchema, Field(discriminator="kind")]]
    planner_data: Any
    version: str | None


class StateSchema(Schema):
    format: Literal["layerwise-dcp-1"]
    objects: dict[str, Any]
    index: IndexSchema | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """Where a rank put an item: `number` counts the chunks of one tensor in its shard, from 1; objects have 0."""

    rank: int
    number: int


def chunk_slice(
    fqn: str, dtype: str, shape: tuple[int, ...], chunk: ChunkStorageMetadata, number: int, among: str
) -> Slice:
    """A chunk as shards name it: `dcp/<key>`, and of one rank's further chunks of the same tensor `dcp.2/<key>`."""
    kind = "dcp" if number == 1 else f"dcp.{number}"
    return Slice(
        kind, fqn, dtype, tuple(shape), offsets=tuple(chunk.offsets), lengths=tuple(chunk.sizes), among=among
    )  # fmt: skip


def index_of(metadata: Metadata, written: Mapping[tuple[str, tuple[int, ...] | None], Written]) -> dict[str, Any]:
    """The value that typed JSON holds; `written` is by key and, of tensors, the chunk's offsets.

    Raises UnsupportedError, naming the key, for a tensor that is not saved as an array of elements.
    """
    entries: dict[str, Any] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            entries[fqn] = {"kind": "object", "rank": _found(written, fqn, None).rank}
            continue
        properties = entry.properties
        dtype_code(properties.dtype, fqn)
        memory = next((name for name, each in _MEMORY.items() if each == properties.memory_format), None)
        if memory is None or properties.layout != torch.strided:
            raise UnsupportedError(
                f"{fqn}: layout {properties.layout}, memory format {properties.memory_format}: only arrays of elements "
                "can be saved"
            )
        chunks = []
        for chunk in entry.chunks:
            place = _found(written, fqn, tuple(chunk.offsets))
            chunks.append({
                "offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "rank": place.rank, "number": place.number,
            })  # fmt: skip
        entries[fqn] = {
            "kind": "tensor", "dtype": properties.dtype, "shape": list(entry.size),
            "requires_grad": bool(properties.requires_grad), "memory_format": memory,
            "pin_memory": bool(properties.pin_memory), "chunks": chunks,
        }  # fmt: skip
    return {"entries": entries, "planner_data": metadata.planner_data, "version": metadata.version}


def _found(
    written: Mapping[tuple[str, tuple[int, ...] | None], Written], fqn: str, offsets: tuple[int, ...] | None
) -> Written:
    if (fqn, offsets) not in written:
        part = "" if offsets is None else f", the part at {list(offsets)}"
        raise UnsupportedError(f"{fqn}{part}: the planner lists it, but no rank was asked to write it")
    return written[fqn, offsets]


def read_state(shard: Shard) -> StateSchema:
    """What a rank's shard says beside its tensors. Raises DamageError or OSError."""
    where = f"shard {shard.index.path}"
    value = typed_json.loads(*shard.state(), where=where)
    try:
        return fits(StateSchema, value, "state")
    except Unfit as problem:
        raise DamageError(f"{where}: its state is not one of dcp.save(): {problem}") from None


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk, or one object, lies. `slice` is None of an object."""

    rank: int
    slice: Slice | None


def metadata_of(index: IndexSchema, world_size: int, where: str) -> Metadata:
    """As DCP has it; `storage_data` is a `Place` for each index. Raises DamageError."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, Place] = {}
    for fqn, entry in index.entries.items():
        ranks = [entry.rank] if isinstance(entry, ObjectSchema) else [chunk.rank for chunk in entry.chunks]
        if any(rank >= world_size for rank in ranks):
            raise DamageError(f"{where}: {fqn} is of rank {max(ranks)}, the checkpoint of {world_size}")
        if isinstance(entry, ObjectSchema):
            entries[fqn] = BytesStorageMetadata()
            places[MetadataIndex(fqn)] = Place(entry.rank, None)
            continue
        try:
            code = dtype_code(entry.dtype, fqn)
        except UnsupportedError as error:
            raise DamageError(f"{where}: {error}") from None
        properties = TensorProperties(
            dtype=entry.dtype, requires_grad=entry.requires_grad, memory_format=_MEMORY[entry.memory_format],
            pin_memory=entry.pin_memory,
        )  # fmt: skip
        chunks = [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks
        ]  # fmt: skip
        entries[fqn] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        for chunk, each in zip(chunks, entry.chunks, strict=True):
            part = chunk_slice(fqn, code, tuple(entry.shape), chunk, each.number, "")
            places[MetadataIndex(fqn, chunk.offsets)] = Place(each.rank, part)
    return Metadata(entries, planner_data=index.planner_data, storage_data=places, version=index.version)


def contradictions(manifest: Manifest, shards: Mapping[int, Shard]) -> list[str]:
    """What a load of a commit of `dcp.save()` would find missing in its shards; all of them are given, by rank."""
    try:
        states = {rank: read_state(shard) for rank, shard in shards.items()}
        index, where = states[0].index, f"shard {shards[0].index.path}"
        if index is None:
            return [f"{where}: it has no index of what dcp.save() wrote"]
        places = metadata_of(index, manifest.world_size, where).storage_data
    except DamageError as error:
        return [str(error)]
    problems: list[str] = []
    parts: dict[str, list[Slice]] = {}
    for key, place in places.items():
        if place.slice is None:
            if key.fqn not in states[place.rank].objects:
                problems.append(lacking(shards[place.rank], f"object {key.fqn}"))
            continue
        entry = shards[place.rank].index.entries.get(place.slice.name)
        if entry is None or replace(entry.slice, among="") != place.slice:
            problems.append(lacking(shards[place.rank], place.slice.name))
        parts.setdefault(key.fqn, []).append(place.slice)
    for fqn, found in parts.items():
        gap = first_gap(found)
        if gap is not None:
            problems.append(f"step {manifest.step}: {fqn}: no shard has its element {list(gap)}")
    return problems


def lacking(shard: Shard, what: str) -> str:
    return f"shard {shard.index.path}: {what} is not what the checkpoint's index says"
