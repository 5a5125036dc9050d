# SPDX-License-Identifier: Apache-2.0
"""The shard file: where each byte goes, and the header that says so (docs/format.md).

A shard is a safetensors file. Its header region is a multiple of 4096 bytes (JSON padded with spaces), so that the
data can go out by direct I/O while the header, which holds the hashes of the data, is written last.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.storage import strict_json
from layerwise_dist.tensors.slices import DIMENSIONS, LONGEST_NAME, Slice

FORMAT = "layerwise-shard-1"
ALIGN = 4096
HEADER_CAP = 64 << 20
BLOCK_CAP = 64 << 20
LAYERS = 1 << 17  # of one shard, at most
PACK_BELOW = 16 << 10
UNHASHED = "none"
STATE_JSON = "state/json"
STATE_BYTES = "state/bytes"
PAD = ".pad/"
_PACK_ALIGN = 64
_OTHER_WEIGHT = 1 << 20  # of what is in a header beside the entries of tensors
_FIXED_ROOM = 2048  # the fields of __metadata__ that are neither tables nor hashes, and the entries of the state extent


def round_up(value: int, to: int) -> int:
    return -(-value // to) * to


# Of what lies in the file: name, dtype, shape, begin, end, and the number of the tensor, -1 for what is none.
_Placed = tuple[str, str, tuple[int, ...], int, int, int]


@dataclass(frozen=True, slots=True)
class Source:
    """A slice and the congruence of its memory: `address_mod` is the address modulo `memory_align`, or 0 for a copy."""

    slice: Slice
    address_mod: int = 0
    wrapped: bool = False


@dataclass(frozen=True, slots=True)
class Extent:
    """A layer's place in the file: an aligned range, and the blocks (indices) that cover it."""

    layer: str
    offset: int
    nbytes: int
    first_block: int
    blocks: int


@dataclass
class ShardLayout:
    """The static layout of one rank's shard, made once and used for every step until a tensor comes, goes or moves.

    `blocks` are (file offset, length); `segments` are (block, offset in block, tensor, offset in tensor, length), all
    in bytes; tensors are numbered in the order of `layers`. A tensor of 16 KiB or more starts at a file offset that
    is congruent to its address, so that its interior can be written without a copy; smaller ones are packed.
    """

    layers: Sequence[tuple[str, Sequence[Source]]]
    memory_align: int
    block_bytes: int
    extents: list[Extent] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    segments: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    header_bytes: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        self._check_names()
        spans, data_bytes = self._place()
        self._tables = self._static_tables()
        entries = _entry_text(spans)
        blocks = sum(-(-extent.nbytes // self.block_bytes) for extent in self.extents)
        # In bytes, as the file has it: a table is a string within JSON, so that its quotes are escaped once more.
        room = len(entries.encode()) + sum(len(_compact(table).encode()) for table in self._tables.values())
        self.header_bytes = round_up(8 + room + 16 * (blocks + 1) + _FIXED_ROOM, ALIGN)
        if self.header_bytes > HEADER_CAP:
            raise UnsupportedError(
                f"the header of this rank's shard would take {self.header_bytes} bytes for {len(spans)} tensors; "
                f"the format allows {HEADER_CAP}: spread the model over more ranks"
            )
        needed = max(map(strict_json.weight, (entries, *self._tables.values())))
        if needed > strict_json.WEIGHT_CAP - _OTHER_WEIGHT:
            raise UnsupportedError(
                f"this rank's shard would have {len(spans)} tensors: a reader would need about {needed >> 20} MB of "
                f"memory for their names and places, at most {strict_json.WEIGHT_CAP >> 20} are allowed: spread the "
                "model over more ranks"
            )
        self._entries = entries
        self.end = self.header_bytes + data_bytes
        self._cut(spans)

    @property
    def tensors(self) -> int:
        return sum(len(sources) for _, sources in self.layers)

    @property
    def data_bytes(self) -> int:
        return self.end - self.header_bytes

    def _check_names(self) -> None:
        """No reader takes a header with a name twice, and who reads a name must not get another tensor."""
        names = [source.slice.name for _, sources in self.layers for source in sources]
        shapes = {source.slice.name: source.slice.global_shape for _, sources in self.layers for source in sources}
        problems = {
            f"names of more than {LONGEST_NAME} characters": [n[:100] for n in names if len(n) > LONGEST_NAME],
            f"shapes of more than {DIMENSIONS} dimensions": [n for n in shapes if len(shapes[n]) > DIMENSIONS],
            f"more than {LAYERS} layers": [str(len(self.layers))] if len(self.layers) > LAYERS else [],
            "names of the format itself": [n for n in names if n in (STATE_JSON, STATE_BYTES) or n.startswith(PAD)],
            "names that appear twice": [name for name, times in Counter(names).items() if times > 1],
            "names that are not valid Unicode": [n for n in names if n.encode(errors="ignore").decode() != n],
        }
        if said := [f"{problem}: {found[:5]}" for problem, found in problems.items() if found]:
            raise UnsupportedError(f"this rank's shard would have {'; '.join(said)}; nothing was written")

    def _place(self) -> tuple[list[_Placed], int]:
        """Spans (name, dtype, shape, begin, end, tensor or -1 for padding), offsets relative to the data's begin."""
        spans: list[_Placed] = []
        cursor = tensor = pads = 0

        def pad_to(offset: int) -> None:
            nonlocal cursor, pads
            if offset > cursor:
                spans.append((f"{PAD}{pads}", "U8", (offset - cursor,), cursor, offset, -1))
                pads += 1
                cursor = offset

        for name, sources in self.layers:
            begin = cursor
            for source in sources:
                nbytes = source.slice.nbytes
                if nbytes >= PACK_BELOW:
                    pad_to(cursor + (source.address_mod - cursor) % self.memory_align)
                else:
                    pad_to(round_up(cursor, _PACK_ALIGN))
                part = source.slice
                spans.append((part.name, part.dtype, part.local_shape, cursor, cursor + nbytes, tensor))
                cursor += nbytes
                tensor += 1
            pad_to(round_up(cursor, ALIGN))
            self.extents.append(Extent(name, begin, cursor - begin, 0, 0))
        self._pads = pads
        return spans, cursor

    def _static_tables(self) -> dict[str, str]:
        places: dict[str, dict[str, object]] = {}
        for _, sources in self.layers:
            for source in sources:
                part = source.slice
                place: dict[str, object] = {}
                if part.is_flat:
                    place = {"shape": list(part.global_shape), "start": part.start}
                elif not part.is_whole:
                    place = {"shape": list(part.global_shape), "offsets": list(part.offsets or ())}
                if part.among:
                    place["among"] = part.among
                if source.wrapped:
                    place["wrapped"] = True
                if place:
                    places[part.name] = place
        extents = [[extent.layer, extent.offset, extent.nbytes] for extent in self.extents]
        return {"slices": _compact(places), "layers": _compact(extents)}

    def _cut(self, spans: list[_Placed]) -> None:
        base = self.header_bytes
        extents = []
        for extent in self.extents:
            first = len(self.blocks)
            offset, end = base + extent.offset, base + extent.offset + extent.nbytes
            while offset < end:
                length = min(self.block_bytes, end - offset)
                self.blocks.append((offset, length))
                offset += length
            extents.append(Extent(extent.layer, base + extent.offset, extent.nbytes, first, len(self.blocks) - first))
        self.extents = extents
        self.segments = cut_segments(
            self.blocks, ((base + begin, base + end, tensor) for _, _, _, begin, end, tensor in spans if tensor >= 0)
        )

    def header(
        self,
        *,
        attempt: str,
        step: int,
        rank: int,
        world_size: int,
        hashes: str | None,
        state: tuple[int, int],
        state_hash: str,
    ) -> bytes:
        """The header region: 8-byte little-endian length, JSON, spaces up to `header_bytes`.

        `hashes` holds sixteen hexadecimal digits a block of the layers, None if they were not hashed; `state` the
        lengths (bytes) of the two parts of the state extent, which starts at `end`; `state_hash` is its XXH3-64.
        """
        metadata = {
            "format": FORMAT,
            "attempt": attempt,
            "step": str(step),
            "rank": str(rank),
            "world_size": str(world_size),
            "block_bytes": str(self.block_bytes),
            "state_hash": state_hash,
            "hashes": hashes or "",
            **({"hash": UNHASHED} if hashes is None else {}),
            **self._tables,
        }
        tail = _entry_text(state_spans(self.data_bytes, *state, self._pads))
        text = (
            '{"__metadata__":'
            + _compact(metadata)
            + "".join("," + part for part in (self._entries, tail) if part)
            + "}"
        )
        data = text.encode("utf-8")
        room = self.header_bytes - 8
        if len(data) > room:
            raise UnsupportedError(f"the shard's header needs {len(data)} bytes and has room for {room}")
        return room.to_bytes(8, "little") + data.ljust(room)


def cut_segments(
    blocks: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int, int]]
) -> list[tuple[int, int, int, int, int]]:
    """Cuts spans (begin, end, tensor), ascending and without overlap, at the borders of the blocks that hold them."""
    starts = [offset for offset, _ in blocks]
    segments = []
    for begin, end, tensor in spans:
        cursor = begin
        index = bisect_right(starts, begin) - 1
        while cursor < end:
            offset, length = blocks[index]
            if cursor >= offset + length:
                index += 1
                continue
            take = min(end, offset + length) - cursor
            segments.append((index, cursor - offset, tensor, cursor - begin, take))
            cursor += take
    return segments


def state_spans(begin: int, text: int, blob: int, pads: int) -> list[_Placed]:
    """The spans of the state extent, which starts at `begin`, relative to the data: JSON, padding, bytes, padding."""
    spans: list[_Placed] = [(STATE_JSON, "U8", (text,), begin, begin + text, -1)]
    middle = begin + round_up(text, _PACK_ALIGN)
    if middle > begin + text:
        spans.append((f"{PAD}{pads}", "U8", (middle - begin - text,), begin + text, middle, -1))
    spans.append((STATE_BYTES, "U8", (blob,), middle, middle + blob, -1))
    end = begin + round_up(middle + blob - begin, ALIGN)
    if end > middle + blob:
        spans.append((f"{PAD}{pads + 1}", "U8", (end - middle - blob,), middle + blob, end, -1))
    return spans


def state_extent(text: bytes, blob: bytes) -> bytes:
    """The bytes of the state extent, a multiple of 4096 long."""
    middle = round_up(len(text), _PACK_ALIGN)
    return (text.ljust(middle, b"\0") + blob).ljust(round_up(middle + len(blob), ALIGN), b"\0")


def _entry_text(spans: Iterable[_Placed]) -> str:
    return ",".join(
        f'{_compact(name)}:{{"dtype":"{dtype}","shape":{_compact(list(shape))},"data_offsets":[{begin},{end}]}}'
        for name, dtype, shape, begin, end, _ in spans
    )


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
