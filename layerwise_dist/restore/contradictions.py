# SPDX-License-Identifier: Apache-2.0
"""Tensors that share memory here, and for which the checkpoint says two different things: it is not of this model.

What is shared was saved from one memory at one moment, so in a checkpoint of this model it agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerwise_dist.frameworks.overlaps import overlaps
from layerwise_dist.restore.filling import Read, fill

_ALIGN = 16  # bytes; no element is larger


def contradictions(names: Sequence[str], reads: Sequence[Read]) -> list[str]:
    """What is wrong, in words. Touches no live tensor. Raises DamageError or OSError."""
    problems: list[str] = []
    content: dict[int, torch.Tensor] = {}
    for pair in _pairs([read.tensor for read in reads]):
        for place in pair:
            if place not in content:
                content[place] = _content(reads[place])
        one, other = pair
        if not _agree(reads[one].tensor, content[one], reads[other].tensor, content[other]):
            problems.append(f"{names[one]} and {names[other]} share memory here, but differ in the checkpoint")
    return problems


def _pairs(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Enough of the overlapping ones: of those that are one and the same memory, each with the first."""
    alike: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.numel() and tensor.data_ptr():
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            alike.setdefault(key, []).append(place)
    firsts = [places[0] for places in alike.values()]
    pairs = [(places[0], place) for places in alike.values() for place in places[1:]]
    return pairs + [(firsts[one], firsts[other]) for one, other in overlaps([tensors[place] for place in firsts])]


def _content(read: Read) -> torch.Tensor:
    """What a tensor is to become, in memory of its own."""
    found = read.staging()
    fill([(found, read.spans)])
    return found.to(read.tensor.dtype)


def _agree(one: torch.Tensor, content: torch.Tensor, other: torch.Tensor, more: torch.Tensor) -> bool:
    """Whether both can hold what they are to become: tried in memory that lies as theirs does."""
    begin = min(one.data_ptr(), other.data_ptr()) // _ALIGN * _ALIGN
    end = max(each.data_ptr() + _extent(each) for each in (one, other))
    memory = torch.empty(-(-(end - begin) // _ALIGN) * _ALIGN, dtype=torch.uint8, device="cpu")
    first, second = (_seen_as(each, memory, each.data_ptr() - begin) for each in (one, other))
    first.copy_(content)
    second.copy_(more)
    return torch.equal(_bits(first), _bits(content))


def _seen_as(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """That memory, from a byte offset on, as `tensor` sees its own."""
    seen = memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), offset // tensor.element_size())
    seen = seen.conj() if tensor.is_conj() else seen
    return torch._neg_view(seen) if tensor.is_neg() else seen


def _extent(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * (1 + sum((n - 1) * step for n, step in steps))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
