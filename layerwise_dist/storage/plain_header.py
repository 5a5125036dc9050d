# SPDX-License-Identifier: Apache-2.0
"""Headers as our writer writes them, read some times faster than by the check in `header`, which defines what a header
is: what is taken here it would take, and for the same. All else is left to it.

All of it is plain JSON (`plain`), and what many headers of a job have alike is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import msgspec
import numpy as np
from msgspec import Struct

from layerwise_dist.storage import strict_json
from layerwise_dist.storage.entries import Entries
from layerwise_dist.storage.plain import Count, Counts, NotPlain, exactly
from layerwise_dist.storage.plain_places import RecentPlaces
from layerwise_dist.storage.shard_layout import PAD, STATE_BYTES, STATE_JSON
from layerwise_dist.tensors.slices import ITEM_BYTES, LONGEST_NAME

_BEGIN, _BETWEEN = b'{"__metadata__":', b'"},"'


class _Tensor(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Its members are in the order in which they are written."""

    dtype: str
    shape: Counts
    data_offsets: tuple[Count, Count]


_texts = msgspec.json.Decoder(dict[str, str])
_tensors = msgspec.json.Decoder(dict[str, _Tensor])


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
    """Of the last header what it says of tensors: on many ranks of a job that is one text, and says the same."""

    def __init__(self) -> None:
        self.text = b""
        self.columns: _Columns | None = None
        self.places = RecentPlaces()


class Plain:
    """The JSON of one header, without its padding.

    Attributes:
        metadata: its strings, otherwise unchecked.
    """

    def __init__(self, data: bytes, recent: Recent) -> None:
        """Raises NotPlain."""
        if strict_json.too_heavy(data):
            raise NotPlain
        data = data.rstrip(b" ")
        # Within a string there is a backslash in front of each quote. Where a string ends in `"},` this is another
        # place: then neither part is the JSON that it should be.
        end = data.find(_BETWEEN) + 2
        if not data.startswith(_BEGIN) or end < len(_BEGIN):
            raise NotPlain
        self.metadata = exactly(_texts, data[len(_BEGIN) : end])
        text = b"{" + data[end + 1 :]
        if recent.columns is None or text != recent.text:
            recent.columns = None
            recent.columns, recent.text = _columns(exactly(_tensors, text)), text
        self._columns, self._recent = recent.columns, recent

    def entries(self, base: int, rank: int, world_size: int) -> tuple[Entries, dict[str, tuple[int, int]], int]:
        """(tensors, ranges of the state's two parts, where the last one ends after the header). Raises NotPlain, and
        ValueError for ranks that are none.
        """
        of = self._columns
        text = self.metadata.get("slices", "").encode()
        cuts, numbers = self._recent.places.read(text, of.number, of.lengths, rank, world_size)
        entries = Entries(
            of.names, of.number, of.dtypes, of.lengths, of.begins + base, of.ends + base, cuts.shapes, cuts.among,
            cuts.wrapped, cuts.flat, numbers, cuts.firsts,
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
