# SPDX-License-Identifier: Apache-2.0
"""`LayerwiseEngine`: what `attach()` returns. It has a script's calls, and hands each to the part that does it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine.notices import OnCommit, OnFailure
from layerwise_dist.engine.workings import Workings
from layerwise_dist.restore.restorer import Terms


class LayerwiseEngine:
    """Checkpoints what is trained on this rank: models and their optimizers. Call it from the training thread only.

    Made by `attach()`. As a context manager it closes itself; left by an exception, it discards what is not sealed.
    """

    def __init__(self, workings: Workings) -> None:
        self._workings = workings

    @property
    def config(self) -> LayerwiseConfig:
        """The configuration, with defaults filled in."""
        return self._workings.config

    # -- the loop -----------------------------------------------------------------------------------------------

    @property
    def completed(self) -> int:
        """Steps completed: boundaries since step 0, including those before the restored checkpoint."""
        return self._workings.boundary.completed

    def steps(self, total: int) -> Iterator[int]:
        """Yields the iterations from `completed` to `total` - 1; each ends where the loop's body ends.

        Raises CommitError at the step at which all ranks stop because checkpoints fail (`commit.on_failure`).
        """
        return self._workings.boundary.steps(total)

    def end_step(self) -> None:
        """Ends an iteration, for loops that are not written with `steps()`. Call it as the body's last statement.

        With DeepSpeed's gradient accumulation the body may be one micro-batch: within a window this does nothing.
        """
        if not self._workings.optimizer.mid_window:
            self._workings.boundary.end_step()

    def explicit(self, *, restored_in_loop: bool = False) -> None:
        """Announces, before the loop, that it will call `end_step()`: for loops with several updates an iteration.

        With `restored_in_loop`, nothing draws random numbers between `restore()` and the loop, so the loop restores
        them.
        """
        self._workings.boundary.explicit(restored_in_loop=restored_in_loop)

    # -- saving and coming back ---------------------------------------------------------------------------------

    def save(
        self, tag: str | None = None, client_state: Mapping[str, Any] | None = None, *, timeout: float | None = None,
        within_window: bool = False,
    ) -> int | None:  # fmt: skip
        """Saves a checkpoint now, or under a name.

        Without a tag: asks for a checkpoint of the next boundary, due or not, and returns None at once. If all ranks
        ask within one iteration, its end is saved; if one asks, all save the first boundary that none of them has
        passed.

        With a tag: on all ranks alike, saves the job as it is now under that name, and returns the step once it is
        committed. In loops without steps() and end_step() the iteration, if it has updated, ends here; with end_step(),
        call it between two iterations. Retention never removes what `restore(tag=...)` would take.

        `client_state` holds what `state=` may, each rank's own; `restore()` returns it as `client_state`. `timeout` is
        in seconds, by default commit.timeout_s; a checkpoint not committed by then continues, and `wait(step)` waits
        for it. `within_window` allows the call within an accumulation window, whose gradients are then not saved: a
        resume restarts the window.

        With a tag it raises BoundaryError (within an accumulation window or an iteration of steps(), before
        `restore()`, or with tags that differ), StateError for a client_state that cannot be written, CommitError or
        DeadlineError.
        """
        if tag is not None:
            return self._workings.saves.save(tag, client_state, timeout=timeout, within_window=within_window)
        if client_state is not None:
            raise ValueError("client_state is saved under a tag only")
        self._workings.saves.ask()
        return None

    def restore(
        self, step: int | None = None, *, tag: str | None = None, saved: bool = False, on_missing: str | None = None,
        partly: bool = False, cast: str | None = None, objects: Mapping[str, str] | None = None,
        model_only: bool = False,
    ) -> int:  # fmt: skip
        """Loads the lineage's newest commit whose shards verify, the same on all ranks, and returns its step. 0 if
        nothing was ever committed in the lineage.

        With `step`, exactly that commit; with `tag`, the newest that `save()` made under it, the lineage's if it has
        one; with `saved`, the lineage's newest that `save()` made at all. Later commits are abandoned: the lineage
        continues from the chosen one, which stays on disk until the next commit. `on_missing` is "error" (the default
        with a step or tag) or "fresh" (the default without: start from 0). With `partly` the model may have parameters
        and buffers that the checkpoint lacks: they stay as they are, and `lacking` names them.

        The job may have another number of ranks, another wrapper, or other groups than the one that saved: each rank
        reads its part from the shards that have it. A warning says so if the number of ranks differs. `cast="target"`
        allows rounding to the dtypes that parameters and optimizer state have here. `objects={name: "rank0"}` gives
        rank 0's `state` object to all ranks, if those of the checkpoint differ; `objects={name: "anew"}` restarts a
        loader's epoch, if another number of ranks cannot continue within it
        (`layerwise_dist.data.ElasticDistributedSampler` can).

        With `model_only` a training starts from the weights of a checkpoint: parameters, buffers and extra states are
        loaded; optimizer, random numbers and `state` objects stay as they are. It returns step 0, and what is committed
        from then on is a new lineage, which the next `restore()` finds. `on_missing` is then "error" by default.
        `layerwise_dist.load` does the same from another training's directory.

        Raises MismatchError (another model, optimizer or state: nothing was loaded), NotFoundError, DamageError
        (nothing in the lineage verifies, or damage leaves the lineage unclear), OSError (disk trouble), CommitError or
        DeadlineError.
        """
        terms = Terms(partly=partly, cast=cast, objects=objects or {})
        return self._workings.restores.restore(
            step, tag=tag, saved=saved, on_missing=on_missing, terms=terms,
            model_only=model_only,
        )  # fmt: skip

    @property
    def restored_from(self) -> str | None:
        """The folder of the checkpoint that `restore()` loaded; None if it loaded none."""
        return self._workings.restores.restored_from

    @property
    def client_state(self) -> dict[str, Any] | None:
        """What `save()` was given with the restored checkpoint; None if `save()` did not make it."""
        return self._workings.restores.client_state

    @property
    def lacking(self) -> list[str]:
        """The model's tensors (`<kind>/<fqn>`) that the checkpoint lacked; empty but for `restore(partly=True)`."""
        return self._workings.restores.lacking

    # -- what is where ------------------------------------------------------------------------------------------

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

        `timeout` is in seconds, by default commit.timeout_s. Raises CommitError if that checkpoint was aborted;
        DeadlineError at the timeout, after which the checkpoint continues and can be awaited again; ValueError for
        another level.
        """
        if level not in ("staged", "durable", "committed"):
            raise ValueError(f"level must be 'staged', 'durable' or 'committed', not {level!r}")
        self._workings.participant.wait(step, level, timeout)

    def drain(self, timeout: float | None = None) -> None:
        """Waits until nothing reads the model's memory and every checkpoint in flight is decided.

        Call it before something changes parameters or optimizer state between iterations, such as DeepSpeed's
        `offload_states()`. `timeout` is in seconds, by default commit.timeout_s; raises DeadlineError.
        """
        self._workings.captures.drain(self.config.commit.timeout_s if timeout is None else timeout)

    @property
    def metadata(self) -> CheckpointMetadataManager:
        """The records of the directory: manifests, the lineage, what is in which shard."""
        return self._workings.manager

    def stats(self) -> dict[str, float | int]:
        """Counters of this rank since attach(): bytes, checkpoints, and how long the training thread was stalled."""
        workings = self._workings
        return workings.statistics.report(
            *workings.participant.outcomes, workings.adapter.buffers, workings.frozen,
            newest=self._reached("committed"), in_flight=workings.participant.in_flight,
            drifts=workings.participant.drifts, audit_s=workings.attempts.audit_s,
            every_n_steps=workings.pacing.steps, interval_changes=workings.pacing.changes,
            reads=workings.adapter.readers.counts,
        )  # fmt: skip

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Writes what happens to each layer in the next saved step, and when, into `path`.

        JSON in the Trace Event Format, for Perfetto (ui.perfetto.dev): gradients, updates, captures and writes. The
        file appears at the first boundary after that step's writes, or at `close()`. Raises BoundaryError while a trace
        runs.
        """
        self._workings.tracing.begin(path, self._workings.framework.params)

    def on_commit(self, callback: OnCommit) -> None:
        """Calls `callback(step, path)` after each later commit of this job; `path` is the checkpoint's folder. Each
        rank has its own callbacks.

        Callbacks run one after the other on their own thread, so training does not wait for them; `close()` does,
        within its deadline. What one raises is logged under its name. A callback slower than checkpoints may find the
        folder retired. Raises BoundaryError after `close()`.
        """
        self._workings.notices.on_commit(callback)

    def on_failure(self, callback: OnFailure) -> None:
        """Calls `callback(step, reason)` when a checkpoint is aborted, and once with `step` None when checkpointing has
        stopped: all ranks then raise CommitError at one step. A checkpoint that was skipped (`when_full`), or that a
        newer one overtook, is no failure. Otherwise as `on_commit`.
        """
        self._workings.notices.on_failure(callback)

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Seals what is open, waits until everything is decided (commit.timeout_s), and releases model and directory.

        Called during an exception (then for 10 s at most), or at the process's exit, it discards what is not sealed.
        Safe to call twice. Raises CommitError if the last checkpoint was not committed, DeadlineError if that is not
        known in time.
        """
        self._workings.closing.end(orderly=sys.exc_info()[0] is None)

    def __enter__(self) -> LayerwiseEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._workings.closing.end(orderly=kind is None)

    def _reached(self, level: str) -> int | None:
        self._workings.captures.settle()
        return self._workings.participant.reached(level)


def workings_of(engine: LayerwiseEngine) -> Workings:
    """What it is made of: for calls of a script that are not `LayerwiseEngine`'s own, and for tests."""
    return engine._workings
