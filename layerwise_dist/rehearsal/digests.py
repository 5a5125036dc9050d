# SPDX-License-Identifier: Apache-2.0
"""Hashes of what is in memory: two runs that had the same bits have the same, and nothing that is looked at changes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from layerwise_dist import _native
from layerwise_dist.loop import rng
from layerwise_dist.tensors.values import bytes_of

_DEEP = 6  # containers in containers
_MANY = 10_000  # leaves of one value
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def leaves(value: Any, path: str = "", depth: int = _DEEP) -> Iterator[tuple[str, str]]:
    """(path, hash) of each tensor, array, number, text and generator in a value; what else is in it is passed by."""
    if isinstance(value, Mapping) and depth:
        for key, each in value.items():
            yield from leaves(each, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, list | tuple | deque) and depth:
        for number, each in enumerate(value):
            yield from leaves(each, f"{path}[{number}]", depth - 1)
    elif (found := of_one(value)) is not None:
        yield path, found


def of(value: Any) -> str | None:
    """One hash of all that; None if there is nothing of the kind, or too much."""
    found = []
    for each in leaves(value):
        found.append(each)
        if len(found) > _MANY:
            return None
    return _hash(repr(found).encode()) if found else None


def of_one(value: Any) -> str | None:
    """Of what is no container. None for an object that can't be told, and for a tensor that is nowhere in memory."""
    if isinstance(value, torch.Tensor):
        return of_tensor(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _hash(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic | torch.dtype):
        return _hash(f"{type(value).__name__} {value!r}".encode())
    if isinstance(value, GENERATORS):
        return of(state_of(value))
    return None


def of_tensor(tensor: torch.Tensor) -> str | None:
    """Of this rank's part of it, wherever that is."""
    local = getattr(tensor, "_local_tensor", tensor)
    try:
        # A copy: memory that numpy has seen can't be resized any more, and FSDP2 does that.
        row = bytes_of(local.detach().resolve_conj().resolve_neg()).clone().numpy().data
    except (RuntimeError, NotImplementedError, TypeError):  # on the meta device, sparse, or one that stands for others
        return None
    return _hash(f"{local.dtype} {tuple(local.shape)} {_native.xxh3_64(row):016x}".encode())


def state_of(generator: Any) -> Any:
    """Of a generator that somebody made for himself."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def of_global_generators() -> dict[str, str | None]:
    """By what they are called in a checkpoint: torch, cuda, numpy, python."""
    return {name: of(state) for name, state in rng.take().items()}


def _hash(data: bytes) -> str:
    return f"{_native.xxh3_64(data):016x}"
