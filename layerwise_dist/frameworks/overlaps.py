# SPDX-License-Identifier: Apache-2.0
"""Which tensors have memory in common. Objects do not tell: `a.data = b.data` makes two parameters of one memory, each
with a version counter of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.framework import ParamView

# Tensors that lie between each other's elements (columns of one matrix) are told apart byte by byte, by as many flags.
_EXACT_BYTES = 64 << 20


def overlaps(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Positions of plain strided tensors, in pairs, that have at least one byte in common.

    Exact, unless the two lie between each other's elements over more than 64 MiB: those count as one memory.
    """
    found: list[tuple[int, int]] = []
    begun: list[tuple[int, int, int]] = []
    for span in sorted(_spans(tensors)):
        begin, _, place = span
        begun = [each for each in begun if each[1] > begin]
        found += [(other, place) for _, _, other in begun if _share(tensors[other], tensors[place])]
        begun.append(span)
    return found


def _spans(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int, int]]:
    """Of each tensor with memory: its first byte's address, the one after its last byte, and its position."""
    for place, tensor in enumerate(tensors):
        numel, begin = tensor.numel(), tensor.data_ptr()
        if numel and begin:
            size = tensor.element_size()
            nbytes = numel * size if tensor.is_contiguous() else _bytes_of(tensor).span
            yield begin, begin + nbytes, place


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """REQUIRES: their spans overlap, if they are on one device."""
    if one.device != other.device or not (one.untyped_storage().nbytes() and other.untyped_storage().nbytes()):
        return False  # FSDP frees the storages of what it has gathered: no address in one says anything
    bytes_of = _bytes_of(one), _bytes_of(other)
    begin = min(one.data_ptr(), other.data_ptr())
    end = max(each.data_ptr() + of.span for each, of in zip((one, other), bytes_of, strict=True))
    if all(of.dense for of in bytes_of) or end - begin > _EXACT_BYTES:
        return True
    flags = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    mine, theirs = (
        flags.as_strided(of.shape, of.strides, each.data_ptr() - begin)
        for each, of in zip((one, other), bytes_of, strict=True)
    )
    mine.fill_(True)
    return bool(theirs.any())


class _Bytes(NamedTuple):
    """A tensor's bytes. `span`: how many from the first to the last; `dense`: they are all between those."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    span: int
    dense: bool


def _bytes_of(tensor: torch.Tensor) -> _Bytes:
    size = tensor.element_size()
    # A dimension that repeats the same elements has no bytes of its own.
    steps = [(n, step * size) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and step]
    covered = size
    for n, step in sorted(steps, key=lambda each: each[1]):
        covered = covered * n if step == covered else 0
    shape, strides = (*(n for n, _ in steps), size), (*(step for _, step in steps), 1)
    span = size + sum((n - 1) * step for n, step in steps)
    return _Bytes(shape, strides, span, covered == span)


class LayersApart:
    """Whether the layers of an optimizer's parameters lie apart in memory, so that one can be updated without another.

    Asked before every update by layers; what is compared each time is only whether something moved.
    """

    def __init__(self, views: Sequence[ParamView]) -> None:
        """`views`: of all the model's parameters."""
        self._views = {id(view.param): view for view in views}
        self._places: list[Any] = []

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raises UnsupportedError that names two parameters of different layers that share memory."""
        params = [param for group in groups for param in group["params"] if id(param) in self._views]
        held = [param._local_tensor if isinstance(param, DTensor) else param for param in params]
        places = [(each.data_ptr(), each.shape, each.stride()) for each in held]
        if places == self._places:
            return
        for pair in overlaps([each.detach() for each in held]):
            one, other = (self._views[id(params[place])] for place in pair)
            if one.layer != other.layer:
                raise UnsupportedError(
                    f"parameters {one.fqn} and {other.fqn} share memory and are in two layers, so neither layer can be "
                    "updated without the other; use update = 'whole', or make them one Parameter (module.weight = "
                    "other.weight instead of its .data)"
                )
        self._places = places
