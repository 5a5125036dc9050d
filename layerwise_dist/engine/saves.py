"""What a script asks a `LayerwiseEngine` for by a call: save now, come back, wait."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerwise_dist import _native
from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory, ParentRef
from layerwise_dist.commit.records import LONGEST_TAG, is_tag
from layerwise_dist.commit.session import follow
from layerwise_dist.errors import BoundaryError, DamageError, DeadlineError
from layerwise_dist.frameworks.parts import WHOLE, Parts
from layerwise_dist.restore import loader
from layerwise_dist.restore.choice import Wish
from layerwise_dist.storage import typed_json
from layerwise_dist.supervision.patience import within

if TYPE_CHECKING:
    from layerwise_dist.engine.engine import LayerwiseEngine

log = logging.getLogger("layerwise_dist")


class SaveAndRestore:
    """A part of `LayerwiseEngine`, and of nothing else: it works on the engine's own attributes."""

    # -- saving when asked -------------------------------------------------------------------------------------------

    def save(
        self: LayerwiseEngine, tag: str | None = None, client_state: Mapping[str, Any] | None = None, *,
        timeout: float | None = None, within_window: bool = False,
    ) -> int | None:  # fmt: skip
        """Without a tag: asks for a checkpoint of the next boundary, due or not, and returns at once, with None. If all
        ranks ask within one iteration, it is that one's end; if one asks, all save the first boundary that none of them
        has passed, the same or soon after it.

        With a tag: saves the job as it is now under that name, and returns the step once it is committed. On all ranks
        alike. In loops without steps() and end_step() the iteration, if it has updated, ends here; with end_step() it
        is called between two iterations. Retention never removes what `restore(tag=...)` would take.
        `client_state` is what `state=` takes as a dict, each rank's own;
        `restore()` gives it back as `client_state`. `timeout` is in seconds, by default commit.timeout_s; a checkpoint
        that is not committed by then is still on its way: `wait(step)` goes on waiting for it. `within_window` allows
        it within an accumulation window too, whose gradients are then not saved: a resume begins the window anew.

        With a tag it raises BoundaryError (within an accumulation window or an iteration of steps(), before
        `restore()`, or with tags that differ), StateError for a client_state that cannot be written, CommitError or
        DeadlineError.
        """
        if tag is None:
            if client_state is not None:
                raise ValueError("client_state is saved under a tag only")
            self._ask_to_save()
            return None
        timeout = self.config.commit.timeout_s if timeout is None else timeout
        deadline = time.monotonic() + timeout
        step, state = self._check_save(tag, within_window), dict(client_state or {})
        together(self._participant, "save", lambda: typed_json.dumps(state, path="client_state"))
        if not self._agree_to_save(tag):
            # One on its way at a time, so that there is room. All begin it or none: their numbering stays in step.
            together(self._participant, "save", lambda: self.drain(max(0.0, deadline - time.monotonic())))
            self._compare_replicas()
            self._begin(step)
        attempt = self._attempts.newest
        assert attempt is not None
        if self._committer is not None:
            self._committer.tag(attempt.seq, tag)
        self._client_state = state
        try:
            mark = self._boundary.call()
            if mark is not None and self._open is not None:
                self._seal_open(mark)
        finally:
            self._client_state = None
        self._participant.wait_for_attempt(attempt, max(0.0, deadline - time.monotonic()))
        return attempt.step

    def _check_save(self: LayerwiseEngine, tag: str, within_window: bool) -> int:
        """The step that `save(tag)` would save now. Raises as it does, before it asks other ranks anything."""
        if self._closed:
            raise BoundaryError("save() after close()")
        if self._optimizer.mid_window and not within_window:
            raise BoundaryError("save() within an accumulation window: its gradients would be lost")
        if not is_tag(tag):
            raise ValueError(f"a tag has 1 to {LONGEST_TAG} printable characters: {tag!r}")
        self._may_update()
        return self._boundary.step_of_call

    def _agree_to_save(self: LayerwiseEngine, tag: str) -> bool:
        """Whether all ranks have a capture of this iteration open; if not, those that have one give it up."""

        def decide(votes: list[list[Any]]) -> bool:
            tags = {tag for tag, _ in votes}
            if len(tags) > 1:
                raise BoundaryError(f"save() under different tags on different ranks: {sorted(tags)}")
            return all(is_open for _, is_open in votes)

        agreed = self._participant.agree("save under a tag", [tag, self._open is not None], decide)
        if not agreed and self._open is not None:
            self._give_up("another rank could not begin it")
        return bool(agreed)

    def drain(self: LayerwiseEngine, timeout: float | None = None) -> None:
        """Waits until nothing reads the model's memory any more and every checkpoint on its way is decided.

        Call it before something changes parameters or optimizer state between iterations: DeepSpeed's
        `offload_states()`, say. `timeout` is in seconds, by default commit.timeout_s; raises DeadlineError.
        """
        timeout = self.config.commit.timeout_s if timeout is None else timeout
        deadline = time.monotonic() + timeout
        for capture in self._captures:
            if not capture.wait_read(max(0.0, deadline - time.monotonic())):
                raise DeadlineError(f"tensors of step {capture.step} were still being written after {timeout:g} s")
        self._end_leases()
        self._frozen.drain(max(0.0, deadline - time.monotonic()))
        self._participant.drain(max(0.0, deadline - time.monotonic()))

    # -- restore ------------------------------------------------------------------------------------------------

    def restore(
        self: LayerwiseEngine, step: int | None = None, *, tag: str | None = None, saved: bool = False,
        on_missing: str | None = None, partly: bool = False,
    ) -> int:  # fmt: skip
        """Loads the lineage's newest commit whose shards verify, the same on all ranks; returns its step. 0 if nothing
        was ever committed in the lineage.

        With `step`, exactly that commit; with `tag`, the newest that `save()` made under it, the lineage's if it has
        one; with `saved`, the lineage's newest that `save()` made at all. What was committed after it is abandoned: the
        lineage goes on from there. It stays on the disk until the next commit.
        `on_missing` is "error" (the default with a step or tag) or "fresh" (the default without: start from 0).
        With `partly` the model may have parameters and buffers that the checkpoint has not: they stay as they are, and
        `lacking` names them.
        Raises MismatchError (another model, optimizer, state or world size: nothing was loaded), NotFoundError,
        DamageError (nothing of the lineage verifies, or damage leaves open what that is), OSError (the disk is in
        trouble), CommitError or DeadlineError.
        """
        if on_missing not in (None, "fresh", "error"):
            raise ValueError(f"on_missing must be 'fresh' or 'error', not {on_missing!r}")
        if (step is not None) + (tag is not None) + saved > 1:
            raise ValueError("restore() takes one of step, tag and saved")
        wish = Wish(step, tag, saved)
        fresh = (on_missing or ("error" if wish.certain else "fresh")) == "fresh"
        self._before_restore(wish)
        try:
            return self._restore(wish, fresh_if_missing=fresh, partly=partly)
        finally:
            if self._committer is not None:
                self._committer.hold(False)

    def _restore_parts(self: LayerwiseEngine, parts: Parts, *, tag: str | None, root: str | None = None) -> int:
        """As `restore(tag=tag)`, or `restore(saved=True)` without a tag, of `parts` of the checkpoint.

        `root` is another directory than this engine's, which is only read. With `parts.module_only` `completed`, random
        numbers and `state` objects stay as they are.
        """
        if self._restorer.undefined is not None and parts != WHOLE:
            raise DamageError(self._restorer.undefined)
        wish = Wish(None, tag, tag is None)
        self._before_restore(wish)
        try:
            if root is None:
                return self._restore(wish, fresh_if_missing=tag is None, partly=False, parts=parts)
            return self._restore_from(root, wish, parts)
        finally:
            if self._committer is not None:
                self._committer.hold(False)

    def _before_restore(self: LayerwiseEngine, wish: Wish) -> None:
        if (wish.saved or wish.tag is not None) and not self._boundary.told:
            self._end_for_call()  # as save() does: what was open is of the iteration that ends here
        if self._open is not None:
            raise BoundaryError("restore() inside an iteration: end it first (steps() or end_step())")
        self.drain()
        self._frozen.forget()

    def _restore_from(self: LayerwiseEngine, root: str, wish: Wish, parts: Parts) -> int:
        manager = CheckpointMetadataManager(_native.PosixEnv(), root)
        restorer = self._restorer.of(manager)
        self.restored_from = self.client_state = None
        self.lacking = []
        try:
            found = restorer.newest(
                wish, lambda: self._looked_for(manager), fresh_if_missing=not wish.certain, parts=parts
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
        self._begin_behind_newest()
        log.info("rank %d: restored step %d from %s", self._framework.rank, attempt.step, root)
        return attempt.step

    def _end_for_call(self: LayerwiseEngine) -> None:
        """The iteration ends here if it has updated, as with `save(tag)`."""
        self._boundary.call()

    def _begin_behind_newest(self: LayerwiseEngine) -> None:
        """The model comes from elsewhere. What is saved from now on follows the newest commit of the directory all the
        same: until then, a restart finds that one. All ranks together.
        """

        def decide(_: list[Any]) -> list[Any]:
            inventory = self._looked_for(self.metadata)
            newest = next(iter(inventory.lineage()), None)
            if newest is None:
                return [None, not inventory.empty]
            return [[newest.seq, newest.attempt], not inventory.is_next(newest)]

        head, leaves = self._participant.agree("continue what is in the directory", None, decide)
        self._follow(None if head is None else ParentRef(seq=head[0], attempt=head[1]), new_branch=leaves)
        self._restorer.undefined = None
        self._ready = True

    def _restore(
        self: LayerwiseEngine, wish: Wish, *, fresh_if_missing: bool, partly: bool, parts: Parts = WHOLE
    ) -> int:
        found = self._restorer.newest(
            wish, self._held_inventory, fresh_if_missing=fresh_if_missing, partly=partly, parts=parts
        )
        self.restored_from = self.client_state = None
        self.lacking = []
        if found is None:
            # If something else was asked for, this goes on beside what is there, as attach(fresh=True) does.
            beside = not self._info.empty or self._participant.reached("committed") is not None
            self._follow(None, new_branch=beside and wish != Wish())
            self._ready = True
            return self._boundary.completed
        attempt, loading, leaves = found
        self._adopt(loading, parts)
        self.lacking = loading.lacking
        kept = self._follow(ParentRef(seq=attempt.seq, attempt=attempt.text), new_branch=leaves)
        if loading.base is not None and loading.base[0].attempt in kept:
            self._frozen.restored(*loading.base)
        self.restored_from = os.path.join(self.config.path, attempt.folder)
        self._restorer.undefined = None
        self._ready = True
        log.info("rank %d: restored step %d", self._framework.rank, attempt.step)
        return attempt.step

    def _held_inventory(self: LayerwiseEngine) -> Inventory:
        """What is there, on rank 0; retention removes none of it before the restore is over."""
        assert self._committer is not None
        self._committer.hold(True)
        return self._looked_for(self.metadata)

    def _looked_for(self: LayerwiseEngine, manager: CheckpointMetadataManager) -> Inventory:
        return within(self._participant.disk_s, "the look for checkpoints", manager.inventory)

    def _adopt(self: LayerwiseEngine, loading: loader.LoadPlan, parts: Parts) -> None:
        sealed = loading.sealed
        if self._replicas.forget():
            self._surveyor.forget()

        def adopt() -> None:
            if parts.takes_optimizer:
                self._optimizer.adopt(loading.states, sealed["optimizer"])
            else:
                self._optimizer.keep(sealed["optimizer"])

        # An optimizer's own load_state_dict() may run in it, and fail.
        self._all("adopt", adopt)
        # And that of an object in `state=`, or of a module with set_extra_state().
        self._all("put back what is no tensor", lambda: self._put_back(sealed, parts))
        self.client_state = sealed["client_state"]
        if not parts.module_only:
            self._participant.restored(sealed["step"])

    def _all(self: LayerwiseEngine, what: str, action: Callable[[], None]) -> None:
        """Damage is none of a checkpoint here, so that no other one is tried: an object's own code may raise it."""
        sound, _ = together(self._participant, what, action)
        if not sound:
            raise DamageError(f"{what}: see the warnings; parameters, optimizer state and objects are undefined")

    def _put_back(self: LayerwiseEngine, sealed: dict[str, Any], parts: Parts) -> None:
        if parts.module_only:
            self._sealer.put_extra_states(sealed)
            return
        self._sealer.put(sealed)
        self._updates, self._unsaved = sealed["updates"], False
        self._boundary.start_at(sealed["step"])
        self._statistics.restored(sealed["step"])
        self._boundary.restore(sealed["boundary"])

    def _follow(self: LayerwiseEngine, head: ParentRef | None, *, new_branch: bool) -> list[str]:
        """From where the lineage goes on. A roll-back is made durable before the first step that follows it.

        Returns the bases that `head` refers to, which are there and stay as long as checkpoints refer to them.
        """
        seq = self._attempts.take_seq() if new_branch else None
        return follow(self._participant, self._committer, head, seq)
