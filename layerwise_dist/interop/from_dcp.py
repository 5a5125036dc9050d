# SPDX-License-Identifier: Apache-2.0
"""Imports what DCP's own storage has written: `.metadata` and `*.distcp`, in the layout of `get_state_dict`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from layerwise_dist.errors import DamageError, UnsupportedError
from layerwise_dist.interop import from_torch
from layerwise_dist.interop.gathered_state import Found, Imported
from layerwise_dist.interop.pickles import load_metadata, loads

_LONGEST = 1 << 40


def read(
    source: str, *, allowed: bool, buffers: Sequence[str], optimizer: str | None, names: Sequence[str] | None
) -> Imported:
    """Raises UnsupportedError, DamageError or OSError."""
    path = os.path.join(source, ".metadata")
    metadata = load_metadata(path, allowed=allowed)
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
        raise DamageError(f"{path}: not the metadata of a DCP checkpoint on a file system")
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    state: dict[str, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        value = _value(source, metadata, key, entry)
        _place(state, paths.get(key, (key,)), value, path)
    return from_torch.read(source, state, buffers=buffers, optimizer=optimizer, names=names)


def _place(state: dict[Any, Any], path: Any, value: Any, where: str) -> None:
    """Puts it where it was before DCP flattened the state. Numbers are places in lists."""
    if not isinstance(path, tuple) or not path or not all(type(each) in (str, int) for each in path):
        raise DamageError(f"{where}: {path!r} is not a place in a state")
    held: Any = state
    for at, step in enumerate(path):
        last = at + 1 == len(path)
        made: Any = value if last else [] if type(path[at + 1]) is int else {}
        if type(step) is int:
            if not isinstance(held, list) or not 0 <= step < 1 << 20:
                raise DamageError(f"{where}: {path!r} is not a place in a state")
            held.extend([None] * (step + 1 - len(held)))
            if last or held[step] is None:
                held[step] = made
            held = held[step]
        else:
            if not isinstance(held, dict):
                raise DamageError(f"{where}: {path!r} is not a place in a state")
            if last:
                held[step] = made
            held = held.setdefault(step, made)


def _value(source: str, metadata: Metadata, key: str, entry: Any) -> Any:
    places: Mapping[Any, Any] = metadata.storage_data
    if isinstance(entry, BytesStorageMetadata):
        return loads(*_bytes(source, places.get(MetadataIndex(key)), key))
    if not isinstance(entry, TensorStorageMetadata):
        raise DamageError(f"{source}: {key} is neither a tensor nor an object")
    shape, dtype = tuple(entry.size), entry.properties.dtype
    covered = sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks)
    if covered != torch.Size(shape).numel():
        raise DamageError(f"{source}: the chunks of {key} have {covered} elements, it has {torch.Size(shape).numel()}")

    def made() -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype, device="cpu")
        for chunk in entry.chunks:
            index = MetadataIndex(key, chunk.offsets)
            part = loads(*_bytes(source, places.get(index), key))
            if not isinstance(part, torch.Tensor) or part.dtype != dtype or part.shape != chunk.sizes:
                raise DamageError(f"{source}: the part of {key} at {list(chunk.offsets)} is not what .metadata says")
            place = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place.narrow(dim, offset, size)
            place.copy_(part)
        return whole

    return Found(dtype, shape, made)


def _bytes(source: str, place: Any, key: str) -> tuple[bytes, str]:
    """An archive of `torch.save`, and where it is."""
    name, offset, length = (getattr(place, member, None) for member in ("relative_path", "offset", "length"))
    if type(name) is not str or os.path.basename(name) != name or type(offset) is not int or type(length) is not int:
        raise DamageError(f"{source}: .metadata does not say where {key} lies")
    if getattr(place, "transform_descriptors", None):
        raise UnsupportedError(f"{source}: {key} was written through an extension of DCP's, which is not imported")
    path = os.path.join(source, name)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if offset < 0 or not 0 <= length <= min(size - offset, _LONGEST):
            raise DamageError(f"{path}: has {size} bytes, and {key} would be {length} at {offset}")
        file.seek(offset)
        data = file.read(length)
    return data, f"{path}: {key}"
