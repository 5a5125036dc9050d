"""What all ranks have agreed to do at one boundary: save though no step is due, or save and leave."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from layerwise_dist.commit.common_boundary import Meeting
from layerwise_dist.errors import BoundaryError, CommitError, LayerwiseError
from layerwise_dist.loop.mark import BoundaryMark

if TYPE_CHECKING:
    from layerwise_dist.engine.engine import LayerwiseEngine

log = logging.getLogger("layerwise_dist")

FAREWELL_S = 3.0  # of the time to leave: for closing, and for what the script does behind it


class Together:
    """A part of `LayerwiseEngine`, and of nothing else: it works on the engine's own attributes."""

    def _ask_to_save(self: LayerwiseEngine) -> None:
        if self._closed:
            raise BoundaryError("save() after close()")
        self._participant.ask(leave=False, why=f"save() on rank {self._framework.rank}")

    def _pass_boundary(self: LayerwiseEngine, mark: BoundaryMark, attempted: bool) -> None:
        """`attempted`: the step was due and updated, so that every rank has tried to save it. Raises CommitError,
        DeadlineError, or SystemExit where all leave.
        """
        try:
            meeting = self._participant.boundary(self._boundaries)
        except LayerwiseError as error:
            if self._preemption is None or not self._preemption.begun:
                raise
            meeting = Meeting(True, str(error), common=False)
        if meeting is None:
            return
        if meeting.common and not attempted:
            self._save_here(mark)
        if meeting.leave:
            self._leave(mark, meeting)

    def _save_here(self: LayerwiseEngine, mark: BoundaryMark) -> None:
        """An attempt that is opened at the boundary: nothing has changed since the update but what is copied now."""
        self._compare_replicas()
        patience = self.config.fence_timeout_s
        if self._preemption is not None and self._preemption.begun:
            patience = min(patience, max(0.1, self._preemption.remaining_s - FAREWELL_S))
        with self._statistics.stall("open"):
            self._begin(mark.step, patience_s=patience)
        if self._open is not None:
            self._seal_open(mark)

    def _leave(self: LayerwiseEngine, mark: BoundaryMark, meeting: Meeting) -> None:
        if self._preemption is None:
            raise CommitError(f"all ranks leave ({meeting.why}), and preemption.enabled is false on this one")
        self._preemption.leaving(meeting.why)
        try:
            if meeting.common:
                self._commit_in_time(mark)
        except LayerwiseError as error:
            log.warning("rank %d: leaving without step %d: %s", self._framework.rank, mark.step, error)
        self.end(orderly=False, limit_s=max(0.1, self._preemption.remaining_s - FAREWELL_S / 2))
        self._preemption.leave()

    def _commit_in_time(self: LayerwiseEngine, mark: BoundaryMark) -> None:
        """What was given up is tried once more: every rank hears of that, and none goes on from here."""
        assert self._preemption is not None
        for again in (True, False):
            assert self._attempts.newest is not None
            left = max(0.1, self._preemption.remaining_s - FAREWELL_S)
            try:
                self._participant.wait_for_attempt(self._attempts.newest, left)
                return
            except CommitError:
                if not again:
                    raise
                self._participant.ended()
                self._save_here(mark)
