# SPDX-License-Identifier: Apache-2.0
"""Restores a checkpoint into the live job, and decides where the lineage continues."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from layerwise_dist import _native
from layerwise_dist.capture.frozen import FrozenBases
from layerwise_dist.capture.sealed import Sealer
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory, ParentRef
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import CommitRequests, follow
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.last_step import LastStep
from layerwise_dist.engine.pacing import Pacing
from layerwise_dist.engine.replicas import Replicas
from layerwise_dist.engine.statistics import Statistics
from layerwise_dist.errors import BoundaryError, DamageError
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.parts import WHOLE, Parts
from layerwise_dist.loop.boundary import Boundary
from layerwise_dist.loop.elastic import CHOICES
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore.choice import Wish
from layerwise_dist.restore.loader import LoadPlan
from layerwise_dist.restore.restorer import Restorer, Terms
from layerwise_dist.supervision.patience import within

log = logging.getLogger("layerwise_dist")

_WAY_ON = "call restore() before the first step, or attach(fresh=True) to start anew beside them"


class Restores:
    """All ranks together, each on its training thread.

    Attributes:
        ready: whether what there is may be trained on: nothing is in the directory, or it was said what follows it.
        restored_from: the folder of the checkpoint that was loaded last; None if there was none.
        client_state: what `save()` was given with it; None if it was not made by `save()`.
        lacking: the model's tensors (`<kind>/<fqn>`) that it had not.
    """

    def __init__(
        self, config: LayerwiseConfig, restorer: Restorer, captures: Captures, boundary: Boundary, *,
        attempts: Attempts, manager: CheckpointMetadataManager, participant: Participant,
        committer: CommitRequests | None, optimizer: OptimizerAdapter, surveyor: Surveyor, replicas: Replicas,
        frozen: FrozenBases, sealer: Sealer, statistics: Statistics, last: LastStep, pacing: Pacing, empty: bool,
        fresh: bool,
    ) -> None:  # fmt: skip
        """`empty`: the directory was empty at the start. `fresh`: the job starts over beside what is there."""
        self._config, self._restorer, self._captures, self._boundary = config, restorer, captures, boundary
        self._attempts, self._manager, self._participant, self._committer = attempts, manager, participant, committer
        self._optimizer, self._surveyor, self._replicas = optimizer, surveyor, replicas
        self._frozen, self._sealer, self._statistics, self._last = frozen, sealer, statistics, last
        self._pacing, self._empty = pacing, empty
        self.ready = fresh or empty
        self._way_on = _WAY_ON
        self.restored_from: str | None = None
        self.client_state: dict[str, Any] | None = None
        self.lacking: list[str] = []

    def advise(self, way_on: str) -> None:
        """The error of a script that trains in a directory with checkpoints before restoring one."""
        self._way_on = way_on

    def check_ready(self) -> None:
        """Raises DamageError or BoundaryError where what there is must be neither trained on nor saved."""
        if self._restorer.undefined is not None:
            raise DamageError(self._restorer.undefined)
        if not self.ready:
            raise BoundaryError(f"{self._config.path} already holds checkpoints: {self._way_on}")

    def restore(
        self, step: int | None, *, tag: str | None, saved: bool, on_missing: str | None, terms: Terms,
        model_only: bool = False,
    ) -> int:  # fmt: skip
        """As `LayerwiseEngine.restore`."""
        if terms.cast not in (None, "target"):
            raise ValueError(f"cast must be None or 'target', not {terms.cast!r}")
        if other := {*terms.objects.values()} - {*CHOICES}:
            raise ValueError(f"objects: each must be 'rank0' or, of a loader, 'anew', not {other.pop()!r}")
        if model_only and self._boundary.completed:
            raise BoundaryError(
                f"restore(model_only=True) starts a new training, but this one is at step "
                f"{self._boundary.completed}: call "
                "it before the first step"
            )
        if on_missing not in (None, "fresh", "error"):
            raise ValueError(f"on_missing must be 'fresh' or 'error', not {on_missing!r}")
        if (step is not None) + (tag is not None) + saved > 1:
            raise ValueError("restore() takes only one of step, tag and saved")
        wish = Wish(step, tag, saved)
        fresh = (on_missing or ("error" if wish.certain or model_only else "fresh")) == "fresh"
        if model_only:
            terms = replace(terms, parts=Parts(module_only=True))
        self._prepare(wish)
        try:
            return self._restore(wish, terms, fresh_if_missing=fresh, anew=model_only)
        finally:
            if self._committer is not None:
                self._committer.hold(False)

    def restore_parts(self, parts: Parts, *, tag: str | None, root: str | None = None) -> int:
        """As `restore(tag=tag)`, or `restore(saved=True)` without a tag, of `parts` of the checkpoint.

        `root` is another directory than this engine's, which is only read. With `parts.module_only` `completed`, random
        numbers and `state` objects stay as they are.
        """
        if self._restorer.undefined is not None and parts != WHOLE:
            raise DamageError(self._restorer.undefined)
        wish = Wish(None, tag, tag is None)
        self._prepare(wish)
        try:
            if root is None:
                return self._restore(wish, Terms(parts=parts), fresh_if_missing=tag is None)
            return self._restore_from(root, wish, parts)
        finally:
            if self._committer is not None:
                self._committer.hold(False)

    def begin_after_newest(self) -> None:
        """The model comes from elsewhere. What is saved from now on follows the newest commit of the directory all the
        same: until then, a restart finds that one.
        """

        def decide(_: list[Any]) -> list[Any]:
            inventory = self._looked_for(self._manager)
            newest = next(iter(inventory.lineage()), None)
            if newest is None:
                return [None, not inventory.empty]
            return [[newest.seq, newest.attempt], not inventory.is_next(newest)]

        head, leaves = self._participant.agree("continue what is in the directory", None, decide)
        self.follow(None if head is None else ParentRef(seq=head[0], attempt=head[1]), new_branch=leaves)
        self._restorer.undefined = None
        self.ready = True

    def follow(self, head: ParentRef | None, *, new_branch: bool) -> list[str]:
        """From where the lineage continues. A roll-back is made durable before the first step that follows it.

        Returns the bases that `head` refers to, which are there and stay as long as checkpoints refer to them.
        """
        seq = self._attempts.take_seq() if new_branch else None
        return follow(self._participant, self._committer, head, seq)

    # -- inside -------------------------------------------------------------------------------------------------

    def _prepare(self, wish: Wish) -> None:
        if (wish.saved or wish.tag is not None) and not self._boundary.told:
            self._boundary.call()  # as save() does: what was open is of the iteration that ends here
        if self._captures.open is not None:
            raise BoundaryError("restore() inside an iteration: end it first (steps() or end_step())")
        self._captures.drain(self._config.commit.timeout_s)
        self._frozen.forget()

    def _restore(self, wish: Wish, terms: Terms, *, fresh_if_missing: bool, anew: bool = False) -> int:
        """`anew`: what follows is a lineage of its own, which begins at step 0."""
        found = self._restorer.newest(wish, self._held_inventory, terms, fresh_if_missing=fresh_if_missing)
        self._forget_last()
        if found is None:
            # If something else was asked for, this goes on beside what is there, as attach(fresh=True) does.
            beside = not self._empty or self._participant.reached("committed") is not None
            self.follow(None, new_branch=beside and wish != Wish())
            self.ready = True
            return self._boundary.completed
        attempt, loading, leaves = found
        self._adopt(loading, terms.parts)
        self.lacking = loading.lacking
        if anew:
            self.client_state = None
            self.follow(None, new_branch=True)
            kept = []
        else:
            kept = self.follow(ParentRef(seq=attempt.seq, attempt=attempt.text), new_branch=leaves)
        if loading.base is not None and loading.base[0].attempt in kept:
            self._frozen.restored(*loading.base)
        self.restored_from = os.path.join(self._config.path, attempt.folder)
        self._restorer.undefined = None
        self.ready = True
        log.info("rank %d: restored step %d", self._participant.rank, attempt.step)
        return self._boundary.completed if anew else attempt.step

    def _restore_from(self, root: str, wish: Wish, parts: Parts) -> int:
        manager = CheckpointMetadataManager(_native.PosixEnv(), root)
        restorer = self._restorer.of(manager)
        self._forget_last()
        try:
            found = restorer.newest(
                wish, lambda: self._looked_for(manager), Terms(parts=parts), fresh_if_missing=not wish.certain
            )
            if found is None:
                return self._boundary.completed
            attempt, loading, _ = found
            self._adopt(loading, parts)
        except BaseException:
            self._restorer.undefined = restorer.undefined or self._restorer.undefined
            raise
        self.lacking = loading.lacking
        self.restored_from = os.path.join(root, attempt.folder)
        self.begin_after_newest()
        log.info("rank %d: restored step %d from %s", self._participant.rank, attempt.step, root)
        return attempt.step

    def _forget_last(self) -> None:
        self.restored_from = self.client_state = None
        self.lacking = []

    def _held_inventory(self) -> Inventory:
        """What is there, on rank 0; retention removes none of it before the restore is over."""
        assert self._committer is not None
        self._committer.hold(True)
        return self._looked_for(self._manager)

    def _looked_for(self, manager: CheckpointMetadataManager) -> Inventory:
        return within(self._participant.disk_s, "the search for checkpoints", manager.inventory)

    def _adopt(self, loading: LoadPlan, parts: Parts) -> None:
        sealed = loading.sealed
        if self._replicas.forget():
            self._surveyor.forget()

        def adopt() -> None:
            if parts.takes_optimizer:
                self._optimizer.adopt(loading.states, sealed["optimizer"], loading.lacking_fqns)
            else:
                self._optimizer.keep(sealed["optimizer"], loading.lacking_fqns)

        # An optimizer's own load_state_dict() may run in it, and fail.
        self._all("adopt", adopt)
        # And that of an object in `state=`, or of a module with set_extra_state().
        self._all("restore what is not a tensor", lambda: self._put_back(sealed, parts))
        self.client_state = sealed["client_state"]
        if not parts.module_only:
            self._participant.restored(sealed["step"])

    def _all(self, what: str, action: Callable[[], None]) -> None:
        """Damage is none of a checkpoint here, so that no other one is tried: an object's own code may raise it."""
        sound, _ = together(self._participant, what, action)
        if not sound:
            raise DamageError(f"{what}: see the warnings; parameters, optimizer state and objects are undefined")

    def _put_back(self, sealed: SealedState, parts: Parts) -> None:
        if parts.module_only:
            self._sealer.put_extra_states(sealed)
            return
        self._sealer.put(sealed)
        self._captures.updates, self._last.unsaved = sealed["updates"], False
        self._boundary.start_at(sealed["step"])
        self._statistics.restored(sealed["step"])
        self._pacing.restored(sealed)
        self._boundary.restore(sealed["boundary"])
