"""Reads shards and trusts nothing: every size, offset and name of a header is checked before it is used.

A file that is not what was committed is a `DamageError` that names file, tensor and block. An operating system's
error (EIO, no permission) is an OSError: the disk is in trouble, and nothing is said about the bytes.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from layerwise_dist import _native
from layerwise_dist.errors import DamageError
from layerwise_dist.slices import ITEM_BYTES, Slice, ranks_of
from layerwise_dist.storage.odd import oddity
from layerwise_dist.storage.shard import ALIGN, FORMAT, HEADER_CAP, STATE_BYTES, STATE_JSON, UNHASHED, cut_segments


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard: its slice, and the byte range in the file."""

    slice: Slice
    begin: int
    end: int
    wrapped: bool


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
    entries: dict[str, Entry]
    layers: list[tuple[str, int, int]]
    blocks: list[tuple[int, int]]
    hashes: list[int | None]
    state_json: tuple[int, int]
    state_bytes: tuple[int, int]
    state_hash: int

    @property
    def hashed(self) -> bool:
        """Whether the layers' contents can be verified; the header and the state always can."""
        return None not in self.hashes

    @property
    def state_range(self) -> tuple[int, int]:
        return self.state_json[0], self.size


def parse_header(path: str, size: int, header: bytes) -> ShardIndex:
    """Checks a whole header region (8 length bytes and the JSON). Raises DamageError."""

    def bad(what: str) -> DamageError:
        return DamageError(f"shard {path}: {what}")

    if len(header) < 8 or len(header) % ALIGN:
        raise bad(f"its header region is {len(header)} bytes, expected a multiple of {ALIGN}")
    if int.from_bytes(header[:8], "little") != len(header) - 8:
        raise bad("its length field does not match its header region")
    try:
        tree = json.loads(header[8:].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is not JSON: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("__metadata__"), dict):
        raise bad("its header has no __metadata__ object")
    try:
        return _index(path, size, len(header), tree)
    except DamageError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise bad(f"its header is malformed: {type(error).__name__}: {error}") from None


def _index(path: str, size: int, base: int, tree: dict[str, Any]) -> ShardIndex:
    metadata = tree.pop("__metadata__")
    if metadata["format"] != FORMAT:
        raise DamageError(f"shard {path}: format {metadata['format']!r}, this version reads {FORMAT!r}")
    places = json.loads(metadata["slices"], object_pairs_hook=_no_duplicates)
    block_bytes = _count(metadata["block_bytes"])
    if block_bytes % ALIGN or block_bytes == 0:
        raise ValueError(f"block_bytes {block_bytes}")
    rank, world_size = _count(metadata["rank"]), _count(metadata["world_size"])
    groups: set[str] = {""}  # of ranks, that were looked at
    entries: dict[str, Entry] = {}
    special: dict[str, tuple[int, int]] = {}
    cursor = 0
    for name, item in sorted(tree.items(), key=lambda pair: tuple(pair[1]["data_offsets"])):
        begin, end = item["data_offsets"]
        shape = tuple(item["shape"])
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise ValueError(f"tensor {name}: offsets and shape must be whole numbers")
        if begin != cursor or end - begin != math.prod(shape) * ITEM_BYTES[item["dtype"]]:
            raise ValueError(f"tensor {name} at {begin} to {end} leaves a hole, overlaps, or does not fit its shape")
        cursor = end
        if name in (STATE_JSON, STATE_BYTES):
            special[name] = (base + begin, base + end)
        elif not name.startswith(".pad/"):
            place = places.pop(name, {})
            among = place.get("among", "")
            if among not in groups:
                if type(among) is not str or rank not in ranks_of(among, world_size):
                    raise ValueError(f"tensor {name}: ranks {among} hold it, and this is rank {rank}")
                groups.add(among)
            entries[name] = Entry(
                _slice(name, item["dtype"], shape, place), base + begin, base + end, bool(place.get("wrapped"))
            )
    if base + cursor != size:
        raise DamageError(f"shard {path}: is {size} bytes long, its header describes {base + cursor}")
    if places:
        raise ValueError(f"places of tensors that are not there: {sorted(places)[:3]}")
    layers, blocks = _layers(json.loads(metadata["layers"]), base, block_bytes, special[STATE_JSON][0])
    hashes = _hashes(metadata["hashes"], metadata.get("hash"), len(blocks))
    return ShardIndex(
        path, size, metadata["attempt"], _count(metadata["step"]), rank, world_size,
        entries, layers, blocks, hashes, special[STATE_JSON], special[STATE_BYTES], int(metadata["state_hash"], 16),
    )  # fmt: skip


def _layers(
    table: Any, base: int, block_bytes: int, end: int
) -> tuple[list[tuple[str, int, int]], list[tuple[int, int]]]:
    layers, blocks = [], []
    cursor = base
    for name, offset, nbytes in table:
        if type(name) is not str or base + offset != cursor or type(nbytes) is not int or nbytes < 0 or nbytes % ALIGN:
            raise ValueError(f"layer {name!r} at {offset}, {nbytes} bytes")
        if cursor + nbytes > end:
            raise ValueError(f"layer {name!r} reaches past the layers' end")
        layers.append((name, cursor, nbytes))
        for start in range(cursor, cursor + nbytes, block_bytes):
            blocks.append((start, min(block_bytes, cursor + nbytes - start)))
        cursor += nbytes
    if cursor != end:
        raise ValueError(f"the layers end at {cursor}, the state begins at {end}")
    return layers, blocks


def _hashes(text: str, kind: str | None, blocks: int) -> list[int | None]:
    if kind not in (None, UNHASHED):
        raise ValueError(f"hash {kind!r}; this version knows {UNHASHED!r} and XXH3-64, which has no name here")
    if len(text) != (16 * blocks if kind is None else 0):
        raise ValueError(f"{len(text)} digits of hashes for {blocks} blocks")
    if kind is not None:
        return [None] * blocks
    return [int(text[i : i + 16], 16) for i in range(0, len(text), 16)]


def _slice(name: str, dtype: str, shape: tuple[int, ...], place: dict[str, Any]) -> Slice:
    kind, fqn = name.split("/", 1)
    among = place.get("among", "")
    if "shape" not in place:
        return Slice.whole(kind, fqn, dtype, shape, among)
    whole = tuple(place["shape"])
    if "start" in place:
        (length,) = shape
        start = place["start"]
        if start < 0 or start + length > math.prod(whole):
            raise ValueError(f"tensor {name}: range outside its global tensor")
        return Slice(kind, fqn, dtype, whole, start=start, length=length, among=among)
    offsets = tuple(place["offsets"])
    if not len(offsets) == len(shape) == len(whole):
        raise ValueError(f"tensor {name}: offsets of another number of dimensions")
    if any(o < 0 or o + n > g for o, n, g in zip(offsets, shape, whole, strict=True)):
        raise ValueError(f"tensor {name}: box outside its global tensor")
    return Slice(kind, fqn, dtype, whole, offsets=offsets, lengths=shape, among=among)


def _count(text: str) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name appears twice")
    return tree


class Shard:
    """One open shard whose header was read and checked against the manifest's size and hash."""

    def __init__(self, env: Any, pool: Any, path: str, *, nbytes: int, header_bytes: int, header_hash: int) -> None:
        """Raises DamageError (missing, cut, other header) or OSError."""
        if header_bytes > HEADER_CAP:
            raise DamageError(f"shard {path}: a header of {header_bytes} bytes is over the format's {HEADER_CAP}")
        try:
            self._reader = _native.ShardReader(env, pool, path)
        except FileNotFoundError:
            raise DamageError(f"shard {path}: the file is missing") from None
        except OSError as error:
            if (what := oddity(error, path)) is not None:
                raise DamageError(f"shard {what}") from None
            raise
        if self._reader.size != nbytes:
            raise DamageError(f"shard {path}: is {self._reader.size} bytes long, the manifest says {nbytes}")
        header = self._reader.read(0, header_bytes)
        if len(header) != header_bytes or _native.xxh3_64(header) != header_hash:
            raise DamageError(f"shard {path}: its header hashes otherwise than the manifest says ({header_hash:016x})")
        self.index = parse_header(path, nbytes, header)

    def state(self) -> tuple[bytes, bytes]:
        """(typed JSON, its bytes), verified. Raises DamageError or OSError."""
        index = self.index
        begin, end = index.state_range
        data = self._reader.read(begin, end - begin)
        if len(data) != end - begin or _native.xxh3_64(data) != index.state_hash:
            raise DamageError(
                f"shard {index.path} of step {index.step}: the state block hashes otherwise than "
                f"{index.state_hash:016x}"
            )
        text, blob = index.state_json, index.state_bytes
        return data[text[0] - begin : text[1] - begin], data[blob[0] - begin : blob[1] - begin]

    def read_into(self, spans: list[tuple[int, int, int]]) -> None:
        """Copies byte ranges (begin, end, memory address) of the file out; every hashed block touched is verified
        first.

        Nothing of a bad block is copied, but other blocks may have been when DamageError is raised.
        REQUIRES: ranges lie in the layers, and the memory stays alive and unshared until the call returns.
        """
        index = self.index
        ordered = sorted(spans)
        starts = [offset for offset, _ in index.blocks]
        touched: dict[int, int] = {}
        for begin, end, _ in ordered:
            if end > begin:
                for block in range(bisect_right(starts, begin) - 1, bisect_right(starts, end - 1)):
                    touched.setdefault(block, len(touched))
        blocks = [(*index.blocks[block], index.hashes[block]) for block in touched]
        ranges = [(offset, length) for offset, length, _ in blocks]
        segments = [(b, o, address + t, n) for b, o, address, t, n in cut_segments(ranges, ordered)]
        bad = self._reader.read_blocks(blocks, segments)
        if bad:
            numbers = list(touched)
            raise DamageError("; ".join(self.describe(numbers[block]) for block in bad[:5]))

    def verify(self) -> list[str]:
        """Reads everything; returns one message a bad block (empty: as committed, where it is hashed).

        Raises OSError.
        """
        index = self.index
        blocks = [(*block, expected) for block, expected in zip(index.blocks, index.hashes, strict=True)]
        messages = [self.describe(block) for block in self._reader.read_blocks(blocks, [])]
        try:
            self.state()
        except DamageError as error:
            messages.append(str(error))
        return messages

    def describe(self, block: int) -> str:
        offset, length = self.index.blocks[block]
        held = {name: min(e.end, offset + length) - max(e.begin, offset) for name, e in self.index.entries.items()}
        # The most likely first: what has most of the block.
        names = sorted((name for name, nbytes in held.items() if nbytes > 0), key=lambda name: -held[name])
        what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "padding"
        expected = self.index.hashes[block]
        problem = "is cut" if expected is None else f"hashes otherwise than the header says ({expected:016x})"
        return f"shard {self.index.path} of step {self.index.step}: block {block} at offset {offset} ({what}) {problem}"
