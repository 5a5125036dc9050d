# SPDX-License-Identifier: Apache-2.0
"""Reads shards and trusts nothing: every size, offset and name of a header is checked before it is used.

A file that is not what was committed is a `DamageError` that names file, tensor and block. An operating system's
error (EIO, no permission) is an OSError: the disk is in trouble, and nothing is said about the bytes.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from layerwise_dist import _native
from layerwise_dist.errors import DamageError, named, shown
from layerwise_dist.storage.entries import Entry
from layerwise_dist.storage.header import Blocks, ShardIndex, parse_header
from layerwise_dist.storage.odd import oddity
from layerwise_dist.storage.plain_header import Recent
from layerwise_dist.storage.shard_layout import HEADER_CAP

__all__ = ["Blocks", "Entry", "Shard", "ShardElsewhere", "ShardIndex", "parse_header", "read_verified"]

_BLOCKS_AT_ONCE = 4096  # of a verification
_PEEK_GAP = 4096  # between what is read at once
_DESCRIBED = 100  # bad blocks of one


def open_file(
    env: _native.Env, pool: _native.WriterPool, path: str, nbytes: int, lost: Callable[[], str] | None = None
) -> _native.ShardReader:
    """A file of a commit, as long as the manifest says. `lost()` says of one that is not there what it was.

    Raises DamageError (missing, odd, of another length) or OSError.
    """
    try:
        reader = _native.ShardReader(env, pool, path)
    except (FileNotFoundError, NotADirectoryError):
        held = f" ({lost()})" if lost is not None else ""
        raise DamageError(f"shard {path}: the file is missing{held}") from None
    except OSError as error:
        if (what := oddity(error, path)) is not None:
            raise DamageError(f"shard {what}") from None
        raise
    if (size := reader.size) != nbytes:
        reader.close()
        raise DamageError(f"shard {path}: is {size} bytes long, the manifest says {nbytes}")
    return reader


class Shard:
    """One open shard whose header was read and checked against the manifest's size and hash."""

    def __init__(
        self, env: _native.Env, pool: _native.WriterPool, path: str, *, nbytes: int, header_bytes: int,
        header_hash: int, of: tuple[str, int, int] | None = None, recent: Recent | None = None,
        lost: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        """`of` are the attempt, the rank and the world size that it must be of; `recent` as `parse_header` takes it,
        `lost` as `open_file`.

        Raises DamageError (missing, cut, other header) or OSError.
        """
        if header_bytes > HEADER_CAP:
            raise DamageError(f"shard {path}: a header of {header_bytes} bytes is over the format's {HEADER_CAP}")
        self._reader = open_file(env, pool, path, nbytes, lost)
        try:
            self._take_header(path, nbytes, self._reader.read(0, header_bytes), header_bytes, header_hash, of, recent)
        except BaseException:
            self.close()
            raise

    def _take_header(
        self, path: str, nbytes: int, header: bytes, header_bytes: int, header_hash: int,
        of: tuple[str, int, int] | None, recent: Recent | None = None,
    ) -> None:  # fmt: skip
        if len(header) != header_bytes or _native.xxh3_64(header) != header_hash:
            raise DamageError(f"shard {path}: its header does not match its hash in the manifest ({header_hash:016x})")
        self.header_bytes = header_bytes
        self.index = parse_header(path, nbytes, header, of, recent)

    def close(self) -> None:
        """Not left to the garbage collector: an error that somebody keeps also keeps what it came through. Safe to call
        twice.
        """
        self._reader.close()

    def header(self) -> bytes:
        """As it lies in the file, unverified. Raises OSError."""
        return self._reader.read(0, self.header_bytes)

    def state_extent(self) -> memoryview:
        """The bytes that have the state, verified. Raises DamageError or OSError."""
        begin, end = self.index.state_range
        return self._verified(self._reader.read(begin, end - begin))

    def _verified(self, state: bytes) -> memoryview:
        index = self.index
        begin, end = index.state_range
        if len(state) != end - begin or _native.xxh3_64(state) != index.state_hash:
            raise DamageError(
                f"shard {index.path} of step {index.step}: the state block does not match its hash "
                f"{index.state_hash:016x}"
            )
        return memoryview(state)

    def state(self) -> tuple[memoryview, memoryview]:
        """(typed JSON, its bytes), verified. Raises DamageError or OSError."""
        data, index = self.state_extent(), self.index
        begin, text, blob = index.state_range[0], index.state_json, index.state_bytes
        return data[text[0] - begin : text[1] - begin], data[blob[0] - begin : blob[1] - begin]

    def read_into(self, spans: list[tuple[int, int, int]]) -> None:
        """Copies byte ranges (begin, end, memory address) of the file out; every hashed block touched is verified
        first.

        Nothing of a bad block is copied, but other blocks may have been when DamageError is raised.
        REQUIRES: ranges lie in the layers, and the memory stays alive and unshared until the call returns.
        """
        bad, _ = read_verified(self._reader, self.index.blocks, self.index.hashes, spans)
        if bad:
            raise DamageError("; ".join(self.describe(block) for block in bad[:5]))

    def peek(self, begins: np.ndarray, ends: np.ndarray) -> bytes:
        """Ranges of the file as they are, unverified, one after another. Those that follow each other closely are read
        at once. Raises OSError.

        REQUIRES: int64, in the order of the file.
        """
        some = ends > begins
        begins, ends = begins[some], ends[some]
        if not len(begins):
            return b""
        apart = np.flatnonzero(begins[1:] - ends[:-1] > _PEEK_GAP) + 1
        first, end = np.concatenate(([0], apart)), np.concatenate((apart, [len(begins)]))  # of what is read at once
        offsets, lengths = begins[first], ends[end - 1] - begins[first]
        places = np.cumsum(lengths) - lengths
        memory = bytearray(int(lengths.sum()))
        address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
        self._reader.read_blocks(
            [(offset, length, None) for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)],
            [
                (number, 0, address + place, length)
                for number, (place, length) in enumerate(zip(places.tolist(), lengths.tolist(), strict=True))
            ],
        )
        shift = np.repeat(places - offsets, end - first)
        view = memoryview(memory)
        ranges = zip((begins + shift).tolist(), (ends + shift).tolist(), strict=True)
        return b"".join([view[one:other] for one, other in ranges])

    def verify(self) -> list[str]:
        """Reads everything; returns one message a bad block, of many only the first (empty: as committed, where it is
        hashed).

        Raises OSError.
        """
        index = self.index
        messages: list[str] = []
        count = 0
        for first in range(0, len(index.blocks), _BLOCKS_AT_ONCE):
            numbers = range(first, min(first + _BLOCKS_AT_ONCE, len(index.blocks)))
            blocks = [(*index.blocks[number], index.hashes[number]) for number in numbers]
            bad = self._reader.read_blocks(blocks, [])
            messages += [self.describe(first + block) for block in bad[: max(0, _DESCRIBED - len(messages))]]
            count += len(bad)
        if count > _DESCRIBED:
            messages.append(f"shard {index.path} of step {index.step}: {count - _DESCRIBED} more blocks are damaged")
        try:
            self.state()
        except DamageError as error:
            messages.append(str(error))
        return messages

    @cached_property
    def _ordered(self) -> list[tuple[str, Entry]]:
        """In the order of the file; those without elements left out."""
        entries = [(name, entry) for name, entry in self.index.entries.items() if entry.end > entry.begin]
        return sorted(entries, key=lambda each: each[1].begin)

    def describe(self, block: int) -> str:
        offset, length = self.index.blocks[block]
        held: dict[str, int] = {}
        ordered = self._ordered
        at = max(0, bisect_right(ordered, offset, key=lambda each: each[1].begin) - 1)
        while at < len(ordered) and ordered[at][1].begin < offset + length:
            name, entry = ordered[at]
            held[shown(name, 200)] = min(entry.end, offset + length) - max(entry.begin, offset)
            at += 1
        # The most likely first: what has most of the block.
        names = sorted((name for name, nbytes in held.items() if nbytes > 0), key=lambda name: -held[name])
        what = named(names, 3) or "padding"
        expected = self.index.hashes[block]
        problem = "is cut" if expected is None else f"does not match its hash in the header ({expected:016x})"
        return f"shard {self.index.path} of step {self.index.step}: block {block} at offset {offset} ({what}) {problem}"


class ShardElsewhere(Shard):
    """A shard that this process does not see, by the header and the state that one sent which does. Nothing can be read
    of it here: its blocks have to be sent too.
    """

    def __init__(
        self, path: str, header: bytes, state: bytes | None, *, nbytes: int, header_bytes: int, header_hash: int,
        of: tuple[str, int, int],
    ) -> None:  # fmt: skip
        """`state`: as `state_extent` gives it; None if it was not sent. Raises DamageError for other bytes than those
        that were committed.
        """
        self._take_header(path, nbytes, header, header_bytes, header_hash, of)
        self._state = state

    def close(self) -> None:
        """There is nothing to close."""

    def state_extent(self) -> memoryview:
        if self._state is None:
            raise ValueError(f"the state of shard {self.index.path} was not asked for")
        return self._verified(self._state)

    def header(self) -> bytes:
        raise self._not_here()

    def read_into(self, spans: list[tuple[int, int, int]]) -> None:
        raise self._not_here()

    def peek(self, begins: np.ndarray, ends: np.ndarray) -> bytes:
        raise self._not_here()

    def verify(self) -> list[str]:
        raise self._not_here()

    def _not_here(self) -> DamageError:
        return DamageError(f"shard {self.index.path}: it lies in another directory, which this process does not see")


def read_verified(
    reader: _native.ShardReader, blocks: Blocks, hashes: Sequence[int | None], spans: list[tuple[int, int, int]]
) -> tuple[list[int], int]:
    """As `Shard.read_into`, of a file with these blocks: the numbers of bad blocks, and the bytes of all read.

    Raises OSError.
    """
    table = np.array([span for span in spans if span[1] > span[0]], dtype=np.int64).reshape(-1, 3)
    begins, ends, addresses = table[np.argsort(table[:, 0], kind="stable")].T
    if not len(begins):
        return [], 0
    first, last = blocks.having(begins), blocks.having(ends - 1)
    # Each span is cut at the borders of blocks.
    parts = last - first + 1
    before = np.cumsum(parts) - parts
    of = np.repeat(np.arange(len(parts)), parts)
    number = first[of] + np.arange(len(of)) - before[of]
    offset, length = blocks.places(number)
    begin, end = np.maximum(begins[of], offset), np.minimum(ends[of], offset + length)
    touched, which = np.unique(number, return_inverse=True)
    offsets, lengths = blocks.places(touched)
    numbers = touched.tolist()
    segments = (which, begin - offset, addresses[of] + begin - begins[of], end - begin)
    bad = reader.read_blocks(
        [
            (place, nbytes, hashes[block])
            for block, place, nbytes in zip(numbers, offsets.tolist(), lengths.tolist(), strict=True)
        ],
        list(zip(*(each.tolist() for each in segments), strict=True)),
    )
    return [numbers[block] for block in bad], int(lengths.sum())
