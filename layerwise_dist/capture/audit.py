"""The audit: reads leased memory again and compares, for changes that no version counter shows.

The first checkpoints are audited in full. After that each one audits the next hundredth of the leased bytes, so that
every byte is looked at once in a hundred checkpoints, and none of them pays for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise_dist import _native
from layerwise_dist.capture.survey import Survey
from layerwise_dist.pieces import Piece

FULL_FIRST = 3  # checkpoints
ROUND = 100  # checkpoints in which the rotation comes round
WINDOW_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes `begin` to `end` of piece number `piece` of a survey."""

    piece: int
    begin: int
    end: int


class Audit:
    """What one checkpoint audits, and what it hashed to. `full`: everything."""

    def __init__(self, windows: Sequence[Window], *, full: bool) -> None:
        self.full = full
        self._windows = windows
        self._noted: list[int] = []

    def note(self, survey: Survey) -> None:
        """Remembers the windows as they are now."""
        self._noted = self._hash(survey)

    def changed(self, survey: Survey) -> set[int]:
        """Numbers of the pieces whose windows are not what was noted."""
        now = self._hash(survey)
        return {
            window.piece for window, was, is_ in zip(self._windows, self._noted, now, strict=True) if was != is_
        }

    def _hash(self, survey: Survey) -> list[int]:
        tensors, hash_memory = survey.tensors, _native.hash_memory
        return [hash_memory(tensors[w.piece].data_ptr() + w.begin, w.end - w.begin) for w in self._windows]


class Rotation:
    """Hands out the audits of one engine's checkpoints, in the order in which they are opened."""

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._opened = 0
        self._of: Survey | None = None
        self._units: list[list[Window]] = []

    def next(self, survey: Survey) -> Audit:
        number = self._opened
        self._opened += 1
        if self._always or number < FULL_FIRST:
            return Audit([Window(at, 0, p.slice.nbytes) for at, p in enumerate(survey.pieces)], full=True)
        if self._of is not survey:
            self._of, self._units = survey, units(survey.pieces)
        return Audit(share(self._units, number - FULL_FIRST), full=False)


def units(pieces: Sequence[Piece]) -> list[list[Window]]:
    """All bytes of the pieces as windows, grouped so that a group has at most `WINDOW_BYTES`."""
    groups: list[list[Window]] = []
    room = 0
    for at, piece in enumerate(pieces):
        begin, nbytes = 0, piece.slice.nbytes
        while begin < nbytes:
            if not room or (begin == 0 and min(nbytes, WINDOW_BYTES) > room):
                groups.append([])
                room = WINDOW_BYTES
            end = min(nbytes, begin + room)
            groups[-1].append(Window(at, begin, end))
            room -= end - begin
            begin = end
    return groups


def share(groups: Sequence[Sequence[Window]], turn: int) -> list[Window]:
    """Of the groups, those of the given turn: a hundredth of them, or one where there are fewer than a hundred."""
    if len(groups) < ROUND:
        return list(groups[turn % len(groups)]) if groups else []
    turn %= ROUND
    first, last = len(groups) * turn // ROUND, len(groups) * (turn + 1) // ROUND
    return [window for group in groups[first:last] for window in group]
