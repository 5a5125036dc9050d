# SPDX-License-Identifier: Apache-2.0
"""The reader of dm-log-writes' log and the power cuts that are made of it, which tests/vm/powercut.sh replays."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.promises import allowed, in_marks
from kit.write_log import FLUSH, FUA, MARK, Cut, LogError, apply, cuts, last_cuts, read_log, wholly

pytestmark = pytest.mark.quick

DISCARD = 4


def log_of(*entries: tuple[int, bytes, int], sector: int = 512) -> bytes:
    """As the kernel's documentation has it: entries of (sector, data or mark or length in sectors, flags)."""
    made = struct.pack("<QQQI", 0x6A736677736872, 1, len(entries), sector).ljust(sector, b"\0")
    for place, data, flags in entries:
        count = 0 if flags & MARK else len(data) // sector
        head = struct.pack("<QQQQ", place, count, flags, len(data) if flags & MARK else 0)
        made += (head + (data if flags & MARK else b"")).ljust(sector, b"\0")
        made += b"" if flags & (MARK | DISCARD) else data
    return made


def block(letter: str, sectors: int = 1, sector: int = 512) -> bytes:
    return letter.encode() * (sector * sectors)


@contextmanager
def files(folder: Path, log: bytes) -> Iterator[tuple[int, int]]:
    (folder / "log").write_bytes(log)
    (folder / "disk").write_bytes(b"")
    log_fd, disk_fd = os.open(folder / "log", os.O_RDONLY), os.open(folder / "disk", os.O_RDWR)
    try:
        yield log_fd, disk_fd
    finally:
        os.close(log_fd)
        os.close(disk_fd)


@pytest.mark.parametrize("sector", [512, 4096])
def test_what_was_written_is_written_again(tmp_path: Path, sector: int) -> None:
    told = log_of(
        (0, block("a", 3, sector), 0), (1, block("b", 1, sector), FUA), (0, b"", FLUSH), (0, b"must 3", MARK),
        (2, block("?", 1, sector), DISCARD), (3, block("c", 2, sector), 16), (0, b"", FLUSH), sector=sector,
    )  # fmt: skip
    with files(tmp_path, told) as (log, disk):
        entries, found = read_log(log)
        assert found == sector and [entry.mark for entry in entries] == [None, None, None, "must 3", None, None, None]
        assert apply(log, entries, disk, wholly(entries, 0, 4)) == 4 * sector
        assert (tmp_path / "disk").read_bytes() == b"".join(block(letter, 1, sector) for letter in "aba")
        apply(log, entries, disk, wholly(entries, 4, 7))
        assert (tmp_path / "disk").read_bytes() == b"".join(block(letter, 1, sector) for letter in "ab\0cc")


def test_the_power_is_cut_at_each_flush_and_between_two_of_them_only_what_no_flush_covered_is_lost(
    tmp_path: Path,
) -> None:
    told = [(0, b"begun", MARK), (0, block("a", 8), 0), (8, block("b", 8), 0), (0, b"", FLUSH), (99, block("f"), FUA)]
    told += [(16, block("c", 8), 0), (24, block("d", 8), 0), (32, block("e", 8), 0), (0, b"", FLUSH), (7, b"x", MARK)]
    with files(tmp_path, log_of(*told)) as (log, disk):
        entries, _ = read_log(log)
        found = cuts(entries, 1, 60, random.Random(3))
        assert [cut for cut in found if not cut.parts and cut.kind in ("flush", "mark")] == [
            Cut("flush", 4), Cut("flush", 5), Cut("flush", 9), Cut("mark", 10)
        ]  # fmt: skip
        assert sum(cut.kind in ("first writes", "some writes", "some sectors") for cut in found) == 60
        assert [cut.end for cut in found] == sorted(cut.end for cut in found)
        torn = 0
        for cut in found:
            assert cut.kind == "first writes" or cut.end in (1, 4, 5, 9, 10)
            lost = {1: (1, 3), 5: (5, 8)}.get(cut.end, (0, 0))
            assert all(lost[0] <= part.entry < lost[1] for part in cut.parts)
            assert all(part.nbytes and part.start + part.nbytes <= 4096 for part in cut.parts)
            assert all(part.start % 512 == part.nbytes % 512 == 0 for part in cut.parts)
            torn += any(part.nbytes < 4096 for part in cut.parts)
            assert cut.kind == "some sectors" or not any(part.nbytes < 4096 for part in cut.parts)
        assert torn > 5
        os.ftruncate(disk, 0)
        some = next(cut for cut in found if cut.kind == "some sectors" and cut.parts)
        assert apply(log, entries, disk, some.parts) == sum(part.nbytes for part in some.parts)


def test_a_machine_that_dies_leaves_what_was_flushed_and_any_part_of_the_rest(tmp_path: Path) -> None:
    told = [(0, block("a", 8), 0), (0, b"", FLUSH), (8, block("b", 8), 0), (16, block("c", 8), 0)]
    with files(tmp_path, log_of(*told)) as (log, _):
        entries, _ = read_log(log)
        found = last_cuts(entries, 10, random.Random(3))
        assert found[0] == Cut("nothing more", 2) and found[-1] == Cut("all", 4) and len(found) == 12
        assert all(cut.end == 2 and all(part.entry in (2, 3) for part in cut.parts) for cut in found[:-1])
        assert len({cut.parts for cut in found}) == 4 and all(
            part.nbytes == 4096 for cut in found for part in cut.parts
        )
        assert last_cuts(entries[:2], 10, random.Random(3)) == [Cut("nothing more", 2), Cut("all", 2)]


def test_what_is_written_whole_is_never_torn_and_larger_writes_are_between_two_of_them(tmp_path: Path) -> None:
    told = [(0, b"begun", MARK), (8, block("a", 8), 0), (12, block("b", 36), 0), (0, b"", FLUSH)]
    with files(tmp_path, log_of(*told)) as (log, _):
        entries, _ = read_log(log)
        sectors = [cut for cut in cuts(entries, 1, 60, random.Random(3), 4096) if cut.kind == "some sectors"]
        blocks = [cut for cut in last_cuts(entries[:3], 60, random.Random(3)) if cut.kind == "some blocks"]
        for found in (sectors, blocks):
            parts = [part for cut in found for part in cut.parts]
            assert all(part.nbytes == 4096 for part in parts if part.entry == 1)
            large = [part for part in parts if part.entry == 2]
            ends = {12 * 512 + at for part in large for at in (part.start, part.start + part.nbytes)}
            assert all(end % 4096 == 0 or end in (12 * 512, 48 * 512) for end in ends) and len(ends) > 2


def test_a_log_and_a_seed_give_the_same_cuts_again(tmp_path: Path) -> None:
    told = [(0, b"begun", MARK), *((8 * at, block("a", 8), 0) for at in range(20)), (0, b"", FLUSH)]
    with files(tmp_path, log_of(*told)) as (log, _):
        entries, _ = read_log(log)
        once, again, other = (cuts(entries, 1, 20, random.Random(seed)) for seed in (7, 7, 8))
        assert once == again != other


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda log: b"\0" * 512 + log[512:], "not a log"),
        (lambda log: log[:24] + struct.pack("<I", 300) + log[28:], "sector of 300"),
        (lambda log: log[:600], "ends before entry 0 of 2"),
        (lambda log: log[:1100], "ends within entry 0 of 2"),
        (lambda log: log[:-512] + struct.pack("<QQQQ", 0, 0, MARK, 481).ljust(512, b"\0"), "a mark of 481 bytes"),
    ],
)
def test_a_log_that_is_none_is_an_error(tmp_path: Path, damage: object, said: str) -> None:
    log = log_of((0, block("a", 3), 0), (0, b"x", MARK))
    with files(tmp_path, damage(log)) as (fd, _), pytest.raises(LogError, match=said):  # type: ignore[operator]
        read_log(fd)


def test_an_entry_that_was_not_written_any_more_ends_the_log(tmp_path: Path) -> None:
    log = log_of((0, block("a", 3), 0), (0, b"", FLUSH), (0, block("b"), 0))
    with files(tmp_path, log[:-1024].ljust(len(log), b"\0")) as (fd, _):
        assert [entry.flags for entry in read_log(fd)[0]] == [0, FLUSH]


@pytest.mark.parametrize(
    ("said", "promised", "possible"),
    [
        ([], 0, {0}),
        (["may 1"], 0, {0, 1}),
        (["may 1", "may 2", "must 1"], 1, {1, 2}),
        (["may 1", "may 2", "must 1", "may 3", "must 3"], 3, {3}),
        # Killed while 4 was in flight, back at 3: from then on 4 is gone.
        (["may 3", "must 3", "may 4", "may 3", "must 3"], 3, {3}),
        # Rolled back to 2.
        (["may 2", "must 2", "may 3", "must 3", "may 2"], 3, {2, 3}),
        (["may 2", "must 2", "may 3", "must 3", "may 2", "must 2", "may 3"], 2, {2, 3}),
    ],
)
def test_a_restart_gives_what_was_promised_last_or_was_begun_after_it(
    said: list[str], promised: int, possible: set[int]
) -> None:
    assert allowed(said) == (promised, possible)


def test_marks_of_others_say_nothing() -> None:
    assert in_marks(["begun", None, "may-1", "must-1", "ended", "dm-log-writes-end"]) == ["may 1", "must 1"]


def test_a_promise_of_what_was_never_begun_is_an_error() -> None:
    for said in (["must 1"], ["may 1", "will 1"]):
        with pytest.raises(ValueError):
            allowed(said)
