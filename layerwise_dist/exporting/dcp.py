# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint's layout, as `get_state_dict` names things: ``model.<fqn>``, ``optimizer.param_groups``
and ``optimizer.state.<fqn>.<kind>``. `dcp.load` reads it into DTensors of any layout. DCP writes it; a part of a tensor
is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from layerwise_dist import _native
from layerwise_dist.exporting import contents as exported
from layerwise_dist.exporting.contents import Contents
from layerwise_dist.exporting.output import flush, not_what_was_written
from layerwise_dist.reading.tensor import LazyTensor

# Of each part, by key and offsets: its hash.
_Written = dict[tuple[str, tuple[int, ...]], int]


def write(folder: Path, contents: Contents, *, advance: Callable[[int], None]) -> None:
    """Verified: each part is read back."""
    sources: dict[str, tuple[LazyTensor, torch.dtype]] = {}
    state: dict[str, Any] = {"model": {}}

    def stand_in(path: str, lazy: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
        sources[path] = lazy, dtype
        return torch.empty(lazy.shape, dtype=dtype, device="meta")

    for weight in contents.weights:
        for key in (weight.key, *weight.tied):
            state["model"][key] = stand_in(f"model.{key}", weight.tensor, weight.dtype)
    found = {}
    for name, optimizer in contents.optimizers.items():
        begin = "optimizer." if len(contents.optimizers) == 1 else f"optimizer.{name}."
        kept: dict[str, dict[str, Any]] = {}
        for fqn, kinds in optimizer.state.items():
            kept[fqn] = {
                kind: stand_in(f"{begin}state.{fqn}.{kind}", value, value.dtype)
                if isinstance(value, LazyTensor)
                else value
                for kind, value in kinds.items()
            }
        found[name] = {"state": kept, "param_groups": optimizer.groups}
    if found:
        state["optimizer"] = next(iter(found.values())) if len(found) == 1 else found
    planner = _Planner(sources, advance)
    # One thread: several would each have a part in memory, and DCP's own files are as good in one.
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=1), planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None  # what it is made of: an interruption, too
    for each in folder.iterdir():
        flush(each)
    _read_back(folder, sources, planner.written)


class _Planner(DefaultSavePlanner):
    """Cuts tensors into parts of `CHUNK_BYTES`, and reads each when it is its turn."""

    def __init__(self, sources: Mapping[str, tuple[LazyTensor, torch.dtype]], advance: Callable[[int], None]) -> None:
        super().__init__()
        self._sources, self._advance = sources, advance
        self.written: _Written = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items: list[WriteItem] = []
        for item in plan.items:
            items += _parts(item) if item.tensor_data is not None else [item]
        self.plan = SavePlan(items, plan.storage_data, plan.planner_data)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.tensor_data is None:
            return super().resolve_data(write_item)
        fqn, chunk = write_item.index.fqn, write_item.tensor_data.chunk
        lazy, dtype = self._sources[fqn]
        part = lazy.read_box(tuple(chunk.offsets), tuple(chunk.sizes)).to(dtype)
        self.written[fqn, tuple(chunk.offsets)] = _hash(part)
        self._advance(part.nbytes)
        return part


def _parts(item: WriteItem) -> list[WriteItem]:
    """Along the first dimension; a row that is larger stays whole."""
    data = item.tensor_data
    assert data is not None
    size = tuple(data.size)
    row = data.properties.dtype.itemsize
    for each in size[1:]:
        row *= each
    rows = max(1, exported.CHUNK_BYTES // max(1, row))
    if not size or size[0] <= rows:
        return [item]
    properties: TensorProperties = data.properties
    found = []
    for start in range(0, size[0], rows):
        offsets = torch.Size((start, *(0 for _ in size[1:])))
        chunk = ChunkStorageMetadata(offsets, torch.Size((min(rows, size[0] - start), *size[1:])))
        index = MetadataIndex(item.index.fqn, offsets)
        found.append(WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, data.size)))
    return found


class _Comparing(LoadPlanner):
    """Takes what is read a part at a time, and keeps none of it."""

    def __init__(self, folder: Path, sources: Mapping[str, tuple[LazyTensor, torch.dtype]], written: _Written) -> None:
        self._folder, self._sources, self._written = folder, sources, written

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        return None

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("it is made by the one who reads")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        torch.load(value, weights_only=False)  # written by this process, a moment ago

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty(read_item.lengths, dtype=self._sources[read_item.storage_index.fqn][1], device="cpu")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        index = read_item.storage_index
        assert index.offset is not None
        if _hash(tensor) != self._written.pop((index.fqn, tuple(index.offset)), None):
            raise not_what_was_written(self._folder, index.fqn)


def _read_back(folder: Path, sources: Mapping[str, tuple[LazyTensor, torch.dtype]], written: _Written) -> None:
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    items = []
    for fqn, kept in metadata.state_dict_metadata.items():
        for number, chunk in enumerate(getattr(kept, "chunks", ())):
            index = MetadataIndex(fqn, chunk.offsets, number)
            nothing = torch.Size([0] * len(chunk.sizes))
            items.append(ReadItem(LoadItemType.TENSOR, index, nothing, index, nothing, chunk.sizes))
    left = dict(written)
    reader.read_data(LoadPlan(items), _Comparing(folder, sources, left)).wait()
    if left:
        raise not_what_was_written(folder, next(iter(left))[0])


def _hash(part: torch.Tensor) -> int:
    data = part.detach().contiguous()
    return _native.hash_memory(data.data_ptr(), data.nbytes) if data.numel() else 0
