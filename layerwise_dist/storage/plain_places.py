# SPDX-License-Identifier: Apache-2.0
"""Where each part of a shard lies in its global tensor, as a plain header says it (`plain_header`).

For the ranks of a job that is mostly one text but for the numbers that say where. So the last text is kept as a
pattern: another one that fits it is read as an array of numbers, without an object for any tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import prod

import msgspec
import numpy as np
from msgspec import UNSET, Struct, UnsetType

from layerwise_dist.storage.plain import Count, Counts, NotPlain, encode, exactly
from layerwise_dist.tensors.slices import ranks_of

_MOST = (1 << 63) - 1
_DIGITS = 18  # of the longest number that is surely below 2**63
_POWERS = 10 ** np.arange(_DIGITS, dtype=np.int64)
_FEW = 10 ** (_DIGITS - 1)


class Place(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Its members are in the order in which they are written."""

    shape: Counts | UnsetType = UNSET
    start: Count | UnsetType = UNSET
    offsets: Counts | UnsetType = UNSET
    among: str | UnsetType = UNSET
    wrapped: bool | UnsetType = UNSET


_places = msgspec.json.Decoder(dict[str, Place])


@dataclass(frozen=True, eq=False, slots=True)
class Cuts:
    """All that a text says but for its numbers; columns as `Entries` has them.

    `most` (int64) has for each number the largest that is within the tensor. `groups` are the ranks that hold some
    tensor together.
    """

    shapes: list[tuple[int, ...]]
    among: list[str]
    wrapped: list[bool]
    flat: list[bool]
    firsts: list[int]
    most: np.ndarray
    groups: list[frozenset[int]]


class Pattern:
    """A text with places for numbers, made of one that is plain, and read."""

    def __init__(self, text: bytes, places: dict[str, Place], order: np.ndarray) -> None:
        """`order`: which of its numbers each is, in the order of the file. REQUIRES: none has as many digits as the
        largest that is allowed.
        """
        # The same text with the largest number in each place: these runs of digits are longer there.
        marked = {
            name: Place(
                place.shape, UNSET if place.start is UNSET else _MOST,
                UNSET if place.offsets is UNSET else (_MOST,) * len(place.offsets), place.among, place.wrapped,
            )
            for name, place in places.items()
        }  # fmt: skip
        (begins, ends), (more_begins, more_ends) = _runs(text), _runs(encode(marked))
        self._slots = np.flatnonzero(more_ends - more_begins != ends - begins)
        assert len(self._slots) == len(order)
        self._order = order
        self._runs = len(begins)
        self._rest, self._at = self._apart(np.frombuffer(text, dtype=np.uint8), begins, ends)[:2]

    def numbers(self, text: bytes) -> np.ndarray | None:
        """int64, those of a text that is this one but for its numbers, and is plain too; None of any other."""
        begins, ends = _runs(text)
        if len(begins) != self._runs:
            return None
        data = np.frombuffer(text, dtype=np.uint8)
        rest, at, digits, firsts, lengths = self._apart(data, begins, ends)
        if rest != self._rest or not np.array_equal(at, self._at):
            return None
        if not len(firsts):
            return firsts
        if int(lengths.max()) > _DIGITS or not in_one_way(data[digits[firsts]], lengths):
            return None
        places = np.repeat(firsts + lengths, lengths) - 1 - np.arange(len(digits))
        found = np.add.reduceat((data[digits] - ord("0")).astype(np.int64) * _POWERS[places], firsts)
        return found[self._order]

    def _apart(
        self, data: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All but the numbers, and where in that each of them stood; of each of their digits where it is, and of each
        number its first one and how many there are.
        """
        begins, lengths = begins[self._slots], (ends - begins)[self._slots]
        firsts = np.cumsum(lengths) - lengths
        digits = np.repeat(begins - firsts, lengths) + np.arange(int(lengths.sum()))
        keep = np.ones(len(data), dtype=bool)
        keep[digits] = False
        return data[keep].tobytes(), begins - firsts, digits, firsts, lengths


def in_one_way(first: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether numbers of so many digits, with these first ones, are as JSON has them: zero alone begins with a zero."""
    return not ((first == ord("0")) & (lengths > 1)).any()


def _runs(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of digits begins and ends. None is at either end of a text; where one is, there are no runs."""
    digit = (np.frombuffer(text, dtype=np.uint8) - np.uint8(ord("0"))) < 10
    if not len(digit) or digit[0] or digit[-1]:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    edges = np.flatnonzero(digit[1:] != digit[:-1]) + 1
    return edges[::2], edges[1::2]


class RecentPlaces:
    """The last text and what it was made from: the tensors, and the number of ranks."""

    def __init__(self) -> None:
        self._last: tuple[dict[str, int], int, Cuts, Pattern] | None = None

    def read(
        self, text: bytes, names: dict[str, int], lengths: Sequence[tuple[int, ...]], rank: int, world_size: int
    ) -> tuple[Cuts, np.ndarray]:  # fmt: skip
        """What a text says of these tensors (`names` have their numbers, `lengths` the shapes of the parts), and its
        numbers, in the order of the file. Raises NotPlain, and ValueError for ranks that are none.
        """
        numbers = None
        if self._last is not None and self._last[0] is names and self._last[1] == world_size:
            _, _, cuts, pattern = self._last
            numbers = pattern.numbers(text)
        if numbers is None:
            self._last = None
            places = exactly(_places, text)
            cuts, numbers, order = _cuts(places, names, lengths, world_size)
            if int(numbers.max(initial=0)) < _FEW:
                self._last = names, world_size, cuts, Pattern(text, places, order)
        check_within(numbers, cuts.most)
        if any(rank not in ranks for ranks in cuts.groups):
            raise NotPlain
        return cuts, numbers


def check_within(numbers: np.ndarray, most: np.ndarray) -> None:
    """That each part is within its tensor. Raises NotPlain."""
    if (numbers > most).any():
        raise NotPlain


def _cuts(
    places: dict[str, Place], names: dict[str, int], lengths: Sequence[tuple[int, ...]], world_size: int
) -> tuple[Cuts, np.ndarray, np.ndarray]:  # fmt: skip
    """What is said, the numbers in the order of the file, and which of the text's each of these is. Raises NotPlain."""
    count = len(lengths)
    shapes, among, wrapped, flat = list(lengths), [""] * count, [False] * count, [False] * count
    where: list[tuple[int, ...]] = [()] * count
    most: list[tuple[int, ...]] = [()] * count
    groups: dict[str, None] = {}
    came: list[int] = []
    for name, place in places.items():
        at = names.get(name)
        if at is None:
            raise NotPlain
        came.append(at)
        shape, start, box, part = place.shape, place.start, place.offsets, lengths[at]
        if shape is UNSET:
            if start is not UNSET or box is not UNSET:
                raise NotPlain
        elif box is not UNSET:
            if start is not UNSET or not len(shape) == len(box) == len(part):
                raise NotPlain
            shapes[at], where[at] = shape, box
            most[at] = tuple(size - length for size, length in zip(shape, part, strict=True))
        else:
            if start is UNSET or len(part) != 1:
                raise NotPlain
            shapes[at], where[at], flat[at] = shape, (start,), True
            most[at] = (max(-1, min(prod(shape) - part[0], _MOST)),)
        if place.among is not UNSET:
            among[at] = place.among
            groups[place.among] = None
        if place.wrapped is not UNSET:
            if not place.wrapped:
                raise NotPlain
            wrapped[at] = True
    firsts = [0, *accumulate(map(len, where))]
    begun = dict(zip(came, accumulate([0, *(len(where[at]) for at in came)]), strict=False))
    order = [begun[at] + each for at in range(count) if where[at] for each in range(len(where[at]))]
    held = [frozenset(ranks_of(ranks, world_size)) for ranks in groups]
    cuts = Cuts(shapes, among, wrapped, flat, firsts, _array(most), held)
    return cuts, _array(where), np.array(order, dtype=np.int64)


def _array(rows: Sequence[tuple[int, ...]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)
