# SPDX-License-Identifier: Apache-2.0
"""Extents gathered in memory before they are written, laid out as in the file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from layerwise_dist import _native
from layerwise_dist.storage.shard_layout import ShardLayout

Segment = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class GatheredExtent:
    """One extent whose memory is one buffer of `nbytes` bytes, the native plan's tensor number `tensor`.

    `places` are (number of the slice in the layout, offset in the buffer), without those that have no bytes; `gaps`
    are the (begin, end) between and after them, which are zeros in the file and so must be in the buffer.
    """

    tensor: int
    nbytes: int
    places: tuple[tuple[int, int], ...]
    gaps: tuple[tuple[int, int], ...]


class Laid(NamedTuple):
    """A layout, the native plan made from it (None where the monitor makes it), and its gathered extents by number."""

    shard: ShardLayout
    plan: _native.Plan | None
    gathered: dict[int, GatheredExtent]


def gather(shard: ShardLayout, extents: Collection[int]) -> tuple[list[Segment], dict[int, GatheredExtent]]:
    """The segments of the native plan when these extents come out of one buffer each, and what is where in those.

    Such an extent is one tensor to the writer, so that none of its bytes is copied again. The buffers are numbered on
    from the layout's tensors.
    """
    owner: dict[int, int] = {}  # of each block of a gathered extent
    for number in extents:
        extent = shard.extents[number]
        owner.update(dict.fromkeys(range(extent.first_block, extent.first_block + extent.blocks), number))
    spans: dict[int, dict[int, tuple[int, int]]] = {number: {} for number in extents}
    segments: list[Segment] = []
    for segment in shard.segments:
        block, inside, tensor, offset, nbytes = segment
        if block not in owner:
            segments.append(segment)
            continue
        extent = shard.extents[owner[block]]
        begin = shard.blocks[block][0] + inside - extent.offset - offset
        spans[owner[block]][tensor] = (begin, begin + offset + nbytes)
    gathered: dict[int, GatheredExtent] = {}
    for tensor, number in enumerate(extents, shard.tensors):
        extent = shard.extents[number]
        for block in range(extent.first_block, extent.first_block + extent.blocks):
            offset, nbytes = shard.blocks[block]
            segments.append((block, 0, tensor, offset - extent.offset, nbytes))
        ends = sorted(spans[number].items(), key=lambda item: item[1])
        cursor, gaps = 0, []
        for begin, end in [*(span for _, span in ends), (extent.nbytes, extent.nbytes)]:
            if begin > cursor:
                gaps.append((cursor, begin))
            cursor = end
        places = tuple((slice_number, begin) for slice_number, (begin, _) in ends)
        gathered[number] = GatheredExtent(tensor, extent.nbytes, places, tuple(gaps))
    segments.sort()
    return segments, gathered
