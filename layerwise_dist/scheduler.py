# SPDX-License-Identifier: Apache-2.0
"""Stage 3, `LayerwiseCheckpointScheduler`: which steps are saved, and in which order their layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A batch's last block is seldom full: with four blocks or more a batch, few writes are short.
BLOCKS_A_BATCH = 4
# Each batch costs the training thread some Python and a wake-up of the writer. More of them than this are made larger,
# to four times as much at the most: what waits longer for its write must be little beside the state.
FEW_BATCHES = 12


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One layer of this rank: `nbytes` of parameters and optimizer state.

    `staged`: copied out instead of read in place.
    """

    name: str
    nbytes: int
    staged: bool = False


class LayerwiseCheckpointScheduler:
    """Decides when a step is saved and how its layers go to the writer. One for a rank; belongs to the training thread.

    *When*: every `every_n_steps`-th step (none by itself with None), a step that was asked for (`request`), and the
    next applied update after one that was due and skipped (`postpone`).

    `every` may be set between two iterations.

    *How*: layers in the update order, small ones together in *batches* of at least `batch_bytes`, so that writes are
    few and large, and of more than that where there would be many. A batch is captured when the last of its layers was
    updated (`updated`).
    """

    def __init__(self, *, every_n_steps: int | None = 1, batch_bytes: int = BLOCKS_A_BATCH << 20) -> None:
        self.every, self._batch_bytes = every_n_steps, batch_bytes
        self._postponed = self._requested = False
        self._order: dict[str, int] = {}
        self._batch_of: dict[str, int] = {}
        self._members: list[frozenset[str]] = []
        self._missing: list[set[str]] = []
        self._handed: set[int] = set()

    # -- which steps --------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved. Asked before its update as well as after it, with one answer."""
        return self._postponed or self._requested or (self.every is not None and step % self.every == 0)

    def request(self) -> None:
        """Makes the next step due, whatever its number."""
        self._requested = True

    def postpone(self) -> None:
        """A due step had no update to save: the next one that has is due."""
        self._postponed = True

    def done(self) -> None:
        """A due step was taken up; what was asked for and put off is settled with it."""
        self._postponed = self._requested = False

    # -- how the layers go --------------------------------------------------------------------------------------

    def set_order(self, layers: Iterable[str]) -> bool:
        """The update order, first updated first; True if it is another than before. Layers not named come last."""
        order = {name: place for place, name in enumerate(layers)}
        changed, self._order = order != self._order, order
        return changed

    def arrange(self, layers: Sequence[LayerSize]) -> list[list[str]]:
        """The batches, as names, for layers in the model's order. Staged layers and others are never in one batch."""
        last = len(self._order)
        ordered = sorted(layers, key=lambda layer: self._order.get(layer.name, last))
        share = sum(layer.nbytes for layer in layers) // FEW_BATCHES
        least = max(self._batch_bytes, min(share, 4 * self._batch_bytes))
        batches: list[list[str]] = []
        nbytes, staged = least, False
        for layer in ordered:
            if nbytes >= least or layer.staged != staged:
                batches.append([])
                nbytes, staged = 0, layer.staged
            batches[-1].append(layer.name)
            nbytes += layer.nbytes
        self._members = [frozenset(batch) for batch in batches]
        self._batch_of = {name: number for number, batch in enumerate(batches) for name in batch}
        return batches

    def begin(self) -> None:
        """A capture begins: no layer of it was updated yet. REQUIRES: `arrange` was called for its layers."""
        self._missing = [set(members) for members in self._members]
        self._handed = set()

    def updated(self, layers: Iterable[str]) -> list[int]:
        """Numbers of the batches whose last layers to be updated these were.

        Names without a batch are passed by.
        """
        ready = []
        for name in layers:
            number = self._batch_of.get(name)
            if number is None or number in self._handed:
                continue
            self._missing[number].discard(name)
            if not self._missing[number]:
                self._handed.add(number)
                ready.append(number)
        return ready

    def flush(self) -> list[int]:
        """Numbers of the batches not handed out since `begin`: the update is over, and all may be captured."""
        left = [number for number in range(len(self._members)) if number not in self._handed]
        self._handed.update(left)
        return left
