# SPDX-License-Identifier: Apache-2.0
"""The log of dm-log-writes, what a block device was told in order, and what a power cut may leave of it.

The format is in the kernel's Documentation/admin-guide/device-mapper/log-writes.rst: a super block, then for each entry
a sector that says what it is, and the data. Writes are in it once a flush that began after them is over; those that
bypass the cache (FUA) as soon as they are over.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAGIC = 0x6A736677736872
VERSION = 1
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")
_SECTOR = 512
_BLOCK = 4096
_PIECE = 1 << 20


class LogError(ValueError):
    """Not a log that dm-log-writes makes, or one that ends too soon."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`offset` and `nbytes` are of the device, `data` is where the log has the bytes; None for a discard's zeros."""

    offset: int
    nbytes: int
    data: int | None
    flags: int
    mark: str | None = None

    @property
    def orders(self) -> bool:
        """Whether all that is logged before it was durable once it was over; what is between two that do is not."""
        return bool(self.flags & (FLUSH | FUA | MARK))


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of an entry, from `start` within it."""

    entry: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """What a power cut leaves: all entries before `end`, and of the next ones, up to the next flush, these parts."""

    kind: str
    end: int
    parts: tuple[Part, ...] = ()


def read_log(fd: int) -> tuple[list[Entry], int]:
    """The entries, and the device's sector in bytes. Raises LogError."""
    size = os.lseek(fd, 0, os.SEEK_END)
    magic, version, count, sector = SUPER.unpack(_exactly(fd, SUPER.size, 0))
    if magic != MAGIC or version != VERSION:
        raise LogError(f"not a log of version {VERSION}: it begins with {magic:#x}, version {version}")
    if sector < _SECTOR or sector & (sector - 1) or sector > 1 << 16:
        raise LogError(f"a sector of {sector} bytes")
    entries, at = [], sector
    for number in range(count):
        if at + sector > size:
            raise LogError(f"it ends before entry {number} of {count}")
        place, sectors, flags, length = ENTRY.unpack(_exactly(fd, ENTRY.size, at))
        if not sectors and not flags:
            break  # of QEMU's, which counts what it was about to write when it was killed
        mark = None
        if flags & MARK:
            if length > sector - ENTRY.size:
                raise LogError(f"entry {number} has a mark of {length} bytes")
            mark = _exactly(fd, length, at + ENTRY.size).decode()
        at += sector
        data = None if flags & DISCARD else at
        entries.append(Entry(place * sector, sectors * sector, data, flags, mark))
        at += 0 if data is None else sectors * sector
        if at > size:
            raise LogError(f"it ends within entry {number} of {count}")
    return entries, sector


def cuts(entries: Sequence[Entry], begin: int, drawn: int, rng: random.Random, sector: int = _SECTOR) -> list[Cut]:
    """Power cuts after entry `begin`, in the order of their `end`: right after each flush, each FUA and each mark, and
    `drawn` others at random. Of what no flush had covered, a third of those keep the first writes, a third some
    writes, a third some sectors of some writes: `sector` bytes, which the disk writes whole or not at all.
    """
    found = [
        Cut("mark" if entry.flags & MARK else "flush", number + 1)
        for number, entry in enumerate(entries)
        if number >= begin and entry.orders
    ]
    loose = [number for number in range(begin, len(entries)) if not entries[number].orders]
    for number in range(drawn if loose else 0):
        at = rng.choice(loose)
        kind = ("first writes", "some writes", "some sectors")[number % 3]
        if kind == "first writes":
            found.append(Cut(kind, at))
            continue
        first, last = at, at
        while first > begin and not entries[first - 1].orders:
            first -= 1
        while last < len(entries) and not entries[last].orders:
            last += 1
        atom = None if kind == "some writes" else sector
        parts = [part for each in range(first, last) if rng.random() < 0.6 for part in _of(entries, each, atom, rng)]
        found.append(Cut(kind, first, tuple(parts)))
    return sorted(found, key=lambda cut: cut.end)


def last_cuts(entries: Sequence[Entry], drawn: int, rng: random.Random) -> list[Cut]:
    """What the end of QEMU's log may leave: all that was ordered, with nothing of what follows, all of it, and `drawn`
    times some writes of it, or some blocks of 4096 bytes of some. No smaller parts: that log does not say which writes
    bypass the cache, as those of a super block do, and btrfs takes for granted that the 4096 bytes of its one are
    written whole: if they are not, it does not mount, whatever a checkpoint does.
    """
    end = 1 + max((number for number, entry in enumerate(entries) if entry.orders), default=-1)
    found = [Cut("nothing more", end)]
    for number in range(drawn if end < len(entries) else 0):
        kind, atom = (("some writes", None), ("some blocks", _BLOCK))[number % 2]
        loose = [each for each in range(end, len(entries)) if rng.random() < 0.6]
        found.append(Cut(kind, end, tuple(part for each in loose for part in _of(entries, each, atom, rng))))
    return [*found, Cut("all", len(entries))]


def _of(entries: Sequence[Entry], number: int, atom: int | None, rng: random.Random) -> Iterator[Part]:
    """All of an entry, or some of its parts that begin and end at multiples of `atom` bytes on the device."""
    nbytes = entries[number].nbytes
    if atom is None or nbytes <= atom:
        yield Part(number, 0, nbytes)
        return
    # Runs of them, so that a large write is torn in few places.
    at, kept = 0, rng.random() < 0.5
    while at < nbytes:
        reach = entries[number].offset + at + atom * rng.randint(1, max(1, nbytes // atom // 2))
        length = min(nbytes, reach - reach % atom - entries[number].offset) - at
        if kept:
            yield Part(number, at, length)
        at, kept = at + length, not kept


def apply(log: int, entries: Sequence[Entry], device: int, parts: Iterator[Part] | Sequence[Part]) -> int:
    """Writes these parts to a device, or a file. Returns how many bytes."""
    done = 0
    for part in parts:
        entry = entries[part.entry]
        for at in range(part.start, part.start + part.nbytes, _PIECE):
            length = min(_PIECE, part.start + part.nbytes - at)
            data = bytes(length) if entry.data is None else _exactly(log, length, entry.data + at)
            _write(device, data, entry.offset + at)
            done += length
    return done


def wholly(entries: Sequence[Entry], begin: int, end: int) -> Iterator[Part]:
    """All of these entries."""
    return (Part(number, 0, entries[number].nbytes) for number in range(begin, end))


def _exactly(fd: int, nbytes: int, at: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = os.pread(fd, nbytes - len(data), at + len(data))
        if not more:
            raise LogError(f"it ends at {at + len(data)}, within {nbytes} bytes")
        data += more
    return data


def _write(fd: int, data: bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, at)
        left, at = left[done:], at + done
