"""The audit: reads leased memory again and compares, for changes that no version counter shows.

The first checkpoints are audited in full, and every hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise_dist import _native
from layerwise_dist.capture.survey import Survey

FULL_FIRST = 3  # checkpoints
ROUND = 100  # checkpoints


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

    def next(self, survey: Survey) -> Audit:
        number = self._opened
        self._opened += 1
        if self._always or number < FULL_FIRST or number % ROUND == ROUND - 1:
            return Audit([Window(at, 0, p.slice.nbytes) for at, p in enumerate(survey.pieces)], full=True)
        return Audit([], full=False)
