"""One checkpoint's capture on one rank: leased from the update on, sealed at the boundary, fenced at the next update."""

from __future__ import annotations

import threading

import torch

from layerwise_dist import _native
from layerwise_dist.capture.survey import Survey
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.pieces import Piece
from layerwise_dist.storage.adapter import ShardWrite


class LeaseBroken(LayerwiseError):
    """Leased memory is no longer what the checkpoint needs; this attempt cannot be saved. The message says why."""


class Capture:
    """Holds a reference to every tensor that the writer reads, until the writer is done with it.

    Life: `start` right behind the update, `restart` behind a further update of the same iteration, `seal` at the
    boundary, `settle` whenever the engine is entered, `fence` before the next update; these on the training thread.
    `confirm` waits for them on another one.
    """

    def __init__(self, step: int, survey: Survey, write: ShardWrite, *, timeout_s: float, audited: bool) -> None:
        self.step, self.write, self.audited = step, write, audited
        self._survey, self._timeout_s = survey, timeout_s
        self._copies: list[torch.Tensor] = []
        self._versions: dict[str, int] = {}
        self._hashes: dict[str, int] = {}
        self._settled = threading.Event()
        self._verdict: str | None = None

    def start(self) -> None:
        number = 0
        for layer in self._survey.leased:
            for piece in layer.pieces:
                self.write.set_address(number, piece.tensor.data_ptr())
                number += 1
        self.restart()

    def restart(self) -> None:
        """Queues the leased tensors as they are now. REQUIRES: nothing is queued: `drain` came before a further update."""
        self._note()
        for extent in range(len(self._survey.leased)):
            self.write.submit(extent)

    def drain(self) -> None:
        """Waits until all that was queued is written and hashed, so that the memory may change. Raises LeaseBroken."""
        if not self.write.wait_written(self._timeout_s):
            raise LeaseBroken(f"its tensors were still being written after fence_timeout_s = {self._timeout_s:g} s")

    def seal(self, survey: Survey) -> set[str]:
        """Brings the capture to the boundary's contents; `survey` is the boundary's own.

        What was changed since the update (a clamp of the weights, say) is written again, and what is not leased is
        copied. Returns the names of tensors that changed in a way only the audit saw. Raises LeaseBroken.
        """
        if survey.key != self._survey.key:
            raise LeaseBroken(
                "a tensor of the model or optimizer came, went or moved between the update and the boundary"
            )
        changed: set[int] = set()
        unseen: set[str] = set()
        for extent, piece in self._leased():
            name = piece.slice.name
            if piece.tensor._version != self._versions[name]:
                changed.add(extent)
            elif self.audited and _hash(piece) != self._hashes[name]:
                changed.add(extent)
                unseen.add(name)
        if changed:
            self.drain()
            for extent in changed:
                self.write.submit(extent)
            self._note()
        first = sum(len(layer.pieces) for layer in self._survey.leased)
        self._copies = [piece.copy() for piece in survey.copied]
        for number, copy in enumerate(self._copies, first):
            self.write.set_address(number, copy.data_ptr())
        self.write.submit(len(self._survey.leased))
        if self.audited:
            # What an audited checkpoint holds is certain: nothing may change it any more once it was compared.
            self.drain()
        return unseen

    def settle(self) -> None:
        """Judges the lease, if all blocks are written by now. On the training thread only, between its operations.

        A version counter rises when an in-place operation returns. Looked at from another thread it could be looked at
        within one, with half of the change already read; on the thread that makes the changes it tells of all of them.
        """
        if not self._settled.is_set() and self.write.wait_written(0.0):
            changed = [p.slice.name for _, p in self._leased() if p.tensor._version != self._versions[p.slice.name]]
            if changed:
                self._verdict = (
                    f"{', '.join(changed[:3])} changed between the boundary and the next update, while it may still have "
                    "been read: change parameters before the iteration ends"
                )
            self._settled.set()

    def confirm(self, timeout_s: float) -> None:
        """Waits for the training thread's verdict. Raises LeaseBroken if what was read had changed.

        Called on the persisting thread once all blocks are written, before the header is.
        """
        if not self._settled.wait(timeout_s):
            raise LeaseBroken(
                f"for {timeout_s:g} s after its boundary the training thread neither ran the model nor called the engine, "
                "which alone can tell that the parameters did not change meanwhile; call wait() or close()"
            )
        if self._verdict:
            raise LeaseBroken(self._verdict)

    def fence(self) -> set[str]:
        """Waits for the writer, so that the update may overwrite; gives the attempt up when it is not done in time.

        Returns the names of tensors that changed since the boundary in a way only the audit saw. What an audited
        checkpoint holds was written before; others would have been torn.
        """
        try:
            self.drain()
            self.settle()
        except LeaseBroken as broken:
            if not self._settled.is_set():
                self._verdict = str(broken)
                self._settled.set()
        if not self.audited:
            return set()
        unmoved = [p for _, p in self._leased() if p.tensor._version == self._versions[p.slice.name]]
        return {piece.slice.name for piece in unmoved if _hash(piece) != self._hashes[piece.slice.name]}

    def _leased(self) -> list[tuple[int, Piece]]:
        return [(extent, piece) for extent, layer in enumerate(self._survey.leased) for piece in layer.pieces]

    def _note(self) -> None:
        for _, piece in self._leased():
            self._versions[piece.slice.name] = piece.tensor._version
            if self.audited:
                self._hashes[piece.slice.name] = _hash(piece)


def _hash(piece: Piece) -> int:
    return _native.hash_memory(piece.tensor.data_ptr(), piece.slice.nbytes)
