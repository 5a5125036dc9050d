# SPDX-License-Identifier: Apache-2.0
"""The header of a shard, checked: every member, size, offset and name before it is used, every length before something
of that length is made.
"""

from __future__ import annotations

import math
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from layerwise_dist.errors import DamageError
from layerwise_dist.storage import filenames, strict_json
from layerwise_dist.storage.entries import Entries, Entry
from layerwise_dist.storage.plain_header import Plain, Recent
from layerwise_dist.storage.schemas import HEX16, Schema, Unfit, fits
from layerwise_dist.storage.shard_layout import ALIGN, BLOCK_CAP, FORMAT, LAYERS, PAD, STATE_BYTES, STATE_JSON, UNHASHED
from layerwise_dist.tensors.slices import DIMENSIONS, ITEM_BYTES, LONGEST_NAME, Slice, ranks_of

_LONGEST_LAYER = 2 * LONGEST_NAME + len(" to ")
_PLACE = {"shape", "offsets", "start", "among", "wrapped"}
_TENSOR = {"dtype", "shape", "data_offsets"}
_TOO_LARGE = 1 << 63

Digits = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,17})$")]


class _Metadata(Schema):
    """All values are strings: that is safetensors' rule."""

    format: Literal["layerwise-shard-1"]
    attempt: str = Field(pattern=HEX16)
    step: Digits
    rank: Digits
    world_size: Digits
    block_bytes: Digits
    state_hash: str = Field(pattern=HEX16)
    hashes: str = Field(pattern=r"^[0-9a-f]*$")
    hash: Literal["none"] | None = None
    slices: str
    layers: str


class Blocks(Sequence[tuple[int, int]]):
    """(offset, length) of each block of the layers, as they follow each other; none of them is kept."""

    def __init__(self, layers: Sequence[tuple[str, int, int]], block_bytes: int) -> None:
        self._layers = [(offset, nbytes) for _, offset, nbytes in layers if nbytes]
        self._offsets = [offset for offset, _ in self._layers]
        self.block_bytes = block_bytes
        self._firsts: list[int] = []
        self._count = 0
        for _, nbytes in self._layers:
            self._firsts.append(self._count)
            self._count += -(-nbytes // block_bytes)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        place = bisect_right(self._firsts, number) - 1
        offset, nbytes = self._layers[place]
        inside = (number - self._firsts[place]) * self.block_bytes
        return offset + inside, min(self.block_bytes, nbytes - inside)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for offset, nbytes in self._layers:
            for inside in range(0, nbytes, self.block_bytes):
                yield offset + inside, min(self.block_bytes, nbytes - inside)

    def at(self, offset: int) -> int:
        """The number of the block that has this byte. REQUIRES: a block has it."""
        place = bisect_right(self._offsets, offset) - 1
        return self._firsts[place] + (offset - self._layers[place][0]) // self.block_bytes

    @cached_property
    def _table(self) -> np.ndarray:
        """int64, of each layer where it begins, its bytes, and its first block's number."""
        rows = [(*layer, first) for layer, first in zip(self._layers, self._firsts, strict=True)]
        return np.array(rows, dtype=np.int64).reshape(-1, 3).T

    def having(self, offsets: np.ndarray) -> np.ndarray:
        """As `at`, of many bytes. int64."""
        begins, _, firsts = self._table
        place = np.searchsorted(begins, offsets, side="right") - 1
        return firsts[place] + (offsets - begins[place]) // self.block_bytes

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and lengths of many blocks, int64. REQUIRES: there are all of them."""
        begins, sizes, firsts = self._table
        place = np.searchsorted(firsts, numbers, side="right") - 1
        inside = (numbers - firsts[place]) * self.block_bytes
        return begins[place] + inside, np.minimum(self.block_bytes, sizes[place] - inside)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A header, checked. Offsets are absolute in the file, in bytes.

    `hashes` has one number a block of `blocks`: None for each if the writer was told not to hash.
    """

    path: str
    size: int
    attempt: str
    step: int
    rank: int
    world_size: int
    entries: Entries
    layers: list[tuple[str, int, int]]
    blocks: Blocks
    hashes: Sequence[int | None]
    state_json: tuple[int, int]
    state_bytes: tuple[int, int]
    state_hash: int

    @property
    def hashed(self) -> bool:
        """Whether the layers' contents can be verified; the header and the state always can."""
        return not self.hashes or self.hashes[0] is not None

    @property
    def state_range(self) -> tuple[int, int]:
        return self.state_json[0], self.size


def parse_header(
    path: str, size: int, header: bytes, expected: tuple[str, int, int] | None = None, recent: Recent | None = None
) -> ShardIndex:
    """Checks a whole header region (8 length bytes and the JSON). `expected` are the attempt, the rank and the world
    size that it must be of; `recent` is given with all headers of a job that are read one after another. Raises
    DamageError.
    """

    def bad(what: object) -> DamageError:
        return DamageError(f"shard {path}: {what}")

    if len(header) < 8 or len(header) % ALIGN:
        raise bad(f"its header region is {len(header)} bytes, expected a multiple of {ALIGN}")
    if int.from_bytes(header[:8], "little") != len(header) - 8:
        raise bad("its length field does not match its header region")
    if (plain := _plain_index(path, size, header, expected, recent or Recent())) is not None:
        return plain
    try:
        tree = strict_json.loads(header[8:])
    except ValueError as error:
        raise bad(f"its header is not JSON: {error}") from None
    if type(tree) is not dict or type(tree.get("__metadata__")) is not dict:
        raise bad("its header has no __metadata__ object")
    try:
        metadata = tree.pop("__metadata__")
        return _index(path, size, len(header), metadata, expected, lambda slices, *of: _tensors(tree, slices, *of))
    except (Unfit, ValueError) as error:
        raise bad(f"its header is malformed: {error}") from None


def _plain_index(
    path: str, size: int, header: bytes, expected: tuple[str, int, int] | None, recent: Recent
) -> ShardIndex | None:
    """None for what our writer would not have written, or is wrong: the check that follows says in which way."""
    with suppress(Unfit, ValueError):
        plain = Plain(header[8:], recent)
        return _index(path, size, len(header), plain.metadata, expected, lambda _, *of: plain.entries(*of))
    return None


def _index(
    path: str, size: int, base: int, said: dict[str, Any], expected: tuple[str, int, int] | None,
    tensors: Callable[[str, int, int, int], _Tensors],
) -> ShardIndex:  # fmt: skip
    if (its := said.get("format")) != FORMAT:
        raise ValueError(f"its format is {ascii(its)[:100]}, this version reads {FORMAT!r}")
    metadata = fits(_Metadata, said, "__metadata__")
    rank, world_size, step = int(metadata.rank), int(metadata.world_size), int(metadata.step)
    if not rank < world_size <= filenames.RANKS_END:
        raise ValueError(f"it is of rank {rank} of {world_size}")
    found = (metadata.attempt, rank, world_size)
    if expected is not None and found != expected:
        raise ValueError(
            f"it is of attempt {found[0]}, rank {rank} of {world_size}; the manifest is of attempt {expected[0]}, rank "
            f"{expected[1]} of {expected[2]}"
        )
    block_bytes = int(metadata.block_bytes)
    if block_bytes % ALIGN or not 0 < block_bytes <= BLOCK_CAP:
        raise ValueError(f"blocks of {block_bytes} bytes; expected a multiple of {ALIGN}, at most {BLOCK_CAP}")
    entries, special, end = tensors(metadata.slices, base, rank, world_size)
    if base + end != size:
        raise ValueError(f"it describes {base + end} bytes, the file has {size}")
    if special.keys() != {STATE_JSON, STATE_BYTES}:
        raise ValueError(f"it has no {STATE_JSON} or no {STATE_BYTES}")
    text, blob = special[STATE_JSON], special[STATE_BYTES]
    last = int(entries.ends.max(initial=base))
    if not last <= text[0] <= text[1] <= blob[0]:
        raise ValueError(f"tensors end at {last}, the state begins at {text[0]} and its bytes at {blob[0]}")
    layers = _layers(strict_json.loads_text(metadata.layers), base, text[0])
    blocks = Blocks(layers, block_bytes)
    if 16 * len(blocks) > base:
        raise ValueError(f"{len(blocks)} blocks; the hashes of all would not fit into {base} bytes")
    return ShardIndex(
        path, size, metadata.attempt, step, rank, world_size, entries, layers, blocks,
        _hashes(metadata, len(blocks)), text, blob, int(metadata.state_hash, 16),
    )  # fmt: skip


# Tensors, ranges of the state's two parts, where the last one ends after the header.
_Tensors = tuple[Entries, dict[str, tuple[int, int]], int]


def _tensors(tree: dict[str, Any], slices: str, base: int, rank: int, world_size: int) -> _Tensors:
    """Takes `tree` apart."""
    places = strict_json.loads_text(slices)
    if type(places) is not dict:
        raise ValueError("slices is not an object")
    for name, item in tree.items():
        _check_tensor(name, item)
    groups: set[str] = {""}  # of ranks, that were looked at
    entries: dict[str, Entry] = {}
    special: dict[str, tuple[int, int]] = {}
    cursor = 0
    for name in sorted(tree, key=lambda name: tuple(tree[name]["data_offsets"])):
        item = tree.pop(name)
        (begin, end), shape, dtype = item["data_offsets"], tuple(item["shape"]), item["dtype"]
        if begin != cursor or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"tensor {name} at {begin} to {end} leaves a hole, overlaps, or does not fit its shape")
        cursor = end
        if base + end >= _TOO_LARGE:
            raise ValueError(f"tensor {name} ends at {base + end}, no file is that long")
        if name in (STATE_JSON, STATE_BYTES):
            special[name] = (base + begin, base + end)
        elif not name.startswith(PAD):
            place = _checked_place(name, places.pop(name, {}))
            among = place.get("among", "")
            if among not in groups:
                if rank not in ranks_of(among, world_size):
                    raise ValueError(f"tensor {name}: ranks {among} hold it, and this is rank {rank}")
                groups.add(among)
            part = _slice(name, dtype, shape, place)
            entries[name] = Entry(part, base + begin, base + end, bool(place.get("wrapped")))
    if places:
        raise ValueError(f"places of tensors that are not there: {', '.join(sorted(places)[:3])}")
    return Entries.of(entries.values()), special, cursor


def _check_tensor(name: str, item: Any) -> None:
    if type(item) is not dict or item.keys() != _TENSOR:
        found = sorted(item)[:5] if type(item) is dict else type(item).__name__
        raise ValueError(f"tensor {name[:200]} has {found}, expected {sorted(_TENSOR)}")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if type(dtype) is not str or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name[:200]} is of dtype {ascii(dtype)[:100]}; known are {', '.join(ITEM_BYTES)}")
    if not (_are_counts(shape) and len(shape) <= DIMENSIONS and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name[:200]}: its shape or its data_offsets are not")
    kind, slash, fqn = name.partition("/")
    special = name in (STATE_JSON, STATE_BYTES) or name.startswith(PAD)
    if len(name) > LONGEST_NAME or not (special or (kind and slash and fqn and kind != "state")):
        raise ValueError(f"{name[:200]} is not a tensor name: <kind>/<name>, of at most {LONGEST_NAME} characters")
    if special and dtype != "U8":
        raise ValueError(f"{name} is of dtype {dtype}, expected U8")


def _are_counts(value: Any) -> bool:
    if type(value) is not list:
        return False
    for each in value:  # a million times in a large job: a generator would take three times as long
        if type(each) is not int or not 0 <= each < _TOO_LARGE:
            return False
    return True


def _checked_place(name: str, place: Any) -> dict[str, Any]:
    where = ("shape" in place) + ("offsets" in place or "start" in place) if type(place) is dict else -1
    if where not in (0, 2) or not place.keys() <= _PLACE or ("offsets" in place and "start" in place):
        found = sorted(place)[:6] if type(place) is dict else type(place).__name__
        raise ValueError(f"slices: {name} has {found}; expected a shape with offsets or a start, or neither")
    shape, offsets, start = place.get("shape", []), place.get("offsets", []), place.get("start", 0)
    good = _are_counts(shape) and len(shape) <= DIMENSIONS and _are_counts(offsets) and _are_counts([start])
    among, wrapped = place.get("among", "0"), place.get("wrapped", True)
    if not good or type(among) is not str or not among or wrapped is not True:
        raise ValueError(f"slices: {name}: shape, offsets, start, among or wrapped is not")
    return place


def _slice(name: str, dtype: str, shape: tuple[int, ...], place: dict[str, Any]) -> Slice:
    kind, fqn = name.split("/", 1)
    among = place.get("among", "")
    if "shape" not in place:
        return Slice.whole(kind, fqn, dtype, shape, among)
    whole = tuple(place["shape"])
    if "start" in place:
        if len(shape) != 1 or place["start"] + shape[0] > math.prod(whole):
            raise ValueError(f"tensor {name}: range outside its global tensor")
        return Slice(kind, fqn, dtype, whole, start=place["start"], length=shape[0], among=among)
    offsets = tuple(place["offsets"])
    if not len(offsets) == len(shape) == len(whole):
        raise ValueError(f"tensor {name}: offsets of another number of dimensions")
    if any(o + n > g for o, n, g in zip(offsets, shape, whole, strict=True)):
        raise ValueError(f"tensor {name}: box outside its global tensor")
    return Slice(kind, fqn, dtype, whole, offsets=offsets, lengths=shape, among=among)


def _layers(table: Any, base: int, end: int) -> list[tuple[str, int, int]]:
    if type(table) is not list or len(table) > LAYERS:
        raise ValueError(f"layers is not an array of at most {LAYERS}")
    layers = []
    cursor = base
    for row in table:
        if type(row) is not list or len(row) != 3 or type(row[0]) is not str or not _are_counts(row[1:]):
            raise ValueError(f"layer {ascii(row)[:100]}: expected [name, offset, bytes]")
        name, offset, nbytes = row
        if len(name) > _LONGEST_LAYER or base + offset != cursor or nbytes % ALIGN:
            raise ValueError(f"layer {name[:200]} at {offset}, {nbytes} bytes")
        if cursor + nbytes > end:
            raise ValueError(f"layer {name} reaches past the layers' end")
        layers.append((name, cursor, nbytes))
        cursor += nbytes
    if cursor != end:
        raise ValueError(f"the layers end at {cursor}, the state begins at {end}")
    return layers


def _hashes(metadata: _Metadata, blocks: int) -> Sequence[int | None]:
    digits = len(metadata.hashes)
    unhashed = metadata.hash == UNHASHED
    if digits != (0 if unhashed else 16 * blocks):
        raise ValueError(f"{digits} digits of hashes for {blocks} blocks")
    if unhashed:
        return [None] * blocks
    found = array("Q", bytes.fromhex(metadata.hashes))
    if sys.byteorder == "little":
        found.byteswap()
    return found
