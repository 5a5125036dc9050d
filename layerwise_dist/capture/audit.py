# SPDX-License-Identifier: Apache-2.0
"""The audit: reads captured memory again and compares, for changes that no version counter shows.

The first checkpoints are audited in full. After that each one audits the next hundredth of the bytes in host memory, so
that every byte is looked at once in a hundred checkpoints, and none of them pays for all. Looking at device memory
makes the host wait for the device whatever its size, so that is done in every hundredth checkpoint.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from layerwise_dist import _native
from layerwise_dist.capture.survey import Survey
from layerwise_dist.tensors.pieces import Piece

FULL_FIRST = 3  # checkpoints
AWAITED_FIRST = 1  # of them; to wait for the disk in each would hold a large state up for long
ROUND = 100  # checkpoints in which the rotation comes round
WINDOW_BYTES = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes `begin` to `end` of piece number `piece` of a survey."""

    piece: int
    begin: int
    end: int


class Spent:
    """Seconds that the training thread was held by audits: those within it, as a context manager."""

    __slots__ = ("_began", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._began


class Look:
    """What of an audit is read in place, on its way to be hashed on another thread.

    REQUIRES: until `hashes` returns, nothing changes that memory.
    """

    def __init__(self, survey: Survey, windows: Sequence[Window], spent: Spent) -> None:
        self._windows, self._spent, addresses = windows, spent, survey.addresses
        with spent:
            pieces = [(addresses[each.piece] + each.begin, each.end - each.begin) for each in windows]
            self._hashing = _native.Hashing(pieces, survey.held)

    def hashes(self) -> Iterable[tuple[Window, int]]:
        with self._spent:
            return zip(self._windows, self._hashing.hashes(), strict=True)


class Audit:
    """What one checkpoint audits, and what it hashed to. `awaited`: all of it, and its boundary waits until that is
    written, so that a change after it costs no checkpoint. `spent` is what all audits took.
    """

    def __init__(self, windows: Sequence[Window], spent: Spent, *, awaited: bool) -> None:
        self.awaited, self.spent = awaited, spent
        self._windows: dict[int, list[Window]] = {}
        for window in windows:
            self._windows.setdefault(window.piece, []).append(window)
        self._noted: dict[Window, int] = {}
        self._in_batches: tuple[Survey, dict[int, list[Window]]] | None = None

    def note(self, piece: int, address: int) -> None:
        """Remembers the windows of a piece that was staged at `address`."""
        for window in self._windows.get(piece, ()):
            self._noted[window] = _hash_at(address, window)

    def look(self, survey: Survey, batches: Collection[int] | None = None) -> Look:
        """At what is read in place, of all batches or of these: as it is from now until the hashes are there."""
        in_batches = self._leased(survey)
        chosen = in_batches.values() if batches is None else [in_batches[n] for n in batches if n in in_batches]
        return Look(survey, [window for windows in chosen for window in windows], self.spent)

    def _leased(self, survey: Survey) -> dict[int, list[Window]]:
        """What is read in place, by the number of its batch."""
        if self._in_batches is None or self._in_batches[0] is not survey:
            found: dict[int, list[Window]] = {}
            for piece, windows in self._windows.items():
                if survey.leased[piece]:
                    found.setdefault(survey.batch_of[piece], []).extend(windows)
            self._in_batches = survey, found
        return self._in_batches[1]

    def note_leased(self, look: Look) -> None:
        """Remembers what is looked at."""
        self._noted.update(look.hashes())

    def in_place(self, survey: Survey) -> bool:
        """Whether any of it is read in place."""
        return any(survey.leased[piece] for piece in self._windows)

    def staged(self, survey: Survey) -> bool:
        """Whether any of it is staged, so that `changed` has to wait for that."""
        return not all(survey.leased[piece] for piece in self._windows)

    def changed(self, look: Look) -> set[int]:
        """Numbers of the pieces read in place that are not any more what was noted."""
        return {window.piece for window, hash in look.hashes() if hash != self._noted[window]}

    def changed_by_now(self, survey: Survey) -> set[int]:
        """As `changed`, on any thread, without keeping the training thread from running meanwhile."""
        return {
            piece
            for piece, windows in self._windows.items()
            if survey.leased[piece]
            and any(_hash_at(survey.addresses[piece], window) != self._noted[window] for window in windows)
        }

    def changed_since_staged(self, survey: Survey) -> set[int]:
        """Of those that were staged."""
        with self.spent:
            return {
                piece
                for piece, windows in self._windows.items()
                if not survey.leased[piece]
                and any(_hash(survey.tensors[piece], window) != self._noted[window] for window in windows)
            }


class LookBack:
    """An audit's last look, which the persisting thread makes once all is written, unless the memory is overwritten
    before. The training thread would wait for what it can have done beside it.
    """

    def __init__(self, *, awaited: bool = True) -> None:
        """`awaited`: whether there is anything to look at; from then on whether that is neither done nor given up."""
        self._lock = threading.Lock()
        self._found: set[int] | None = None
        self.awaited = awaited

    def look(self, changed: Callable[[], set[int] | None]) -> None:
        """Makes it, once. REQUIRES: not on the training thread."""
        with self._lock:
            if self.awaited:
                self._found = changed()
                self.awaited = False

    def end(self) -> set[int] | None:
        """What it found, the pieces' numbers; None if there was none: the memory may be overwritten from now on, and
        nobody looks at it again.
        """
        with self._lock:
            self.awaited = False
            return self._found


def _hash(tensor: torch.Tensor, window: Window) -> int:
    if tensor.device.type != "cpu":
        # Waits for the device: the price of an audit there.
        tensor = tensor.detach().reshape(-1).view(torch.uint8)[window.begin : window.end].cpu()
        return _native.hash_memory(tensor.data_ptr(), tensor.numel())
    return _hash_at(tensor.data_ptr(), window)


def _hash_at(address: int, window: Window) -> int:
    """Of a piece in host memory at that address."""
    return _native.hash_memory(address + window.begin, window.end - window.begin)


class Rotation:
    """Hands out the audits of one engine's checkpoints, in the order in which they are opened."""

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self.spent = Spent()
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
            return Audit(_whole(survey.pieces), self.spent, awaited=self._always or number < AWAITED_FIRST)
        if self._of is None or self._of() is not survey:
            self._of, self._units = weakref.ref(survey), units(survey.pieces)
        windows = share(self._units, number - FULL_FIRST)
        if number % ROUND == ROUND - 1:
            windows += [window for window in _whole(survey.pieces) if not survey.pieces[window.piece].on_host]
        return Audit(windows, self.spent, awaited=False)


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
