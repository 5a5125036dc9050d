# SPDX-License-Identifier: Apache-2.0
"""What all ranks agreed to do at one boundary: an extra save, or save and leave."""

from __future__ import annotations

import logging
from collections.abc import Callable

from layerwise_dist.commit.common_boundary import Meeting
from layerwise_dist.commit.participant import Participant
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.preemption import FAREWELL_S, Preemption
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.errors import CommitError, LayerwiseError
from layerwise_dist.loop.mark import BoundaryMark

log = logging.getLogger("layerwise_dist")


class Meetings:
    """Asks for them, and holds them. Belongs to the training thread."""

    def __init__(
        self, captures: Captures, attempts: Attempts, participant: Participant, preemption: Preemption | None,
        statistics: Statistics, *, patience_s: float, end: Callable[[float], None],
    ) -> None:  # fmt: skip
        """`patience_s`: how long a checkpoint that is not due may wait for room. `end(limit_s)` ends all, within that
        many seconds, without an error.
        """
        self._captures, self._attempts, self._participant = captures, attempts, participant
        self._preemption, self._statistics = preemption, statistics
        self._patience_s, self._end = patience_s, end

    def ask_to_save(self) -> None:
        """For a checkpoint of the next boundary that all ranks can save."""
        self._participant.ask(leave=False, why=f"save() on rank {self._participant.rank}")

    def pass_boundary(self, count: int, mark: BoundaryMark, *, attempted: bool) -> None:
        """At boundary number `count` of the session. `attempted`: the step was due and updated, so that every rank has
        tried to save it. Raises CommitError, DeadlineError, or SystemExit where all leave.
        """
        try:
            meeting = self._participant.boundary(count)
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

    def _save_here(self, mark: BoundaryMark) -> None:
        """An attempt that is opened at the boundary: nothing has changed since the update but what is copied now."""
        self._captures.compare_replicas()
        patience_s = self._patience_s
        if self._preemption is not None and self._preemption.begun:
            patience_s = min(patience_s, max(0.1, self._preemption.remaining_s - FAREWELL_S))
        with self._statistics.stall("open"):
            self._captures.begin(mark.step, patience_s=patience_s)
        if self._captures.open is not None:
            self._captures.seal(mark)

    def _leave(self, mark: BoundaryMark, meeting: Meeting) -> None:
        preemption = self._preemption
        if preemption is None:
            raise CommitError(f"all ranks leave ({meeting.why}), and preemption.enabled is false on this one")
        preemption.leaving(meeting.why)
        try:
            if meeting.common:
                self._commit_in_time(mark, preemption)
        except LayerwiseError as error:
            log.warning("rank %d: leaving without step %d: %s", self._participant.rank, mark.step, error)
        self._end(max(0.1, preemption.remaining_s - FAREWELL_S / 2))
        preemption.leave()

    def _commit_in_time(self, mark: BoundaryMark, preemption: Preemption) -> None:
        """What was aborted is tried once more: every rank hears of that, and none continues from here."""
        for again in (True, False):
            assert self._attempts.newest is not None
            left = max(0.1, preemption.remaining_s - FAREWELL_S)
            try:
                self._participant.wait_for_attempt(self._attempts.newest, left)
                return
            except CommitError:
                if not again:
                    raise
                self._participant.ended()
                self._save_here(mark)
