# SPDX-License-Identifier: Apache-2.0
"""The audit: reads captured memory again and compares, for changes that no version counter shows.

The first checkpoints are audited in full. After that each one audits the next hundredth of the bytes in host memory, so
that every byte is looked at once in a hundred checkpoints, and none of them pays for all. Looking at device memory
makes the host wait for the device whatever its size, so that is done in every hundredth checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from layerwise_dist import _native
from layerwise_dist.capture.survey import Survey
from layerwise_dist.tensors.pieces import Piece

FULL_FIRST = 3  # checkpoints
ROUND = 100  # checkpoints in which the rotation comes round
WINDOW_BYTES = 1 << 20

T = TypeVar("T")


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
        self._windows: dict[int, list[Window]] = {}
        for window in windows:
            self._windows.setdefault(window.piece, []).append(window)
        self._noted: dict[Window, int] = {}

    def note(self, piece: int, address: int) -> None:
        """Remembers the windows of a piece that lies at `address`: in place, or where it was staged."""
        for window in self._windows.get(piece, ()):
            self._noted[window] = _native.hash_memory(address + window.begin, window.end - window.begin)

    def note_leased(self, survey: Survey, batches: Collection[int]) -> None:
        """Remembers what of these batches is read in place."""
        for piece in self._windows:
            if survey.leased[piece] and survey.batch_of[piece] in batches:
                self.note(piece, survey.addresses[piece])

    def staged(self, survey: Survey) -> bool:
        """Whether any of it is staged, so that `changed` has to wait for that."""
        return not all(survey.leased[piece] for piece in self._windows)

    def changed(self, survey: Survey, batches: Collection[int] | None = None, *, leased_only: bool = False) -> set[int]:
        """Numbers of the pieces, of all batches or of these, that are not any more what was noted."""
        return {
            piece
            for piece, windows in self._windows.items()
            if (survey.leased[piece] or not leased_only)
            and (batches is None or survey.batch_of[piece] in batches)
            and any(_hash(survey, window) != self._noted[window] for window in windows)
        }


def _hash(survey: Survey, window: Window) -> int:
    """Of what is read in place, where it is read: the tensor may have taken other memory."""
    tensor = survey.tensors[window.piece]
    if survey.leased[window.piece]:
        return _native.hash_memory(survey.addresses[window.piece] + window.begin, window.end - window.begin)
    if tensor.device.type != "cpu":
        # Waits for the device: the price of an audit there.
        tensor = tensor.detach().reshape(-1).view(torch.uint8)[window.begin : window.end].cpu()
        return _native.hash_memory(tensor.data_ptr(), tensor.numel())
    return _native.hash_memory(tensor.data_ptr() + window.begin, window.end - window.begin)


class Rotation:
    """Hands out the audits of one engine's checkpoints, in the order in which they are opened."""

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._opened = 0
        self._of: weakref.ref[Survey] | None = None  # which holds memory, and must not live on for this
        self._units: list[list[Window]] = []

    def again(self, survey: Survey) -> Audit:
        """Of a checkpoint that is captured again: it is the same one's turn."""
        self._opened -= 1
        return self.next(survey)

    def next(self, survey: Survey) -> Audit:
        number = self._opened
        self._opened += 1
        if self._always or number < FULL_FIRST:
            return Audit(_whole(survey.pieces), full=True)
        if self._of is None or self._of() is not survey:
            self._of, self._units = weakref.ref(survey), units(survey.pieces)
        windows = share(self._units, number - FULL_FIRST)
        if number % ROUND == ROUND - 1:
            windows += [window for window in _whole(survey.pieces) if not survey.pieces[window.piece].on_host]
        return Audit(windows, full=False)


def _whole(pieces: Sequence[Piece]) -> list[Window]:
    return [Window(at, 0, piece.slice.nbytes) for at, piece in enumerate(pieces) if piece.slice.nbytes]


def units(pieces: Sequence[Piece]) -> list[list[Window]]:
    """All bytes of the pieces in host memory as windows, grouped so that a group has at most `WINDOW_BYTES`."""
    groups: list[list[Window]] = []
    room = 0
    for at, piece in enumerate(pieces):
        begin, nbytes = 0, piece.slice.nbytes if piece.on_host else 0
        while begin < nbytes:
            if not room or (begin == 0 and min(nbytes, WINDOW_BYTES) > room):
                groups.append([])
                room = WINDOW_BYTES
            end = min(nbytes, begin + room)
            groups[-1].append(Window(at, begin, end))
            room -= end - begin
            begin = end
    return groups


def share(groups: Sequence[Sequence[T]], turn: int) -> list[T]:
    """Of the groups, those of the given turn: a hundredth of them, or one where there are fewer than a hundred."""
    if len(groups) < ROUND:
        return list(groups[turn % len(groups)]) if groups else []
    turn %= ROUND
    first, last = len(groups) * turn // ROUND, len(groups) * (turn + 1) // ROUND
    return [each for group in groups[first:last] for each in group]
