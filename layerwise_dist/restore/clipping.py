# SPDX-License-Identifier: Apache-2.0
"""Clips spans to the bytes at hand: blocks come one by one, and a span may cross many of them."""

from __future__ import annotations

from collections.abc import Iterator

from layerwise_dist.restore.reslice import reach

# Elements of a shape, from one place on in the source and from another in the target.
Part = tuple[int, int, tuple[int, ...]]


def within(
    shape: tuple[int, ...], strides: tuple[int, ...], targets: tuple[int, ...], begin: int, end: int
) -> Iterator[Part]:
    """Those elements of a strided array whose places in the source are from `begin` on and before `end`, in as many
    parts as it takes: at most two a dimension, and one. `targets` are the strides in the target. All in elements; parts
    of fewer dimensions lack the first ones.

    REQUIRES: rows lie one after the other in the source, as those of a row-major tensor do.
    """
    if begin <= 0 and end >= reach(shape, strides):
        yield 0, 0, shape
        return
    if not shape or begin >= end:
        return
    row, step, target = reach(shape[1:], strides[1:]), strides[0], targets[0]
    first = max(0, (begin - row) // step + 1)  # with an element at or after `begin`
    last = min(shape[0], -(-end // step))  # after the last that begins before `end`
    inner_first = min(last, max(first, -(-begin // step)))
    inner_last = max(inner_first, min(last, (end - row) // step + 1))
    for index in (*range(first, inner_first), *range(inner_last, last)):
        for source, place, part in within(
            shape[1:], strides[1:], targets[1:], begin - index * step, end - index * step
        ):
            yield source + index * step, place + index * target, part
    if inner_last > inner_first:
        yield inner_first * step, inner_first * target, (inner_last - inner_first, *shape[1:])
