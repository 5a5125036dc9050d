# SPDX-License-Identifier: Apache-2.0
"""Headers as our writer writes them, read some times faster than by the check in `header`, which defines what a header
is: what is taken here it would take, and for the same. All else is left to it.

A text is plain if the typed values that it is read as give the same text again, byte for byte. So nothing that two
readers could take for two things (a name twice, a number such as 1e3 or -0, an escape where none is needed, a member
more) is ever looked at here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from layerwise_dist.storage import strict_json
from layerwise_dist.storage.entries import Entries
from layerwise_dist.storage.shard_layout import PAD, STATE_BYTES, STATE_JSON
from layerwise_dist.tensors.slices import DIMENSIONS, ITEM_BYTES, LONGEST_NAME, ranks_of

_BEGIN, _BETWEEN = b'{"__metadata__":', b'"},"'

_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Counts = Annotated[tuple[_Count, ...], Meta(max_length=DIMENSIONS)]


class NotPlain(ValueError):
    """What is to be read by the check in `header`."""


class _Tensor(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Its members are in the order in which they are written."""

    dtype: str
    shape: _Counts
    data_offsets: tuple[_Count, _Count]


class _Place(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """As `_Tensor`."""

    shape: _Counts | UnsetType = UNSET
    start: _Count | UnsetType = UNSET
    offsets: _Counts | UnsetType = UNSET
    among: str | UnsetType = UNSET
    wrapped: bool | UnsetType = UNSET


_texts = msgspec.json.Decoder(dict[str, str])
_tensors = msgspec.json.Decoder(dict[str, _Tensor])
_places = msgspec.json.Decoder(dict[str, _Place])
_encode = msgspec.json.Encoder().encode

T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class _Columns:
    """What one text says of tensors. Offsets are from the header's end on, and arrays are int64.

    `number` is that of a tensor, in the order of the file, by name; `special` are the two parts of the state.
    """

    names: list[str]
    number: dict[str, int]
    dtypes: list[str]
    lengths: list[tuple[int, ...]]
    begins: np.ndarray
    ends: np.ndarray
    special: dict[str, tuple[int, int]]
    end: int


class Recent:
    """The tensors' part of the last header: it is the same text on many ranks of a job, and says the same."""

    def __init__(self) -> None:
        self.text = b""
        self.columns: _Columns | None = None


class Plain:
    """The JSON of one header, without its padding.

    Attributes:
        metadata: its strings, otherwise unchecked.
    """

    def __init__(self, data: bytes, recent: Recent) -> None:
        """Raises NotPlain."""
        if strict_json.weight(data) > strict_json.WEIGHT_CAP:
            raise NotPlain
        data = data.rstrip(b" ")
        # Within a string there is a backslash in front of each quote. Where a string ends in `"},` this is another
        # place: then neither part is the JSON that it should be.
        end = data.find(_BETWEEN) + 2
        if not data.startswith(_BEGIN) or end < len(_BEGIN):
            raise NotPlain
        self.metadata = _exactly(_texts, data[len(_BEGIN) : end])
        places = self.metadata.get("slices", "").encode()
        if strict_json.weight(places) > strict_json.WEIGHT_CAP:
            raise NotPlain
        self._places = _exactly(_places, places)
        text = b"{" + data[end + 1 :]
        if recent.columns is None or text != recent.text:
            recent.columns = None
            recent.columns, recent.text = _columns(_exactly(_tensors, text)), text
        self._columns = recent.columns

    def entries(self, base: int, rank: int, world_size: int) -> tuple[Entries, dict[str, tuple[int, int]], int]:
        """(tensors, ranges of the state's two parts, where the last one ends after the header). Raises NotPlain."""
        of = self._columns
        shapes, none = of.lengths.copy(), len(of.names)
        offsets: list[tuple[int, ...] | None] = [None] * none
        starts: list[int | None] = [None] * none
        among, wrapped = [""] * none, [False] * none
        boxes: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        groups = set()
        for name, place in self._places.items():
            at = of.number.get(name)
            if at is None:
                raise NotPlain
            shape, start, box = place.shape, place.start, place.offsets
            if shape is UNSET:
                if start is not UNSET or box is not UNSET:
                    raise NotPlain
            else:
                shapes[at] = shape
                if box is not UNSET:
                    if start is not UNSET:
                        raise NotPlain
                    offsets[at] = box
                    boxes.append((shape, box, of.lengths[at]))
                elif start is UNSET or len(of.lengths[at]) != 1 or start + of.lengths[at][0] > prod(shape):
                    raise NotPlain
                else:
                    starts[at] = start
            if place.among is not UNSET:
                among[at] = place.among
                groups.add(place.among)
            if place.wrapped is not UNSET:
                if not place.wrapped:
                    raise NotPlain
                wrapped[at] = True
        _check_boxes(boxes)
        for ranks in groups:
            if rank not in ranks_of(ranks, world_size):
                raise NotPlain
        entries = Entries(
            of.names, of.number, of.dtypes, of.lengths, of.begins + base, of.ends + base, shapes, offsets, starts,
            among, wrapped,
        )  # fmt: skip
        return entries, {name: (base + begin, base + end) for name, (begin, end) in of.special.items()}, of.end


def _columns(tensors: dict[str, _Tensor]) -> _Columns:
    """Raises NotPlain."""
    special: dict[str, tuple[int, int]] = {}
    names: list[str] = []
    found: list[_Tensor] = []
    cursor = 0
    for name, tensor in tensors.items():
        begin, end = tensor.data_offsets
        item = ITEM_BYTES.get(tensor.dtype)
        if item is None or begin != cursor or end - begin != prod(tensor.shape) * item:
            raise NotPlain
        cursor = end
        slash = name.find("/")
        if not 0 < slash < len(name) - 1 or len(name) > LONGEST_NAME:
            raise NotPlain
        if name.startswith(PAD):
            if tensor.dtype != "U8":
                raise NotPlain
        elif name.startswith("state/"):
            if tensor.dtype != "U8" or name not in (STATE_JSON, STATE_BYTES):
                raise NotPlain
            special[name] = begin, end
        else:
            names.append(name)
            found.append(tensor)
    places = np.array([tensor.data_offsets for tensor in found], dtype=np.int64).reshape(-1, 2)
    return _Columns(
        names, {name: number for number, name in enumerate(names)}, [tensor.dtype for tensor in found],
        [tensor.shape for tensor in found], places[:, 0], places[:, 1], special, cursor,
    )  # fmt: skip


def _check_boxes(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]) -> None:
    """(shape, offsets, lengths): that each is within its tensor. Raises NotPlain."""
    if not boxes:
        return
    shapes, offsets, lengths = zip(*boxes, strict=True)
    if not list(map(len, shapes)) == list(map(len, offsets)) == list(map(len, lengths)):
        raise NotPlain
    shape, offset, length = (np.fromiter(chain.from_iterable(each), np.int64) for each in (shapes, offsets, lengths))
    if (offset > shape - length).any():  # all are counts, so that nothing overflows
        raise NotPlain


def _exactly(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Raises NotPlain."""
    try:
        found = decoder.decode(data)
        again = _encode(found)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise NotPlain from None
    if again != data:
        raise NotPlain
    return found
