# SPDX-License-Identifier: Apache-2.0
"""Whether two Python values are the same bit for bit, including tensors and arrays inside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same to the bit, wherever their tensors are."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return fits(one, other) and torch.equal(bytes_of(one), bytes_of(other))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return bool(one == other) or (one != one and other != other)


def leaves(value: Any) -> Iterator[Any]:
    """All that is no container in a value, wherever typed JSON would find it."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple | deque | set | frozenset):
        yield value
        return
    for each in value:
        yield from leaves(each)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, as one row of uint8 on the CPU; a copy only if it must be."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def fits(live: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether one can be copied into the other as it is: dtype and shape."""
    return (live.dtype, live.shape) == (value.dtype, value.shape)
