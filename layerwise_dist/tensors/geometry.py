# SPDX-License-Identifier: Apache-2.0
"""Which memory tensors take, and as what: address, shape, strides, dtype, whether read as negated or conjugated.

Torch changes all of these under the same Python object: by `.data`, `resize_`, `unsqueeze_`, `set_`, `half()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerwise_dist.tensors.words import Insides


class Geometry:
    """Of strided tensors, none of them a DTensor, as they were when this was made. Keeps no tensor alive."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._addresses, self._layouts = _addresses(tensors), _layouts(tensors)
        self._insides = Insides([*tensors])

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors take the same memory, in the same order, as the same elements."""
        listed = [*tensors]
        if self._insides.are_of(listed):
            return True
        if _addresses(listed) != self._addresses or _layouts(listed) != self._layouts:
            return False
        self._insides = Insides(listed)  # other storages over the same memory, say
        return True


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, tensors)]


def _layouts(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    return [(each.shape, each.stride(), each.dtype, each.is_conj(), each.is_neg()) for each in tensors]
