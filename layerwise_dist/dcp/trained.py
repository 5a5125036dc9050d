# SPDX-License-Identifier: Apache-2.0
"""A training's checkpoint as `dcp.load` asks for it: the layout of `get_state_dict`, whichever ranks wrote what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from layerwise_dist.frameworks.private_names import require
from layerwise_dist.reading.checkpoint import Checkpoint, is_of_model
from layerwise_dist.reading.tensor import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What is no tensor."""

    value: Any


def metadata_of(checkpoint: Checkpoint, model: str, optimizer: str) -> Metadata:
    """`{model: state_dict, optimizer: {"state", "param_groups"}, "step": n}`, flattened as DCP does; `storage_data` is
    a `LazyTensor` or a `Value` for each index.

    Parameters are those of the model's `state_dict()`, tied ones under each of their names; of DeepSpeed's they are the
    masters. The optimizer's state is by name. Of several models each is under its own name below `model`; of several
    optimizers there is none.
    """
    weights: Any = (
        {name: _tensors(checkpoint, name) for name in checkpoint.models}
        if checkpoint.models
        else _tensors(checkpoint, None)
    )
    state: dict[str, Any] = {model: weights, "step": checkpoint.step}
    groups = checkpoint.hyperparameters.get("")
    if groups is not None:
        kept: dict[str, dict[str, Any]] = {}
        for rank in range(checkpoint.world_size):
            for fqn, values in checkpoint.sealed(rank)["optimizer"]["scalars"].items():
                kept.setdefault(fqn, {}).update(values)
        for name in checkpoint:
            if not is_of_model(name):
                kind, fqn = name.split("/", 1)
                kept.setdefault(fqn, {})[kind] = checkpoint[name]
        state[optimizer] = {"state": kept, "param_groups": groups}
    require("torch.distributed.checkpoint")
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict  # private: not at our import

    flat, mappings = flatten_state_dict(state)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, LazyTensor | Value] = {}
    for key, value in flat.items():
        if not isinstance(value, LazyTensor):
            entries[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = Value(value)
            continue
        chunk = ChunkStorageMetadata(torch.Size([0] * len(value.shape)), value.shape)
        entries[key] = TensorStorageMetadata(TensorProperties(value.dtype), value.shape, [chunk])
        places[MetadataIndex(key, chunk.offsets)] = value
    return Metadata(entries, planner_data=mappings, storage_data=places)


def _tensors(checkpoint: Checkpoint, model: str | None) -> dict[str, LazyTensor]:
    return {key: checkpoint[name] for key, name in checkpoint.weights(model).items()}
