# SPDX-License-Identifier: Apache-2.0
"""Saves on request: the next boundary of all ranks, or the job as it is now, under a name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import LONGEST_TAG, is_tag
from layerwise_dist.commit.session import CommitRequests
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.closing import Closing
from layerwise_dist.engine.meetings import Meetings
from layerwise_dist.engine.restores import Restores
from layerwise_dist.errors import BoundaryError
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.boundary import Boundary
from layerwise_dist.storage import typed_json


class Saves:
    """Belongs to the training thread. `timeout_s` is `commit.timeout_s`."""

    def __init__(
        self, captures: Captures, boundary: Boundary, *, attempts: Attempts, participant: Participant,
        committer: CommitRequests | None, optimizer: OptimizerAdapter, meetings: Meetings, restores: Restores,
        closing: Closing, timeout_s: float,
    ) -> None:  # fmt: skip
        self._captures, self._boundary, self._attempts = captures, boundary, attempts
        self._participant, self._committer, self._optimizer = participant, committer, optimizer
        self._meetings, self._restores, self._closing, self._timeout_s = meetings, restores, closing, timeout_s

    def ask(self) -> None:
        """`LayerwiseEngine.save` without a tag."""
        self._check_open()
        self._meetings.ask_to_save()

    def save(
        self, tag: str, client_state: Mapping[str, Any] | None, *, timeout: float | None = None,
        within_window: bool = False,
    ) -> int:  # fmt: skip
        """`LayerwiseEngine.save` with a tag."""
        timeout = self._timeout_s if timeout is None else timeout
        deadline = time.monotonic() + timeout
        step, state = self.check(tag, within_window=within_window), dict(client_state or {})
        together(self._participant, "save", lambda: typed_json.dumps(state, path="client_state"))
        if not self._agree(tag):
            # One on its way at a time, so that there is room. All begin it or none: their numbering stays in step.
            together(self._participant, "save", lambda: self._captures.drain(max(0.0, deadline - time.monotonic())))
            self._captures.compare_replicas()
            self._captures.begin(step)
        attempt = self._attempts.newest
        assert attempt is not None
        if self._committer is not None:
            self._committer.tag(attempt.seq, tag)
        with self._captures.saying(state):
            mark = self._boundary.call()
            if mark is not None and self._captures.open is not None:
                self._captures.seal(mark)
        self._participant.wait_for_attempt(attempt, max(0.0, deadline - time.monotonic()))
        return attempt.step

    def check(self, tag: str, *, within_window: bool) -> int:
        """The step that `save(tag)` would save now. Raises as it does, before it asks other ranks anything."""
        self._check_open()
        if self._optimizer.mid_window and not within_window:
            raise BoundaryError("save() within an accumulation window: its gradients would be lost")
        if not is_tag(tag):
            raise ValueError(f"a tag has 1 to {LONGEST_TAG} printable characters: {tag!r}")
        self._restores.check_ready()
        return self._boundary.step_of_call

    def _check_open(self) -> None:
        if self._closing.closed:
            raise BoundaryError("save() after close()")

    def _agree(self, tag: str) -> bool:
        """Whether all ranks have a capture of this iteration open; if not, those that have one give it up."""

        def decide(votes: list[list[Any]]) -> bool:
            tags = {tag for tag, _ in votes}
            if len(tags) > 1:
                raise BoundaryError(f"save() under different tags on different ranks: {sorted(tags)}")
            return all(is_open for _, is_open in votes)

        agreed = self._participant.agree("save under a tag", [tag, self._captures.open is not None], decide)
        if not agreed:
            self._captures.give_up("another rank could not begin it")
        return bool(agreed)
