# SPDX-License-Identifier: Apache-2.0
"""The items of a rank's plan: tensors as slices and memory, objects as values rather than pickle archives."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from layerwise_dist.dcp.metadata import chunk_slice
from layerwise_dist.errors import UnsupportedError
from layerwise_dist.interop.one_shard import dumped
from layerwise_dist.tensors.pieces import check_layout, dtype_code, is_dense
from layerwise_dist.tensors.slices import Slice

Job = tuple[WriteItem, Slice, int]  # the last: which of the tensor's chunks in this shard it is, from 1 on


def jobs(items: Iterable[WriteItem], among: dict[str, str]) -> list[Job]:
    """The tensors of a plan, each with its place in this rank's shard. `among`: which ranks hold a tensor that several
    do. Raises UnsupportedError, naming the key.
    """
    numbers: dict[str, int] = {}
    found = []
    for item in items:
        if item.type == WriteItemType.BYTE_IO:
            continue
        data, fqn = item.tensor_data, item.index.fqn
        if data is None:
            raise UnsupportedError(f"{fqn}: the plan says nothing of the tensor")
        if not fqn:
            raise UnsupportedError("a tensor without a name: give each key of the state one")
        numbers[fqn] = numbers.get(fqn, 0) + 1
        code = dtype_code(data.properties.dtype, fqn)
        found.append(
            (
                item,
                chunk_slice(fqn, code, tuple(data.size), data.chunk, numbers[fqn], among.get(fqn, "")),
                numbers[fqn],
            )
        )
    return found


def objects(items: Iterable[WriteItem], planner: SavePlanner) -> dict[str, Any]:
    """The objects of a plan, by key, as they are: DCP has made archives of `torch.save` of them, which are not written.

    Raises UnsupportedError for a planner from which they are not to be had as they are.
    """
    found: dict[str, Any] = {}
    for item in items:
        if item.type != WriteItemType.BYTE_IO:
            continue
        fqn, lookup = item.index.fqn, getattr(planner, "lookup_object", None)
        if lookup is None:
            raise UnsupportedError(
                f"{fqn}: {type(planner).__name__} has no lookup_object(), so the object is available only as a "
                "pickle, which is never written: derive the planner from DefaultSavePlanner"
            )
        found[fqn] = lookup(item.index)
        if not _plain(type(planner)) and not _unchanged(planner, item, found[fqn]):
            raise UnsupportedError(
                f"{fqn}: {type(planner).__name__} makes bytes of its own of this object, which only it could read: let "
                "resolve_data() and transform_object() leave items of type BYTE_IO as they are"
            )
    return found


def _plain(kind: type[SavePlanner]) -> bool:
    """Whether objects go into the archives as `lookup_object` gives them."""
    return all(
        getattr(kind, name, None) is getattr(DefaultSavePlanner, name) for name in ("resolve_data", "transform_object")
    )


def _unchanged(planner: SavePlanner, item: WriteItem, value: Any) -> bool:
    made, own = planner.resolve_data(item), io.BytesIO()
    torch.save(value, own)
    return isinstance(made, io.BytesIO) and made.getbuffer() == own.getbuffer()


def check_objects(values: dict[str, Any]) -> None:
    """Raises UnsupportedError naming what of these objects typed JSON cannot hold."""
    for fqn, value in values.items():
        dumped(value, f"state_dict[{fqn!r}]")


def resolved(planner: SavePlanner, item: WriteItem, part: Slice) -> tuple[torch.Tensor, bool]:
    """Host memory with the elements of one item, row-major, and whether they were copied there."""
    data = planner.resolve_data(item)
    if not isinstance(data, torch.Tensor):
        raise UnsupportedError(f"{part.fqn}: the planner gives a {type(data).__name__}, the plan says it is a tensor")
    tensor = data.detach()
    check_layout(part.fqn, tensor)
    code = dtype_code(tensor.dtype, part.fqn)
    if code != part.dtype or tuple(tensor.shape) != part.lengths:
        raise UnsupportedError(
            f"{part.fqn}: the planner gives {code}{list(tensor.shape)}, its plan says "
            f"{part.dtype}{list(part.lengths or ())}: a planner that changes tensors must say so in its plan"
        )
    if tensor.device.type == "cpu" and is_dense(tensor):
        return tensor, not _plain(type(planner))
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.copy_(tensor)
    return copy, True
