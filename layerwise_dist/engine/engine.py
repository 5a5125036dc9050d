"""`LayerwiseEngine`: what `attach()` returns. It wires the rooms together for one rank and holds no logic of theirs.

Events come in from the optimizer's adapter (fence, open), the root module's forward (inferred boundaries) and the
boundary (seal); everything behind the seal runs in the background.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.capture.lease import Capture, LeaseBroken
from layerwise_dist.capture.sealed import Sealer
from layerwise_dist.capture.survey import Survey, Surveyor
from layerwise_dist.commit.coordinator_thread import CoordinatorThread
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import Requests, SessionInfo
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine import at_exit
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.holdings import Holdings
from layerwise_dist.engine.lent import Lent
from layerwise_dist.engine.meetings import FAREWELL_S, Together
from layerwise_dist.engine.preemption import Preemption
from layerwise_dist.engine.replicas import Replicas
from layerwise_dist.engine.saves import SaveAndRestore
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.engine.trace import StepTrace
from layerwise_dist.engine.updates import Update, Updates
from layerwise_dist.errors import BoundaryError, LayerwiseError
from layerwise_dist.frameworks.compiled import eager
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.loop.boundary import Boundary, BoundaryMark
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.restore.restorer import Restorer
from layerwise_dist.scheduler import BLOCKS_A_BATCH, LayerwiseCheckpointScheduler
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.supervision.patience import stuck_calls

log = logging.getLogger("layerwise_dist")

_LAST_S = 1.0  # for blocks that are being written when nothing else is waited for any more


class LayerwiseEngine(Updates, SaveAndRestore, Together):
    """Checkpoints what is trained on this rank: models and their optimizers. All methods belong to the training thread.

    Made by `attach()`. As a context manager it closes itself; left by an exception, it gives up what is not sealed.

    Attributes:
        restored_from: the folder of the checkpoint that `restore()` loaded; None if it loaded none.
        client_state: what `save()` was given with that checkpoint; None if it was not made by `save()`.
        lacking: the model's tensors (`<kind>/<fqn>`) that it had not; empty but for `restore(partly=True)`.
    """

    # What a script is told that trains in a directory with checkpoints before it restored one.
    _way_on = "call restore() before the first step, or attach(fresh=True) to start anew beside them"

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, config: LayerwiseConfig, objects: StateObjects, *,
        adapter: PCCheckAdapter, manager: CheckpointMetadataManager, info: SessionInfo, participant: Participant,
        committer: Requests | None, coordinator: CoordinatorThread | None, fresh: bool, preemption: Preemption | None,
        replicas: Replicas, lender: LayerwiseEngine | None = None,
    ) -> None:  # fmt: skip
        """With `lender`, `framework`, `optimizer` and `objects` are those that it has lent (`lent.Lent`)."""
        self.config, self._framework, self._optimizer, self._objects = config, framework, optimizer, objects
        self._adapter, self._manager, self._info = adapter, manager, info
        self._participant, self._committer, self._coordinator = participant, committer, coordinator
        self._preemption, self._replicas = preemption, replicas
        self._statistics = Statistics()
        self._trainer, self._thread = threading.current_thread(), threading.get_ident()
        participant.judge_by(self._settle)
        self._scheduler = LayerwiseCheckpointScheduler(
            every_n_steps=config.every_n_steps, batch_bytes=BLOCKS_A_BATCH * config.writer.block_kb << 10
        )
        self._surveyor = Surveyor(
            framework, optimizer, config.captured_by, self._scheduler.arrange, bases=not adapter.pooled
        )
        self._attempts = Attempts(
            config, framework.rank, self._surveyor, self._scheduler, adapter, participant,
            epoch=info.epoch, first_seq=info.first_seq,
        )  # fmt: skip
        self._frozen = FrozenBases(adapter, always=config.audit == "always", timeout_s=config.fence_timeout_s)
        self._sealer = Sealer(framework, optimizer, objects)
        self._captures: list[Capture] = []  # sealed, and to be fenced before the next update
        self._open: Capture | None = None  # of this iteration
        self._update: Update | None = None
        self._steady = True  # whether the last update that was saved left everything where it was
        self._updates = self._boundaries = 0
        self._saves_last = config.save_last and config.every_n_steps is not None
        self._saving_last = False  # whether close() saves what it ends
        self._last = False  # whether this iteration is the last of a loop over steps()
        # Whether anything was updated since an attempt was last begun, or restored. The same on all ranks: what became
        # of an attempt may not be.
        self._unsaved = False
        self._trace: StepTrace | None = None
        self._ready = fresh or info.empty
        self._client_state: dict[str, Any] | None = None  # of a save() that is under way
        self.client_state: dict[str, Any] | None = None
        self.restored_from: str | None = None
        self.lacking: list[str] = []
        self._restorer = Restorer(
            framework,
            optimizer,
            manager=manager,
            adapter=adapter,
            participant=participant,
            check_objects=objects.check,
        )
        self._closed = False
        self._scales: list[float] = []
        if lender is not None:
            self._boundary, self._updates = cast(Boundary, Lent(lender._boundary)), lender._updates
        else:
            self._boundary = Boundary(
                self._on_boundary, objects.taps, log=log, excuse=self._scale_fell, several=optimizer.several,
                by_call=config.every_n_steps is None, on_last=self._on_last if self._saves_last else None,
            )  # fmt: skip
        self._hooks: list[Any] = []
        try:
            self._hook(framework, optimizer)
            if fresh and not info.empty:
                self._follow(None, new_branch=True)
        except BaseException:
            self._unhook()
            self._boundary.close(seal=False)
            raise
        at_exit.opened(self, Holdings(framework, optimizer, objects.loaders) if lender is None else None, config.path)

    def _hook(self, framework: Framework, optimizer: OptimizerAdapter) -> None:
        for root in framework.roots:
            self._hooks.append(root.register_forward_pre_hook(eager(self._before_forward)))
        for module in framework.forward_modules():
            self._hooks.append(module.register_forward_hook(eager(self._behind_forward)))
        for param in framework.gradient_ready_params():
            self._hooks.append(param.register_post_accumulate_grad_hook(self._during_backward))
        optimizer.watch(self)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._optimizer.detach()

    # -- the loop -----------------------------------------------------------------------------------------------

    @property
    def completed(self) -> int:
        """Steps completed: boundaries since step 0, those before the restored checkpoint included."""
        return self._boundary.completed

    def steps(self, total: int) -> Iterator[int]:
        """Yields the iterations from `completed` to `total` - 1; each ends where the loop's body ends.

        Raises CommitError at the step at which all ranks stop because checkpoints fail (`commit.on_failure`).
        """
        return self._boundary.steps(total)

    def end_step(self) -> None:
        """Ends an iteration, for loops that are not written with `steps()`. Call it as the body's last statement.

        With DeepSpeed's gradient accumulation the body may be one micro-batch: within a window this does nothing.
        """
        if not self._optimizer.mid_window:
            self._boundary.end_step()

    def explicit(self, *, restored_in_loop: bool = False) -> None:
        """Says before the loop that it will call `end_step()`, for loops with several updates an iteration.

        With `restored_in_loop` nothing draws random numbers between `restore()` and the loop, so they are put back by
        it.
        """
        self._boundary.explicit(restored_in_loop=restored_in_loop)

    # -- what is where ------------------------------------------------------------------------------------------

    def _reached(self, level: str) -> int | None:
        self._settle()
        return self._participant.reached(level)

    @property
    def staged_step(self) -> int | None:
        """Newest step that is safe from being overwritten on all ranks; None before the first."""
        return self._reached("staged")

    @property
    def durable_step(self) -> int | None:
        """Newest step whose every shard survives power loss; None before the first."""
        return self._reached("durable")

    @property
    def committed_step(self) -> int | None:
        """Newest step whose manifest survives power loss: what a restart would find; None before the first."""
        return self._reached("committed")

    def wait(self, step: int, level: str = "committed", timeout: float | None = None) -> None:
        """Waits until `step` or a newer one is "staged", "durable" or "committed".

        `timeout` is in seconds, by default commit.timeout_s. Raises CommitError if that checkpoint was aborted,
        DeadlineError at the timeout, which ends nothing: it may be waited for again; ValueError for another level.
        """
        if level not in ("staged", "durable", "committed"):
            raise ValueError(f"level must be 'staged', 'durable' or 'committed', not {level!r}")
        self._participant.wait(step, level, timeout)

    @property
    def metadata(self) -> CheckpointMetadataManager:
        """The records of the directory: manifests, the lineage, what is in which shard."""
        return self._manager

    def stats(self) -> dict[str, float | int]:
        """Counters of this rank since attach(): bytes, checkpoints, and how long the training thread was held up."""
        return self._statistics.report(
            *self._participant.outcomes, self._adapter.buffers, self._frozen,
            newest=self._reached("committed"), in_flight=self._participant.in_flight,
        )  # fmt: skip

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Writes what happens to each layer in the next step that is saved, and when, into `path`.

        JSON in the Trace Event Format, which Perfetto (ui.perfetto.dev) opens: gradients, updates, captures and writes.
        It is there at the first boundary behind that step's writes, or at `close()`. Raises BoundaryError while one
        runs.
        """
        if self._trace is not None:
            raise BoundaryError(
                f"a trace into {self._trace.path} is under way: it ends with the next step that is saved"
            )
        self._trace = StepTrace(Path(path), self._framework.params)

    def _end_trace(self, wait_s: float = 0.0) -> None:
        if self._trace is not None and self._trace.save_if_complete(wait_s):
            self._trace = None

    # -- boundaries ---------------------------------------------------------------------------------------------

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        self._settle()
        if module.training and torch.is_grad_enabled() and threading.get_ident() == self._thread:
            self._framework.check_forward()
            self._boundary.training_forward()

    def _behind_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._captures:
            self._settle()

    def _during_backward(self, param: torch.Tensor) -> None:
        # Without it a checkpoint that is written during the forward would be committed no earlier than the next update.
        if self._captures:
            self._settle()

    def _settle(self) -> None:
        """Between two operations of the training thread, and while it waits: leases whose blocks are written can be
        judged.
        """
        pending = [capture for capture in self._captures if not capture.settled]
        if pending and threading.get_ident() == self._thread:
            with self._statistics.stall("settle"):
                for capture in pending:
                    self._attempts.learn(capture.settle(), "the next update")

    def _on_boundary(self, mark: BoundaryMark) -> None:
        if self._optimizer.mid_window:
            raise BoundaryError(
                "an iteration ended within an accumulation window: steps() counts windows, so all micro-batches of one "
                "belong into its body; a loop over micro-batches calls explicit() before it and end_step() at the "
                "end of its body"
            )
        self._end_trace()
        self._boundaries += 1
        self._last = False
        self._statistics.passed(mark.step)
        due = self._scheduler.due(mark.step)
        self._unsaved &= not (due and mark.updated)
        compared = due and self._compare_replicas()
        here = compared or self._optimizer.several or self._saving_last
        if here and self._open is None and mark.updated and due:
            # Which update is an iteration's last is known here only. Each optimizer's part is then captured once.
            with self._statistics.stall("open"):
                self._begin(mark.step)
        if self._open is not None:
            self._seal_open(mark)
        elif not mark.updated and due:
            self._scheduler.postpone()
        if self._trace is not None:
            self._trace.sealed()
        self._scales = [scaler.get_scale() for scaler in self._objects.scalers] if not mark.updated else []
        self._pass_boundary(mark, due and mark.updated)

    def _on_last(self) -> None:
        self._scheduler.request()
        self._last = True

    def _compare_replicas(self) -> bool:
        """If that is to be done before a checkpoint begins: at one place on all ranks. Whether it was."""
        if self._replicas.agreed:
            return False
        with self._statistics.stall("open"):
            if self._replicas.agree():
                self._surveyor.forget()
        return True

    def _seal_open(self, mark: BoundaryMark) -> None:
        capture = self._open
        assert capture is not None
        with self._statistics.stall("seal"):
            if self._guarded(capture, lambda: self._seal(mark)):
                # What is left of older ones (layers that no optimizer has updated since) is in this one as well.
                self._captures = [*(each for each in self._captures if not each.settled), self._open]
        self._open = None
        self._scheduler.done()

    def _seal(self, mark: BoundaryMark) -> None:
        capture = self._open
        assert capture is not None
        if capture.step != mark.step:
            raise LeaseBroken(f"it was opened for step {capture.step}, the boundary is step {mark.step}")
        found = self._attempts.look(sealing=True)
        if not capture.fits(found):
            capture, found = self._capture_again(capture)
        self._attempts.learn(capture.seal(found), "the boundary")
        base, restless = self._frozen.seal(found, capture.write.attempt, wait=capture.certain)
        self._attempts.copy(restless)
        capture.write.seal(
            *self._sealer.take(mark.step, self._updates, mark.state(), found, self._client_state),
            confirm=capture.confirm, base=base,
        )  # fmt: skip
        self._replicas.report(capture.write.attempt, found)
        if self._committer is not None:
            self._committer.boundary_kind = mark.resume_kind
        self._statistics.captured(capture, found.nbytes)
        self._participant.staged(capture.write)

    def _capture_again(self, capture: Capture) -> tuple[Capture, Survey]:
        """Something came, went or moved since the capture was opened: a layer has its first state, say."""
        self._steady = False
        self._open = capture = self._attempts.again(capture)
        capture.take_all()
        if self._trace is not None:
            self._trace.captured(capture, range(len(capture.survey.batches)))
        return capture, capture.survey

    def _scale_fell(self) -> bool:
        """Whether a GradScaler explains a boundary without an update: it saw an overflow and lowered its scale."""
        scales = [scaler.get_scale() for scaler in self._objects.scalers]
        return any(now < before for now, before in zip(scales, self._scales, strict=False))

    def _lend(self) -> tuple[Framework, OptimizerAdapter, StateObjects]:
        """What another engine needs to save what this one does."""
        return cast(
            tuple[Framework, OptimizerAdapter, StateObjects],
            tuple(Lent(each) for each in (self._framework, self._optimizer, self._objects)),
        )

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Seals what is open, waits until everything is decided (commit.timeout_s), and lets go of model and directory.

        Called while an exception is on its way (then for 10 s at most), or at the process's exit, it gives up what is
        not sealed. Safe to call twice.
        Raises CommitError when the last checkpoint was not committed, DeadlineError when that is not known in time.
        """
        self.end(orderly=sys.exc_info()[0] is None)

    def end(self, *, orderly: bool, limit_s: float = math.inf) -> None:
        """`close()` within `limit_s` seconds. Not `orderly`: as with an exception on its way; raises nothing then."""
        if self._closed:
            return
        self._closed = True
        at_exit.closed(self)
        timeout = min(limit_s, self._patience(orderly))
        deadline = time.monotonic() + timeout

        def left() -> float:
            return max(0.1, deadline - time.monotonic())

        problem: LayerwiseError | None = None
        try:
            self._end_here()
            try:
                # Where in an iteration the process's exit was asked for is not known: only what had ended is whole.
                self._close_boundary(seal=orderly and not at_exit.begun(), left=left)
            except LayerwiseError as error:
                problem = error  # of the iteration that was open; those before it are waited for all the same
            last = self._attempts.newest if self._open is None else self._attempts.before
            self._give_up("the job ended before this step did")
            self._end_trace(left())
            self._participant.drain(left())
            self._participant.ended()
            if last is not None:
                self._participant.saved(last, left())
        except LayerwiseError as error:
            problem = problem or error
            for capture in self._captures:
                capture.give_up(f"the job ended before it was judged: {error}")
        finally:
            self._unhook()
            if self._trace is not None:
                self._trace.detach()
            self._objects.detach()
            self._attempts.close_pages()
            self._framework.detach()
            self._surveyor.forget()
            self._participant.close(left())
            closed = [
                self._coordinator is None or self._coordinator.close(left()),
                self._attempts.close(left()),
                self._frozen.close(left()),
                self._adapter.close(max(_LAST_S, left())),
            ]
            self._captures.clear()
            if not all(closed):
                log.warning(
                    "rank %d: close: the disk is busy%s; this process leaves that to itself, and what it uses is kept",
                    self._framework.rank, stuck_calls(),
                )  # fmt: skip
            self._manager.env.let_go()
            if self._preemption is not None:
                self._preemption.close()
        if problem is not None:
            if orderly:
                raise problem
            log.warning("rank %d: close: %s", self._framework.rank, problem)

    def _close_boundary(self, *, seal: bool, left: Callable[[], float]) -> None:
        """Seals the iteration that is open; with `save_last` also saves it, or else the last one, if that is not saved
        yet. A loop whose ends are told by `end_step()` cannot say which is its last: what is saved is the job as it is
        now.
        """
        can = not (self._attempts.ended or self._optimizer.mid_window)
        last = self._saving_last = seal and self._saves_last and self._unsaved and can
        if last:
            self._scheduler.request()
        leaving = self._preemption is not None and self._preemption.begun
        if self._boundary.close(seal=seal) or not last or leaving:
            return
        self._compare_replicas()
        step = self._boundary.completed
        self._begin(step, patience_s=min(self.config.fence_timeout_s, left()))
        mark = self._boundary.call()
        if mark is not None and self._open is not None:
            self._seal_open(mark)

    def _patience(self, orderly: bool) -> float:
        """How long the end may wait, in seconds: where all are leaving, almost until the process is ended, since what
        is sealed is the last that there will be.
        """
        timeout = self.config.commit.timeout_s
        if self._preemption is not None and self._preemption.begun:
            return min(timeout, max(0.1, self._preemption.remaining_s - FAREWELL_S / 2))
        return timeout if orderly else min(10.0, timeout)

    def _end_here(self) -> None:
        """Once the training thread has ended, any other can judge what it left. Raises BoundaryError before that."""
        if threading.get_ident() != self._thread:
            if self._trainer.is_alive():
                raise BoundaryError(
                    f"close() on thread {threading.current_thread().name!r} while the one that trains, "
                    f"{self._trainer.name!r}, goes on: it alone can tell that nothing changes what is still being read"
                )
            self._thread = threading.get_ident()

    def __enter__(self) -> LayerwiseEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.end(orderly=kind is None)
