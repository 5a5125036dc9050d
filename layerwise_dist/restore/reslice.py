# SPDX-License-Identifier: Apache-2.0
"""Which elements of saved slices fill a wanted slice of the same tensor, however both are cut. Pure data, no torch.

A slice is a few boxes of its global tensor, and lies in memory or in a file with one stride a dimension: a box with the
strides of its own lengths, a flat range with those of the global shape. What two slices share is again a few boxes, so
it is copied by a few strided copies, and no list ever has an entry an element or a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from layerwise_dist.errors import DamageError
from layerwise_dist.tensors.slices import Slice

# For each source at each dimension of the parts that are not filled yet. A mesh of 100 by 100 ranks needs two million.
_MOST_LOOKS = 1 << 22


@dataclass(frozen=True, slots=True)
class Box:
    """`begin` to `end` in each dimension of the global tensor, in elements; no dimension is empty."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - begin for begin, end in zip(self.begin, self.end, strict=True))


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of the source slice `number`, to their place in the wanted one. Offsets and strides are in elements from
    the beginning of each slice. Dimensions that lie together in both are one: without any there is one element.
    """

    number: int
    shape: tuple[int, ...]
    source: int
    source_strides: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """From the first element of the source to just past the last that is taken."""
        return self.source, self.source + reach(self.shape, self.source_strides)

    @property
    def straight(self) -> bool:
        """Whether it is one run, in the source and in the target."""
        return not self.shape or self.source_strides == self.target_strides == (1,)


def reach(shape: Iterable[int], strides: Iterable[int]) -> int:
    """From the first element to just past the last, in elements."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1


def boxes(part: Slice) -> list[Box]:
    """The slice as boxes that share no element, in row-major order: one, or of a flat range at most two a dimension."""
    if not part.numel:
        return []
    if part.offsets is not None and part.lengths is not None:
        ends = tuple(offset + length for offset, length in zip(part.offsets, part.lengths, strict=True))
        return [Box(part.offsets, ends)]
    assert part.start is not None and part.length is not None
    return list(_range_boxes(part.start, part.start + part.length, part.global_shape))


def run_of(part: Slice) -> tuple[int, int] | None:
    """The first element and the number of elements, where a slice is one run of its global tensor in row-major order;
    None where it is several.
    """
    if part.start is not None and part.length is not None:
        return part.start, part.length
    assert part.offsets is not None and part.lengths is not None
    if 0 in part.lengths:
        return 0, 0
    strides = run_strides(part.global_shape, part.lengths)
    return None if strides is None else (_place(part.offsets, strides), math.prod(part.lengths))


def run_strides(shape: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...] | None:
    """Of a tensor of this shape, in elements, if a box of these lengths is one run in row-major order; None if not."""
    rest = True
    for length, size in zip(reversed(lengths), reversed(shape), strict=True):
        if not rest and length != 1:
            return None
        rest = rest and length == size
    return _row_major(shape)


def meet(one: Slice, other: Slice) -> bool:
    """Whether two slices of one shape have an element in common."""
    return any(_common(a, b) is not None for a in boxes(one) for b in boxes(other))


def copies(wanted: Slice, sources: Sequence[Slice]) -> tuple[list[Copy], tuple[int, ...] | None]:
    """What fills `wanted`, each element once, from the first of the `sources` that has it.

    All are slices of one global tensor. Also returns the indices of an element that none of them has; None if `wanted`
    is whole. Raises DamageError where the sources cut each other into more parts than those of any checkpoint do.
    """
    found: list[Copy] = []
    looked_at = 0
    left = boxes(wanted)
    target = _strides(wanted)
    origin = _origin(wanted, target)
    for number, source in enumerate(sources):
        if not left:
            break
        strides = _strides(source)
        begin = _origin(source, strides)
        for box in boxes(source):
            rest: list[Box] = []
            looked_at += len(left) * max(1, len(target))
            if looked_at > _MOST_LOOKS:
                raise DamageError(f"{wanted.name}: shards cut it into more parts than any checkpoint has")
            for each in left:
                common = _common(each, box)
                if common is None:
                    rest.append(each)
                    continue
                found.append(_copy(number, common, strides, begin, target, origin))
                rest += _without(each, common)
            left = rest
    return found, min(left, key=lambda box: box.begin).begin if left else None


def first_gap(parts: Iterable[Slice]) -> tuple[int, ...] | None:
    """An element of their global tensor, by its indices, that none of these slices of it has; None if there is none.

    Raises DamageError, as `copies`.
    """
    ordered = sorted(parts, key=lambda part: [box.begin for box in boxes(part)][:1])
    first = ordered[0]
    return copies(Slice.whole(first.kind, first.fqn, first.dtype, first.global_shape), ordered)[1]


def _strides(part: Slice) -> tuple[int, ...]:
    """How far the next element in each dimension is, in elements."""
    return _row_major(part.global_shape if part.lengths is None else part.lengths)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    found, stride = [], 1
    for size in reversed(shape):
        found.append(stride)
        stride *= size
    return tuple(reversed(found))


def _origin(part: Slice, strides: tuple[int, ...]) -> int:
    """Where element 0, 0, ... of the global tensor would be: at or in front of the slice's first."""
    if part.start is not None:
        return -part.start
    assert part.offsets is not None
    return -_place(part.offsets, strides)


def _place(indices: Iterable[int], strides: Iterable[int]) -> int:
    return sum(index * stride for index, stride in zip(indices, strides, strict=True))


def _range_boxes(begin: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """Elements `begin` to `end` in row-major order: the end of a row, whole rows, the beginning of another."""
    if len(shape) < 2:
        yield Box((begin,), (end,)) if shape else Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = begin // row, (end - 1) // row
    if first == last:
        yield from _below(first, begin - first * row, end - first * row, shape[1:])
        return
    if begin > first * row:
        yield from _below(first, begin - first * row, row, shape[1:])
        first += 1
    whole = end // row
    if whole > first:
        yield Box((first, *(0 for _ in shape[1:])), (whole, *shape[1:]))
    if end > whole * row:
        yield from _below(whole, 0, end - whole * row, shape[1:])


def _below(index: int, begin: int, end: int, shape: tuple[int, ...]) -> Iterator[Box]:
    for box in _range_boxes(begin, end, shape):
        yield Box((index, *box.begin), (index + 1, *box.end))


def _common(one: Box, other: Box) -> Box | None:
    begin = tuple(map(max, one.begin, other.begin))
    end = tuple(map(min, one.end, other.end))
    return Box(begin, end) if all(b < e for b, e in zip(begin, end, strict=True)) else None


def _without(box: Box, hole: Box) -> list[Box]:
    """What is left of a box without one that lies in it: in front and after, one dimension after the other."""
    found: list[Box] = []
    begin, end = list(box.begin), list(box.end)
    for d in range(len(begin)):
        if begin[d] < hole.begin[d]:
            found.append(Box(tuple(begin), (*end[:d], hole.begin[d], *end[d + 1 :])))
            begin[d] = hole.begin[d]
        if hole.end[d] < end[d]:
            found.append(Box((*begin[:d], hole.end[d], *begin[d + 1 :]), tuple(end)))
            end[d] = hole.end[d]
    return found


def _copy(
    number: int, box: Box, source: tuple[int, ...], source_origin: int, target: tuple[int, ...], target_origin: int
) -> Copy:
    shape: list[int] = []
    one: list[int] = []
    other: list[int] = []
    for size, s, t in zip(box.shape, source, target, strict=True):
        if size == 1:
            continue
        if shape and one[-1] == size * s and other[-1] == size * t:
            shape[-1] *= size
            one[-1], other[-1] = s, t
        else:
            shape.append(size)
            one.append(s)
            other.append(t)
    return Copy(
        number, tuple(shape),
        source_origin + _place(box.begin, source), tuple(one), target_origin + _place(box.begin, target), tuple(other),
    )  # fmt: skip
