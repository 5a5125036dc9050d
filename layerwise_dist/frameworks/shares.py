# SPDX-License-Identifier: Apache-2.0
"""Divides tensors that several ranks hold alike: equal parts of one row of bytes, or whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of one tensor: elements `start` to `end`; `first` says that it has the tensor's first element,
    and with it whatever of the tensor is not cut.
    """

    start: int
    end: int
    first: bool


def shares(sizes: Sequence[tuple[int, int]], rank: int, world_size: int) -> list[Share]:
    """`sizes` are (elements, bytes of one) of the tensors, in order. Cut at whole elements; the same for every step."""
    total = max(1, sum(numel * item for numel, item in sizes))
    found, begin = [], 0
    for numel, item in sizes:
        cuts = [min(numel, max(0, -(-(total * r // world_size - begin) // item))) for r in range(world_size + 1)]
        cuts[-1] = numel
        first = next((r for r in range(world_size) if cuts[r + 1] > 0), world_size - 1)
        found.append(Share(cuts[rank], cuts[rank + 1], rank == first))
        begin += numel * item
    return found


def owners(items: Sequence[tuple[Sequence[int], int]]) -> list[int]:
    """Which rank writes each of these: (ranks that hold it alike, bytes). Balanced by bytes among those ranks.

    Ranks that hold the same come to the same answer: all of them know all that they have in common, in one order.
    """
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    found = [0] * len(items)
    for number in sorted(range(len(items)), key=lambda number: -items[number][1]):
        ranks, nbytes = items[number]
        load = loads.setdefault(tuple(ranks), dict.fromkeys(sorted(ranks), 0))
        found[number] = min(load, key=load.__getitem__)
        load[found[number]] += nbytes
    return found
