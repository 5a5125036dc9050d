# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of this rank that may still read the model's memory: the open one, and those sealed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.capture.lease import Capture, LeaseBroken
from layerwise_dist.capture.sealed import Sealer
from layerwise_dist.capture.survey import Survey, Surveyor
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import CommitRequests
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.last_step import LastStep
from layerwise_dist.engine.pacing import Pacing
from layerwise_dist.engine.replicas import Replicas
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.engine.trace import Tracing
from layerwise_dist.engine.training_thread import TrainingThread
from layerwise_dist.errors import DeadlineError, LayerwiseError
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.mark import BoundaryMark
from layerwise_dist.scheduler import LayerwiseCheckpointScheduler


class Captures:
    """Takes what is due, seals it at the boundary, and ends what is read before it is overwritten.

    Belongs to the training thread; on any other `settle` does nothing.

    Attributes:
        open: that of this iteration; None if there is none.
        sealed: to be fenced before the next update.
        unsettled: those of them that `settle` may have to judge.
        updates: how many the job has made, those before the restored checkpoint included.
        in_place: whether the last update that was saved left everything where it was.
    """

    def __init__(
        self, attempts: Attempts, participant: Participant, *, committer: CommitRequests | None,
        optimizer: OptimizerAdapter, surveyor: Surveyor, scheduler: LayerwiseCheckpointScheduler,
        replicas: Replicas, frozen: FrozenBases, sealer: Sealer, statistics: Statistics, tracing: Tracing,
        last: LastStep, pacing: Pacing, thread: TrainingThread, updates: int = 0,
    ) -> None:  # fmt: skip
        self._attempts, self._participant, self._committer = attempts, participant, committer
        self._optimizer, self._surveyor, self._scheduler = optimizer, surveyor, scheduler
        self._replicas, self._frozen, self._sealer = replicas, frozen, sealer
        self._statistics, self._tracing, self._last, self._thread = statistics, tracing, last, thread
        self._pacing = pacing
        self.open: Capture | None = None
        self.sealed: list[Capture] = []
        self.unsettled: list[Capture] = []
        self.updates = updates
        self.in_place = True
        self._client_state: dict[str, Any] | None = None

    # -- the open one -------------------------------------------------------------------------------------------

    def begin(self, step: int, *, patience_s: float | None = None, expected: Survey | None = None) -> None:
        """Opens the attempt of `step` after its update, and captures all. `open` stays None where that fails.

        `expected`: what there was while the update went on. `patience_s` and what is raised: as of `Attempts.open`.
        """
        if self._scheduler.set_order(self._optimizer.layer_order):
            self._surveyor.forget()
        self.heed_replicas()
        self._last.unsaved = False
        self.open = self._attempts.open(step, patience_s=patience_s)
        if self.open is not None:
            self.take(self._scheduler.flush())
        self.in_place |= self.open is not None and self.open.survey is expected

    def begin_early(self, step: int, found: Survey) -> None:
        """Opens the attempt of `step` within its update, of what was `found`, and captures nothing yet."""
        self.open = self._attempts.open(step, found, patience_s=self._last.patience_s)

    def take(self, batches: Collection[int]) -> None:
        """Captures these batches of the open one as they are now."""
        capture = self.open
        assert capture is not None
        if batches and self.guarded(capture, lambda: capture.take(batches)) and self._tracing.step is not None:
            self._tracing.step.captured(capture, batches)

    def seal(self, mark: BoundaryMark) -> None:
        """The open one is what there is at this boundary; from now on it is written and committed beside training."""
        capture = self.open
        assert capture is not None
        with self._statistics.stall("seal"):
            if self.guarded(capture, lambda: self._seal(mark)):
                assert self.open is not None
                # What is left of older ones (layers that no optimizer has updated since) is in this one as well.
                self._keep([*(each for each in self.sealed if not each.settled), self.open])
        self.open = None
        self._scheduler.done()

    def give_up(self, reason: str) -> None:
        """The open one, if there is one, for all ranks."""
        if self.open is not None:
            self._participant.failed(self.open.write.attempt, reason, self.open.write)
            self.open = None

    @contextmanager
    def saying(self, client_state: dict[str, Any]) -> Iterator[None]:
        """What is sealed within it has `client_state`."""
        self._client_state = client_state
        try:
            yield
        finally:
            self._client_state = None

    def guarded(self, capture: Capture, action: Callable[[], object]) -> bool:
        """Runs a step of a capture; if its lease is broken the attempt ends for all ranks, and training continues.

        Raises as `Attempts.fail`.
        """
        try:
            action()
            return True
        except (LayerwiseError, OSError) as error:
            if capture is self.open:
                self.open = None
            self._attempts.fail(capture.write.attempt, error, capture.write)
            return False

    def _seal(self, mark: BoundaryMark) -> None:
        capture = self.open
        assert capture is not None
        if capture.step != mark.step:
            raise LeaseBroken(f"it was opened for step {capture.step}, the boundary is step {mark.step}")
        capture.sealing()
        found = self._attempts.look(sealing=True)
        if not capture.fits(found):
            capture, found = self._again(capture)
        self._attempts.learn(capture.seal(found), "the boundary")
        base, restless = self._frozen.seal(found, capture.write.attempt, wait=capture.certain)
        self._attempts.copy(restless)
        capture.write.seal(
            *self._sealer.take(mark.step, self.updates, mark.state(), found, self._client_state, self._pacing.seal()),
            confirm=capture.confirm, base=base,
        )  # fmt: skip
        self._replicas.report(capture.write.attempt, found)
        if self._committer is not None:
            self._committer.boundary_kind = mark.resume_kind
        self._statistics.captured(capture, found.nbytes)
        self._participant.staged(capture.write)

    def _again(self, capture: Capture) -> tuple[Capture, Survey]:
        """Something came, went or moved since the capture was opened: a layer has its first state, say."""
        self.in_place = False
        self.open = capture = self._attempts.again(capture)
        capture.take_all()
        if self._tracing.step is not None:
            self._tracing.step.captured(capture, range(len(capture.survey.batches)))
        return capture, capture.survey

    # -- those that are sealed ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Between two operations of the training thread, and while it waits: leases whose blocks are written can be
        judged.
        """
        if self.unsettled and threading.get_ident() == self._thread.ident:
            with self._statistics.stall("settle"):
                for capture in self.unsettled:
                    self._attempts.learn(capture.settle(), "the next update")
                self.unsettled = [capture for capture in self.unsettled if not capture.settled]

    def fence(self, layers: Collection[str] | None = None) -> None:
        """These layers, or all, are overwritten next: their leases end."""
        for capture in self.sealed:
            self._attempts.learn(capture.fence(layers), "the next update")
        self._keep([capture for capture in self.sealed if not capture.over])

    def drain(self, timeout_s: float) -> None:
        """Waits until nothing reads the model's memory any more and every checkpoint on its way is decided.

        Raises DeadlineError.
        """
        deadline = time.monotonic() + timeout_s
        for capture in self.sealed:
            if not capture.wait_read(max(0.0, deadline - time.monotonic())):
                raise DeadlineError(f"tensors of step {capture.step} were still being written after {timeout_s:g} s")
        self.fence()
        self._frozen.drain(max(0.0, deadline - time.monotonic()))
        self._participant.drain(max(0.0, deadline - time.monotonic()))

    def let_go(self) -> None:
        """Of all that is sealed, and of the model with it."""
        self._keep([])

    def _keep(self, sealed: list[Capture]) -> None:
        """Hooks ask after each gradient, so which are to be judged is found out once."""
        self.sealed, self.unsettled = sealed, [capture for capture in sealed if not capture.settled]

    def abandon(self, reason: str) -> None:
        """Discards what is sealed and not judged."""
        for capture in self.sealed:
            capture.give_up(reason)

    # -- what all ranks hold alike ------------------------------------------------------------------------------

    def compare_replicas(self) -> bool:
        """If that is to be done before a checkpoint begins: at one place on all ranks. Whether it was."""
        if self._replicas.agreed:
            return False
        with self._statistics.stall("open"):
            if self._replicas.agree():
                self._surveyor.forget()
        return True

    def heed_replicas(self) -> None:
        """What the coordinator has found to be unlike is laid out again."""
        if self._replicas.heed():
            self._surveyor.forget()
