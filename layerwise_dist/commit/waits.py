# SPDX-License-Identifier: Apache-2.0
"""Waits of one rank's part in commits. Each has a deadline, and first does what only the training thread can do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from layerwise_dist.errors import CommitError, DeadlineError
from layerwise_dist.supervision.patience import stuck_calls


class Waits:
    """The lock under which all of a rank's part in commits changes, and the waits for those changes.

    Whoever changes anything holds `changed`, and notifies it.
    """

    def __init__(self, lost: Callable[[], str | None]) -> None:
        """`lost()` is why nothing more is heard of rank 0, if so; asked with the lock held."""
        self.changed = threading.Condition()
        self._lost = lost
        self._judge: Callable[[], None] = lambda: None
        self._verdicts_wanted = 0

    def judge_by(self, judge: Callable[[], None]) -> None:
        """As `Participant.judge_by`."""
        self._judge = judge

    def verdict_wanted(self) -> None:
        with self.changed:
            self._verdicts_wanted += 1
            self.changed.notify_all()

    def wait_for(self, predicate: Callable[[], object], deadline: float, message: Callable[[], str]) -> None:
        """REQUIRES: the lock is held once; it is let go of meanwhile.

        Raises DeadlineError with `message()`, CommitError once nothing more is heard of rank 0.
        """
        if not self.until(lambda: predicate() or self._lost() is not None, deadline):
            raise DeadlineError(f"{message()}{stuck_calls()}")
        if not predicate():
            raise CommitError(self._lost() or "")

    def until(self, predicate: Callable[[], object], deadline: float) -> bool:
        """Whether it holds by the deadline, of `time.monotonic()`. REQUIRES: the lock is held once; it is let go of
        while judging.
        """
        judged = -1
        while not predicate():
            if judged != self._verdicts_wanted:
                judged = self._verdicts_wanted
                self.changed.release()
                try:
                    self._judge()
                finally:
                    self.changed.acquire()
            elif not self.changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                return bool(predicate())
        return True

    def until_lost(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Whether, within the time, it holds or nothing more is heard of rank 0. REQUIRES: the lock is held."""
        return self.changed.wait_for(lambda: predicate() or self._lost() is not None, timeout_s)
