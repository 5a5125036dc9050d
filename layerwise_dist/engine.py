"""`LayerwiseEngine`: what `attach()` returns. It wires the rooms together for one rank and holds no logic of theirs.

Events come in from the optimizer's adapter (fence, open), the root module's forward (inferred boundaries) and the
boundary (seal); everything behind the seal runs in the background.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from layerwise_dist.boundary import Boundary, BoundaryMark
from layerwise_dist.capture.audit import Rotation
from layerwise_dist.capture.lease import Capture, LeaseBroken
from layerwise_dist.capture.objects import StateObjects
from layerwise_dist.capture.pages import HugePages
from layerwise_dist.capture.room import pool_bytes
from layerwise_dist.capture.sealed import Sealer
from layerwise_dist.capture.stage import Stage
from layerwise_dist.capture.survey import Survey, Surveyor
from layerwise_dist.commit.coordinator import CoordinatorThread
from layerwise_dist.commit.metadata import CheckpointMetadataManager, ParentRef
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import Committer, SessionInfo
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import BoundaryError, ConfigError, DamageError, LayerwiseError
from layerwise_dist.frameworks.base import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.restore import loader
from layerwise_dist.restore.restorer import Restorer
from layerwise_dist.statistics import Statistics
from layerwise_dist.storage.adapter import Laid, PCCheckAdapter
from layerwise_dist.storage.layout import AttemptId

log = logging.getLogger("layerwise_dist")


class LayerwiseEngine:
    """Checkpoints one model and its optimizer on this rank. All methods belong to the training thread.

    Made by `attach()`. As a context manager it closes itself; left by an exception, it gives up what is not sealed.
    """

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, config: LayerwiseConfig, objects: StateObjects, *,
        adapter: PCCheckAdapter, manager: CheckpointMetadataManager, info: SessionInfo, participant: Participant,
        committer: Committer | None, coordinator: CoordinatorThread | None, fresh: bool,
    ) -> None:  # fmt: skip
        self.config, self._framework, self._optimizer, self._objects = config, framework, optimizer, objects
        self._adapter, self._manager, self._info = adapter, manager, info
        self._participant, self._committer, self._coordinator = participant, committer, coordinator
        self._statistics = Statistics()
        self._thread = threading.get_ident()
        self._seq = info.first_seq
        self._captures: list[Capture] = []
        self._open: Capture | None = None
        self._layout: tuple[tuple[Any, ...], Laid] | None = None
        self._stage: Stage | None = None
        self._pages = HugePages(wanted=config.writer.huge_pages == "auto" and adapter.direct)
        self._copying: frozenset[str] = frozenset()
        self._surveyor = Surveyor(framework, optimizer, config.capture)
        self._sealer = Sealer(framework, optimizer, objects)
        self._audits = Rotation(always=config.audit == "always")
        self._owed = False
        self._updates = self._boundaries = 0
        self._again = self._fenced = False
        self._ready = fresh or info.empty
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
        self._boundary = Boundary(self._on_boundary, objects.taps, log=log, excuse=self._scale_fell)
        self._hooks = [
            framework.root.register_forward_pre_hook(self._before_forward),
            *(p.register_post_accumulate_grad_hook(self._during_backward) for p in framework.gradient_ready_params()),
        ]
        optimizer.watch(self)
        if fresh and not info.empty:
            self._follow(None, new_branch=True)

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

    def explicit(self) -> None:
        """Says before the loop that it will call `end_step()`, for loops with several updates an iteration."""
        self._boundary.explicit()

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

        `timeout` is in seconds, by default commit.timeout_s. Raises CommitError if that checkpoint was aborted, DeadlineError at the timeout, ValueError for another level.
        """
        if level not in ("staged", "durable", "committed"):
            raise ValueError(f"level must be 'staged', 'durable' or 'committed', not {level!r}")
        if level != "staged":
            self._end_leases()
        self._participant.wait(step, level, timeout)

    def stats(self) -> dict[str, float | int]:
        """Counters of this rank since attach(): bytes, checkpoints, and how long the training thread was held up."""
        participant = self._participant
        return self._statistics.report(
            participant.commits, participant.aborts, participant.skips, self._adapter.buffers
        )

    # -- updates ------------------------------------------------------------------------------------------------

    def update_starting(self, *, in_closure: bool = False) -> None:
        """An update of the optimizer begins (`UpdateEvents`, as are the next three)."""
        self._boundary.update_starting(in_closure=in_closure)
        if not in_closure:
            self._may_update()
            self._fenced = False

    def overwriting(self) -> None:
        """The first overwriting of an update fences all: what is leased of it is written or copied away."""
        if not self._fenced:
            self._fenced = True
            self._fence()

    def wanted(self) -> bool:
        return self._due(self._boundary.completed + 1)

    def update_done(self, *, applied: bool) -> None:
        """Opens an attempt, if one is due, or captures anew what an earlier update of this iteration had opened."""
        if not applied:
            self._boundary.update_skipped()
            return
        self._updates += 1
        self._boundary.update_done()
        if self._open is not None and self._again:
            self._again = False
            self._guarded(self._open, self._open.restart)
        elif self._open is None and self._due(self._boundary.completed + 1):
            with self._statistics.stall("open"):
                self._begin(self._boundary.completed + 1)

    def _may_update(self) -> None:
        if self._restorer.undefined is not None:
            raise DamageError(self._restorer.undefined)
        if not self._ready:
            raise BoundaryError(
                f"{self.config.path} already holds checkpoints: call restore() before the first step, or attach(fresh=True) "
                "to start anew beside them"
            )

    def _fence(self) -> None:
        """Before anything is overwritten: all leases end, or their attempts do."""
        with self._statistics.stall("fence"):
            self._end_leases(overwrite=True)
            if self._open is not None and self._guarded(self._open, self._open.drain):
                self._again = True

    def _end_leases(self, *, overwrite: bool = False) -> None:
        for capture in self._captures:
            self._learn(capture.fence(overwrite=overwrite), "the next update")
        self._captures.clear()

    def _due(self, step: int) -> bool:
        return self._owed or step % self.config.every_n_steps == 0

    def _begin(self, step: int) -> None:
        """Opens an attempt. A rank that cannot tells rank 0, which drops it for all; training goes on.

        Raises ConfigError for what no later attempt can do either; the other ranks stop at an agreed boundary.
        """
        attempt = AttemptId(self._info.epoch, self._seq, step)
        self._seq += 1
        if not self._admitted(attempt):
            return
        self._participant.began(attempt)
        try:
            self._optimizer.gather()
            found = self._surveyor.look(self._copying)
            laid = self._lay_out(found)
            write = self._adapter.begin(attempt, laid.shard, laid.plan)
        except (LayerwiseError, OSError) as error:
            final = isinstance(error, ConfigError)
            self._participant.failed(attempt, str(error), None, final=final)
            if final:
                raise
            return
        capture = Capture(
            step, found, write, self._audits.next(found), self._stage, laid.gathered,
            timeout_s=self.config.fence_timeout_s,
        )  # fmt: skip
        write.confirm = capture.confirm  # and with it, what is leased stays alive as long as it may be read
        self._again = False
        if self._guarded(capture, capture.start):
            self._open = capture

    def _admitted(self, attempt: AttemptId) -> bool:
        """Whether there is room for one more attempt on its way to this rank's disk; if not, rank 0 knows by now."""
        limit, skip = self.config.max_in_flight, self.config.when_full == "skip"
        if self._participant.wait_room(limit, 0.0 if skip else self.config.fence_timeout_s):
            return True
        full = f"{limit} checkpoint{'s are' if limit > 1 else ' is'} in flight (max_in_flight)"
        if skip:
            self._participant.skipped(attempt, f"{full}, and when_full is 'skip'")
        else:
            self._participant.failed(attempt, f"{full} and the disk does not end one", None)
        return False

    def _lay_out(self, found: Survey) -> Laid:
        if self._layout is None or (self._layout[0] is not found.key and self._layout[0] != found.key):
            laid = self._adapter.lay_out(found.sources(self._adapter.memory_align), found.gathered)
            if self._stage is None:
                self._stage = self._open_pool(found, laid)
            self._layout = found.key, laid
            self._pages.cover(t for t, leased in zip(found.tensors, found.leased, strict=True) if leased)
        return self._layout[1]

    def _open_pool(self, found: Survey, laid: Laid) -> Stage:
        nbytes = pool_bytes(
            self.config.pool_mb, self._adapter.bounce_bytes, found, laid.gathered,
            max_in_flight=self.config.max_in_flight,
        )  # fmt: skip
        self._adapter.open_pool(nbytes)
        log.info(
            "rank %d: a pool of %.1f MiB for a state of %.1f MiB, of which %.1f MiB are staged (pool_mb = %s)",
            self._framework.rank, nbytes / 2**20, found.nbytes / 2**20, found.staged_bytes / 2**20, self.config.pool_mb,
        )  # fmt: skip
        on_cuda = any(tensor.is_cuda for tensor in found.tensors)
        return Stage(self._adapter.buffers, pinned=on_cuda)

    def _guarded(self, capture: Capture, action: Callable[[], Any]) -> bool:
        """Runs a step of a capture; if its lease is broken the attempt ends for all ranks, and training goes on."""
        try:
            action()
            return True
        except (LayerwiseError, OSError) as error:
            self._participant.failed(capture.write.attempt, str(error), capture.write)
            if capture is self._open:
                self._open = None
            return False

    def _learn(self, names: set[str], until: str) -> None:
        if names:
            self._copying |= names
            log.warning(
                "rank %d: %s changed between its boundary or update and %s without raising its version counter (through .data or "
                "numpy, say): from now on copied at the boundary instead of being read in place",
                self._framework.rank, ", ".join(sorted(names)), until,
            )  # fmt: skip

    # -- boundaries ---------------------------------------------------------------------------------------------

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        self._settle()
        if module.training and torch.is_grad_enabled() and threading.get_ident() == self._thread:
            self._boundary.training_forward()

    def _during_backward(self, param: torch.Tensor) -> None:
        # Without it a checkpoint that is written during the forward would be committed no earlier than the next update.
        if self._captures:
            self._settle()

    def _settle(self) -> None:
        """Between two operations of the training thread: leases whose blocks are written can be judged."""
        pending = [capture for capture in self._captures if not capture.settled]
        if pending and threading.get_ident() == self._thread:
            with self._statistics.stall("settle"):
                for capture in pending:
                    self._learn(capture.settle(), "the next update")

    def _on_boundary(self, mark: BoundaryMark) -> None:
        if self._optimizer.mid_window:
            raise BoundaryError(
                "an iteration ended within an accumulation window: steps() counts windows, so all micro-batches of one belong "
                "into its body; a loop over micro-batches calls explicit() before it and end_step() at the end of its body"
            )
        self._boundaries += 1
        capture = self._open
        if capture is not None:
            with self._statistics.stall("seal"):
                if self._guarded(capture, lambda: self._seal(capture, mark)):
                    self._captures.append(capture)
            self._open = None
            self._owed = False
        elif not mark.updated and self._due(mark.step):
            self._owed = True
        self._scales = [scaler.get_scale() for scaler in self._objects.scalers] if not mark.updated else []
        self._participant.boundary(self._boundaries)

    def _seal(self, capture: Capture, mark: BoundaryMark) -> None:
        if capture.step != mark.step:
            raise LeaseBroken(f"it was opened for step {capture.step}, the boundary is step {mark.step}")
        found = self._surveyor.look(self._copying)
        self._learn(capture.seal(found), "the boundary")
        capture.write.append_state(*self._sealer.take(mark.step, self._updates, mark.state(), found))
        if self._committer is not None:
            self._committer.boundary_kind = mark.resume_kind
        self._statistics.captured(capture, found.nbytes)
        self._participant.staged(mark.step, capture.write)

    def _scale_fell(self) -> bool:
        """Whether a GradScaler explains a boundary without an update: it saw an overflow and lowered its scale."""
        scales = [scaler.get_scale() for scaler in self._objects.scalers]
        return any(now < before for now, before in zip(scales, self._scales, strict=False))

    # -- restore ------------------------------------------------------------------------------------------------

    def restore(self, step: int | None = None, *, on_missing: str | None = None) -> int:
        """Loads the lineage's newest commit whose shards verify, the same on all ranks; returns its step, 0 if none.

        With `step`, exactly that commit, and what was committed after it is abandoned: the lineage goes on from there.
        `on_missing` is "fresh" (start from 0; the default without a step) or "error" (the default with one).
        Raises MismatchError (another model, optimizer, state or world size: nothing was loaded), NotFoundError,
        DamageError (nothing verifies), OSError (the disk is in trouble), CommitError or DeadlineError.
        """
        if on_missing not in (None, "fresh", "error"):
            raise ValueError(f"on_missing must be 'fresh' or 'error', not {on_missing!r}")
        if self._open is not None:
            raise BoundaryError("restore() inside an iteration: end it first (steps() or end_step())")
        self._fence_for_restore()
        fresh = (on_missing or ("error" if step is not None else "fresh")) == "fresh"
        found = self._restorer.newest(step, fresh_if_missing=fresh)
        if found is None:
            if step is not None and not self._info.empty:
                self._follow(None, new_branch=True)  # a fresh start beside what is there, as attach(fresh=True) makes it
            self._ready = True
            return self._boundary.completed
        attempt, loading = found
        self._adopt(loading)
        self._follow(ParentRef(seq=attempt.seq, attempt=attempt.text), new_branch=step is not None)
        self._restorer.undefined = None
        self._ready = True
        log.info("rank %d: restored step %d", self._framework.rank, attempt.step)
        return attempt.step

    def _fence_for_restore(self) -> None:
        self._end_leases()
        self._participant.drain(self.config.commit.timeout_s)

    def _adopt(self, loading: loader.LoadPlan) -> None:
        sealed = loading.sealed
        self._optimizer.adopt(loading.states, sealed["optimizer"])
        self._sealer.put(sealed)
        self._updates = sealed["updates"]
        self._boundary.start_at(sealed["step"])
        self._boundary.restore(sealed["boundary"])
        self._participant.restored(sealed["step"])

    def _follow(self, head: ParentRef | None, *, new_branch: bool) -> None:
        """From where the lineage goes on. A roll-back is made durable before the first step that follows it."""
        seq = self._seq
        self._seq += new_branch

        def decide(_: list[Any]) -> None:
            if self._committer is not None:
                self._committer.follow(head, seq if new_branch else None)

        self._participant.agree("continue the lineage", None, decide)

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Seals what is open, waits until everything is decided (commit.timeout_s), and lets go of model and directory.

        Called while an exception is on its way, it gives up what is not sealed. Safe to call twice.
        Raises CommitError or DeadlineError when the last checkpoints could not be committed.
        """
        self._close(orderly=sys.exc_info()[0] is None)

    def _close(self, *, orderly: bool) -> None:
        if self._closed:
            return
        self._closed = True
        timeout = self.config.commit.timeout_s if orderly else min(10.0, self.config.commit.timeout_s)
        problem: LayerwiseError | None = None
        try:
            self._boundary.close(seal=orderly)
            if self._open is not None:
                self._participant.failed(
                    self._open.write.attempt, "the job ended before this step did", self._open.write
                )
                self._open = None
            self._end_leases()
            self._participant.drain(timeout)
            self._participant.ended()
        except LayerwiseError as error:
            problem = error
        finally:
            for hook in self._hooks:
                hook.remove()
            self._optimizer.detach()
            self._objects.detach()
            self._pages.close()
            self._framework.detach()
            self._participant.close(timeout)
            if self._coordinator is not None:
                self._coordinator.close(timeout)
            if self._committer is not None:
                self._committer.close()
            if self._stage is not None:
                self._stage.close()
            self._adapter.close()
        if problem is not None:
            if orderly:
                raise problem
            log.warning("rank %d: close: %s", self._framework.rank, problem)

    def __enter__(self) -> LayerwiseEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._close(orderly=kind is None)
