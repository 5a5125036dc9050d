"""One checkpoint's capture on one rank: leased from the update on, sealed at the boundary, fenced at the next update."""

from __future__ import annotations

import threading

import torch

from layerwise_dist.capture.audit import Audit
from layerwise_dist.capture.survey import Survey
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.storage.adapter import ShardWrite


class LeaseBroken(LayerwiseError):
    """Leased memory is no longer what the checkpoint needs; this attempt cannot be saved. The message says why."""


class Capture:
    """Holds a reference to every tensor that the writer reads, until the writer is done with it.

    Life: `start` right behind the update, `restart` behind a further update of the same iteration, `seal` at the
    boundary, `settle` whenever the engine is entered, `fence` before the next update; these on the training thread.
    `confirm` waits for them on another one.
    """

    def __init__(self, step: int, survey: Survey, write: ShardWrite, audit: Audit, *, timeout_s: float) -> None:
        self.step, self.write = step, write
        self._survey, self._audit, self._timeout_s = survey, audit, timeout_s
        self._copies: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._settled = threading.Event()
        self._verdict: str | None = None

    def start(self) -> None:
        # The copies of the boundary have no memory yet; `seal` gives it.
        tensors = self._survey.tensors
        self.write.set_addresses([tensor.data_ptr() for tensor in tensors] + [0] * len(self._survey.copied))
        self.restart()

    def restart(self) -> None:
        """Queues the leased tensors as they are now. REQUIRES: nothing is queued: `drain` came before a further update."""
        self._note()
        self.write.submit(0, len(self._survey.layers))

    def drain(self) -> None:
        """Waits until all that was queued is written and hashed, so that the memory may change. Raises LeaseBroken."""
        if not self.write.wait_written(self._timeout_s):
            raise LeaseBroken(f"its tensors were still being written after fence_timeout_s = {self._timeout_s:g} s")

    def seal(self, survey: Survey) -> set[str]:
        """Brings the capture to the boundary's contents; `survey` is the boundary's own.

        What was changed since the update (a clamp of the weights, say) is written again, and what is not leased is
        copied. Returns the names of tensors that changed in a way only the audit saw. Raises LeaseBroken.
        """
        if survey is not self._survey and survey.key != self._survey.key:
            raise LeaseBroken(
                "a tensor of the model or optimizer came, went or moved between the update and the boundary"
            )
        moved = self._moved()
        unseen = self._audit.changed(self._survey).difference(moved)
        if moved or unseen:
            self.drain()
            for extent in {self._survey.extents[number] for number in unseen.union(moved)}:
                self.write.submit(extent, 1)
            self._note()
        first = len(self._survey.pieces)
        self._copies = [piece.copy() for piece in survey.copied]
        for number, copy in enumerate(self._copies, first):
            self.write.set_address(number, copy.data_ptr())
        self.write.submit(len(self._survey.layers), 1)
        if self._audit.full:
            # What an audited checkpoint holds is certain: nothing may change it any more once it was compared.
            self.drain()
        return self._names(unseen)

    def settle(self) -> set[str]:
        """Judges the lease, if all blocks are written by now. On the training thread only, between its operations.

        A version counter rises when an in-place operation returns. Looked at from another thread it could be looked at
        within one, with half of the change already read; on the thread that makes the changes it tells of all of them.

        Returns the names of tensors that changed in a way only the audit saw, which ends the attempt.
        """
        if self._settled.is_set() or not self.write.wait_written(0.0):
            return set()
        moved = self._moved()
        # A full audit had everything written before the boundary was over: what changes now was never read.
        unseen = set() if self._audit.full else self._audit.changed(self._survey).difference(moved)
        if changed := sorted(self._names([*moved, *unseen])):
            self._verdict = (
                f"{', '.join(changed[:3])} changed between the boundary and the next update, while it may still have "
                "been read: change parameters before the iteration ends"
            )
        self._settled.set()
        return self._names(unseen)

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

        Returns the names of tensors that changed since the boundary in a way only the audit saw.
        """
        unseen: set[str] = set()
        try:
            self.drain()
            unseen = self.settle()
        except LeaseBroken as broken:
            if not self._settled.is_set():
                self._verdict = str(broken)
                self._settled.set()
        if self._audit.full:
            unseen = self._names(self._audit.changed(self._survey).difference(self._moved()))
        return unseen

    def _note(self) -> None:
        self._versions = [tensor._version for tensor in self._survey.tensors]
        self._audit.note(self._survey)

    def _moved(self) -> list[int]:
        """Numbers of the pieces whose version counter rose since they were noted."""
        now = [tensor._version for tensor in self._survey.tensors]
        if now == self._versions:
            return []
        return [number for number, (was, is_) in enumerate(zip(self._versions, now, strict=True)) if was != is_]

    def _names(self, numbers: set[int] | list[int]) -> set[str]:
        return {self._survey.pieces[number].slice.name for number in numbers}
