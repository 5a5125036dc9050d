# SPDX-License-Identifier: Apache-2.0
"""Slices filled from slices that are cut otherwise. Each element is its global number: none can pass for another."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from layerwise_dist.errors import DamageError
from layerwise_dist.restore import reslice
from layerwise_dist.restore.reslice import Copy, boxes, copies
from layerwise_dist.tensors.slices import Slice

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def box(shape: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...]) -> Slice:
    return Slice("param", "w", "F32", shape, offsets=offsets, lengths=lengths)


def flat(shape: tuple[int, ...], start: int, length: int) -> Slice:
    return Slice("param", "w", "F32", shape, start=start, length=length)


def content(part: Slice) -> np.ndarray:
    """The slice's elements in its own order, each its number in the global tensor."""
    whole = np.arange(math.prod(part.global_shape), dtype=np.int64).reshape(part.global_shape)
    if part.is_flat:
        return whole.reshape(-1)[part.start : part.start + part.length]
    spans = zip(part.offsets, part.lengths, strict=True)
    return np.ascontiguousarray(whole[tuple(slice(offset, offset + length) for offset, length in spans)]).reshape(-1)


def view(memory: np.ndarray, offset: int, copy: Copy, strides: tuple[int, ...]) -> np.ndarray:
    last = offset + sum((size - 1) * stride for size, stride in zip(copy.shape, strides, strict=True))
    assert 0 <= offset <= last < len(memory), "nothing outside a slice is touched"
    item = memory.itemsize
    return as_strided(memory[offset:], copy.shape, [stride * item for stride in strides])


def filled(wanted: Slice, sources: list[Slice]) -> np.ndarray:
    """-1 where nothing came."""
    target = np.full(wanted.numel, -1, dtype=np.int64)
    found, _ = copies(wanted, sources)
    for each in found:
        place = view(target, each.target, each, each.target_strides)
        assert (place == -1).all(), "no element is written twice"
        place[...] = view(content(sources[each.number]), each.source, each, each.source_strides)
    assert sum(each.numel for each in found) == (target >= 0).sum()
    return target


@st.composite
def parts(draw: st.DrawFn, shape: tuple[int, ...]) -> Slice:
    if draw(st.booleans()):
        start = draw(st.integers(0, math.prod(shape)))
        return flat(shape, start, draw(st.integers(0, math.prod(shape) - start)))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return box(shape, offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Slice, list[Slice]]:
    shape = draw(SHAPES)
    return draw(parts(shape)), draw(st.lists(parts(shape), max_size=5))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_each_element_comes_once_from_a_slice_that_has_it(case: tuple[Slice, list[Slice]]) -> None:
    wanted, sources = case
    got, expected = filled(wanted, sources), content(wanted)
    held = set().union(*(content(source).tolist() for source in sources)) if sources else set()
    assert got.tolist() == [number if number in held else -1 for number in expected.tolist()]
    _, gap = copies(wanted, sources)
    lacking = [number for number in expected.tolist() if number not in held]
    if gap is None:
        assert not lacking
    else:
        assert int(np.ravel_multi_index(gap, wanted.global_shape) if wanted.global_shape else 0) == min(lacking)


@settings(max_examples=200, deadline=None)
@given(SHAPES.flatmap(parts))
def test_a_slice_is_a_few_boxes(part: Slice) -> None:
    found = boxes(part)
    assert len(found) <= max(1, 2 * len(part.global_shape) - 1)
    assert sum(math.prod(each.shape) for each in found) == part.numel


CUTS = {
    "rows to columns": (box((6, 4), (0, 1), (6, 2)), [box((6, 4), (0, 0), (3, 4)), box((6, 4), (3, 0), (3, 4))]),
    "columns to rows": (box((6, 4), (2, 0), (3, 4)), [box((6, 4), (0, 0), (6, 1)), box((6, 4), (0, 1), (6, 3))]),
    "flat to a box": (box((5, 3), (1, 0), (3, 2)), [flat((5, 3), 0, 7), flat((5, 3), 7, 8)]),
    "a box to flat": (flat((5, 3), 4, 8), [box((5, 3), (0, 0), (2, 3)), box((5, 3), (2, 0), (3, 3))]),
    "flat to flat": (flat((2, 3, 5), 11, 13), [flat((2, 3, 5), *range_) for range_ in ((0, 12), (12, 1), (13, 17))]),
    "one number": (box((), (), ()), [flat((), 0, 1)]),
    "nothing": (flat((7,), 7, 0), []),
    "more than once there": (box((4, 4), (0, 0), (4, 4)), [box((4, 4), (1, 1), (2, 2)), box((4, 4), (0, 0), (4, 4))]),
}


@pytest.mark.parametrize("name", CUTS)
def test_one_cut_fills_another(name: str) -> None:
    wanted, sources = CUTS[name]
    assert filled(wanted, sources).tolist() == content(wanted).tolist()
    assert copies(wanted, sources)[1] is None


def test_what_lies_together_is_one_run() -> None:
    (whole,), gap = copies(box((8, 3, 5), (2, 0, 0), (4, 3, 5)), [flat((8, 3, 5), 15, 100)])
    assert gap is None and whole == Copy(0, (60,), 15, (1,), 0, (1,)) and whole.straight and whole.span == (15, 75)
    (rows,), _ = copies(box((8, 6), (0, 1), (8, 2)), [box((8, 6), (0, 0), (8, 6))])
    assert rows == Copy(0, (8, 2), 1, (6, 1), 0, (2, 1)) and not rows.straight and rows.span == (1, 45)


def test_a_plan_does_not_grow_with_the_tensor() -> None:
    """Columns of a matrix of 10^12 elements, from a flat cut into 512 parts."""
    shape, ranks = (10**6, 10**6), 512
    edges = [number * 10**12 // ranks for number in range(ranks + 1)]
    sources = [flat(shape, begin, end - begin) for begin, end in zip(edges, edges[1:], strict=False)]
    found, gap = copies(box(shape, (0, 250_000), (10**6, 250_000)), sources)
    assert gap is None and len(found) < 4 * ranks and sum(each.numel for each in found) == 25 * 10**10


def test_boxes_inside_each_other_in_many_dimensions_end_soon() -> None:
    """As no writer cuts: the number of parts grows with each of them, and in each dimension."""
    dimensions, count = 30, 40
    shape = (2 * count + 2,) * dimensions
    halves = [box(shape, (*(0,) * (dimensions - 1), at), (*shape[1:], count + 1)) for at in (0, count + 1)]
    nested = [box(shape, (at,) * dimensions, (2 * (count + 1 - at),) * dimensions) for at in range(1, count + 1)]
    assert reslice.first_gap([*nested, *halves]) is None
    with pytest.raises(DamageError, match="more parts than any checkpoint"):
        # Away from the halves nothing ends it early.
        reslice.first_gap(
            [
                box(shape, (at % 7, *(at * k % 5 for k in range(1, dimensions))), (3,) * dimensions)
                for at in range(1, 3000)
            ]
        )


@pytest.mark.parametrize("wrong", ["transposed", "shifted"])
def test_mutation_a_wrong_stride_or_origin_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    if wrong == "transposed":
        real = reslice._strides
        monkeypatch.setattr(reslice, "_strides", lambda part: tuple(reversed(real(part))))
    else:
        monkeypatch.setattr(reslice, "_origin", lambda part, strides: 0)
    with pytest.raises((AssertionError, ValueError)):
        for name in CUTS:
            test_one_cut_fills_another(name)
