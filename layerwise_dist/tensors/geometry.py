# SPDX-License-Identifier: Apache-2.0
"""Which memory tensors take, and as what: address, shape, strides, dtype, whether read as negated or conjugated.

Torch changes all of these under the same Python object: by `.data`, `resize_`, `unsqueeze_`, `set_`, `half()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerwise_dist.tensors.words import places

try:
    from torch._C._dynamo.guards import TensorGuards  # of torch's C library: nothing of torch._dynamo is imported
except ImportError:  # a private name. Without it Python is asked, which takes longer and says the same
    TensorGuards = None  # type: ignore[assignment,misc]


class Geometry:
    """Of strided tensors, none of them a DTensor, as they were when this was made. Keeps no tensor alive."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._addresses, self._layouts = _addresses(tensors), _layouts(tensors)
        self._places = places([*tensors])
        self._guards: TensorGuards | None = None
        self._guardable = TensorGuards is not None

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors take the same memory, in the same order, as the same elements."""
        placed = places([*tensors])
        if placed is None or placed != self._places:
            if _addresses(tensors) != self._addresses:
                return False
            self._places = placed  # other storages over the same memory
        # Guards take a sixth of the time of asking in Python. They also say no where nothing of this changed (but
        # requires_grad, or inference mode, or if a tensor is there twice); then Python is asked.
        if self._guards is not None and self._guards.check(*tensors):
            return True
        if _layouts(tensors) != self._layouts:
            return False
        if self._guardable:
            # A list for each tensor, whatever the stub says.
            sizes: list[Any] = [list(shape) for shape, *_ in self._layouts]
            strides: list[Any] = [list(strides) for _, strides, *_ in self._layouts]
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
            self._guardable = self._guards.check(*tensors)
        return True


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, tensors)]


def _layouts(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    return [(each.shape, each.stride(), each.dtype, each.is_conj(), each.is_neg()) for each in tensors]
