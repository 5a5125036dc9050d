# SPDX-License-Identifier: Apache-2.0
"""Reads event files while a job writes them: whole lines only, without trust.

Files may vanish, be rotated, or end within a line at any time. No link is followed, and nothing is written.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from layerwise_dist.storage import filenames, strict_json
from layerwise_dist.telemetry.names import COMMON, EVENTS, FIELDS, OUTCOMES, VERSION

_LONGEST_LINE = 64 << 10
_MOST_BYTES = 64 << 20  # of one file: its end
_MOST_OF_ALL = 128 << 20  # of the files of all ranks: in memory their events take ten times as much
_LONGEST_TEXT = 4000
_LAST_TIME = 1e11  # seconds since 1970
_OF_RANK = re.compile(r"\.([0-9]{5})\.jsonl\Z")
_TEXTS = {"host", "mode", "framework", "version", "outcome", "reason"}
_RANKS = {"world_size": filenames.RANKS_END + 1, "slowest_rank": filenames.RANKS_END}
_NUMBERED = {"step": filenames.STEPS_END, "epoch": filenames.NUMBERS_END, "seq": filenames.NUMBERS_END}


def parse(line: bytes | bytearray) -> dict[str, Any] | None:
    """An event with exactly the members that its kind has, each a text, a finite number, or None; None for any other
    line.
    """
    if len(line) > _LONGEST_LINE:
        return None
    try:
        found = strict_json.loads(bytes(line))
    except ValueError:
        return None
    if type(found) is not dict or found.get("layerwise") != VERSION:
        return None
    kind: Any = found.get("event")
    when: Any = found.get("time")
    rank: Any = found.get("rank")
    if type(kind) is not str or kind not in EVENTS:
        return None
    if not _number(when) or not 0 <= when <= _LAST_TIME or type(rank) is not int or not 0 <= rank < filenames.RANKS_END:
        return None
    made = {name: found.get(name) for name in (*COMMON, *FIELDS[kind])}
    return made if all(_fits(name, made[name]) for name in FIELDS[kind]) else None


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63  # type: ignore[arg-type]  # NaN is not less either


def _fits(name: str, value: object) -> bool:
    if name == "outcome":
        return value in OUTCOMES
    if name in _NUMBERED:
        return type(value) is int and 0 <= value < _NUMBERED[name]
    if name in _RANKS:
        return value is None or (type(value) is int and 0 <= value < _RANKS[name])
    if name in _TEXTS:
        return value is None or (type(value) is str and len(value) <= _LONGEST_TEXT)
    return value is None or _number(value)


def _written(path: str) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0  # gone meanwhile


@dataclass
class _Place:
    offset: int


class EventReader:
    """Of all files of events in one directory, or of one file. `poll` gives what came since the last call."""

    def __init__(self, directory: str, file: str | None = None) -> None:
        """With `file`, of that one alone, through links too: it was asked for by name. OSError if there is none."""
        self._directory, self._file = directory, file
        self._places: dict[tuple[int, int], _Place] = {}  # by device and inode: a file that is renamed is the same
        self.skipped = 0  # lines that are no events
        self.cut = 0  # files whose beginning was not read
        if file is not None and not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError(f"{file}: is not a regular file")

    def files(self, *, all_ranks: bool) -> list[str]:
        """Paths, each rank's by when they were last written; unless of `all_ranks`, those of the lowest rank that has
        some here. OSError for no directory.
        """
        if self._file is not None:
            return [self._file]
        ranks: dict[int, list[str]] = {}
        for name in sorted(os.listdir(self._directory)):
            if name.endswith(".jsonl"):
                match = _OF_RANK.search(name)
                ranks.setdefault(int(match[1]) if match else 0, []).append(os.path.join(self._directory, name))
        kept = sorted(ranks) if all_ranks else sorted(ranks)[:1]
        return [path for rank in kept for path in sorted(ranks[rank], key=_written)]

    def poll(self, *, all_ranks: bool = False) -> list[dict[str, Any]]:
        """New events, file by file in the order in which they were written. Raises OSError if the directory is gone."""
        paths = self.files(all_ranks=all_ranks)
        most = min(_MOST_BYTES, max(2 * _LONGEST_LINE, _MOST_OF_ALL // max(1, len(paths))))
        return [event for path in paths for event in self._new(path, most)]

    def _new(self, path: str, most: int) -> Iterator[dict[str, Any]]:
        """At most the newest `most` bytes of a file that is new, and as many of one that is known."""
        links = os.O_NOFOLLOW if self._file is None else 0
        try:
            file = os.open(path, os.O_RDONLY | links | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # gone meanwhile, a link, or not ours to read
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                return
            identity = found.st_dev, found.st_ino
            place = self._places.get(identity)
            within = False
            if place is None or found.st_size < place.offset:
                begin = max(0, found.st_size - most)
                place = self._places[identity] = _Place(begin)
                within = begin > 0
                self.cut += within
            data = bytearray()
            while len(data) < most and (more := os.pread(file, min(1 << 20, most), place.offset + len(data))):
                data += more
        except OSError:
            return
        finally:
            os.close(file)
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) > _LONGEST_LINE:
            whole = len(data)  # of no end: passed by
        place.offset += whole
        for number, line in enumerate(data[:whole].split(b"\n")):
            if within and number == 0:
                continue  # the end of a line
            event = parse(line)
            if event is not None:
                yield event
            elif line:
                self.skipped += 1
