"""What the engine does when an optimizer updates: fences what the update overwrites, and captures what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerwise_dist.capture.lease import Capture
from layerwise_dist.capture.survey import Survey
from layerwise_dist.errors import BoundaryError, DamageError, LayerwiseError

if TYPE_CHECKING:
    from layerwise_dist.engine.engine import LayerwiseEngine


@dataclass(slots=True)
class Update:
    """One update of an optimizer. `again`: an earlier one of this iteration has opened the attempt already. `layers`:
    the only ones that it can change, or None.
    """

    again: bool
    layers: Collection[str] | None = None
    fenced: bool = False  # all of it
    asked: bool = False  # whether the attempt can be opened before the update is over
    found: Survey | None = None  # what there was then, if all of it was where the last attempt had it
    early: bool = False  # it was, or could not be
    drained: bool = False


class Updates:
    """A part of `LayerwiseEngine`, and of nothing else: it works on the engine's own attributes. It is what optimizers'
    adapters know as `UpdateEvents`.
    """

    def update_starting(
        self: LayerwiseEngine, *, in_closure: bool = False, layers: Collection[str] | None = None
    ) -> None:
        """An update of the optimizer begins (`UpdateEvents`, as are the next six)."""
        self._boundary.update_starting(in_closure=in_closure)
        if not in_closure:
            self._may_update()
            with self._statistics.stall("fence"):
                self._frozen.before_update(lambda: self._optimizer.trained)
            self._update = Update(self._open is not None, layers)

    def before_closure(self: LayerwiseEngine, layers: Collection[str] | None = None) -> None:
        """Fences what is sealed, though the closure has yet to run."""
        with self._statistics.stall("fence"):
            self._end_leases(layers)

    def wants_layers(self: LayerwiseEngine) -> bool:
        """Whether the update that comes had better go layer by layer: it is saved, or what is read in place is in its
        way.
        """
        return self._scheduler.due(self._boundary.completed + 1) or not all(c.settled for c in self._captures)

    def wanted(self: LayerwiseEngine) -> bool:
        """Whether what the running update leaves is to be saved."""
        return self._scheduler.due(self._boundary.completed + 1)

    def overwriting(self: LayerwiseEngine, layers: Collection[str] | None = None) -> None:
        """What is leased of these layers, or of all, is written or copied away; else its attempt ends."""
        update = self._update
        assert update is not None, "update_starting() comes first"
        if update.fenced:
            return
        update.fenced = layers is None
        layers = update.layers if layers is None else layers
        if self._trace is not None:
            self._trace.overwriting(layers)
        if not self._captures and not update.again:
            return  # as nearly always in an update that goes unit by unit
        with self._statistics.stall("fence"):
            self._end_leases(layers)
            if update.again and not update.drained and self._open is not None:
                update.drained = self._guarded(self._open, self._open.drain)

    def updated(self: LayerwiseEngine, layers: Collection[str]) -> None:
        """These layers change no more in this update: what is complete of a due checkpoint is captured at once."""
        update = self._update
        assert update is not None, "update_starting() comes first"
        if self._trace is not None:
            self._trace.updated(layers)
        if update.again or self._optimizer.several or not layers or not self._replicas.agreed:
            return
        with self._statistics.stall("open"):
            if not update.asked:
                update.asked = True
                self._heed_replicas()
                step = self._boundary.completed + 1
                update.found = self._attempts.steady() if self._scheduler.due(step) else None
                if update.found is not None and self._steady and self._may_wait_for_room:
                    update.early, self._open = True, self._attempts.open(step, update.found)
            if self._open is not None:
                self._take(self._open, self._scheduler.updated(layers))

    def update_done(self: LayerwiseEngine, *, applied: bool) -> None:
        """Opens an attempt, if one is due, or captures anew what an earlier update of this iteration had opened."""
        update, self._update = self._update, None
        assert update is not None, "update_starting() comes first"
        if not update.fenced:
            with self._statistics.stall("fence"):
                self._end_leases(update.layers)
        self._statistics.update_over()
        if self._trace is not None:
            self._trace.update_done()
        if not applied:
            self._boundary.update_skipped()
            return
        self._updates += 1
        self._unsaved = True
        self._boundary.update_done()
        step = self._boundary.completed + 1
        with self._statistics.stall("open"):
            if update.again:
                if self._open is not None and update.drained:
                    self._guarded(self._open, self._open.take_all)
                return
            if self._open is None and not update.early and self._may_begin and self._scheduler.due(step):
                self._begin(step, patience_s=self.config.fence_timeout_s if self._last else None)
                self._steady |= self._open is not None and self._open.survey is update.found
            elif self._open is not None:
                self._take(self._open, self._scheduler.flush())

    @property
    def _may_wait_for_room(self: LayerwiseEngine) -> bool:
        """Whether an attempt may be opened before its update is over. In a backward other ranks may wait for this one,
        and room for their verdicts: then only if there is room at once.
        """
        alone = self.config.update != "in_backward" or self._participant.world_size == 1
        return alone or self._participant.in_flight < self.config.max_in_flight

    @property
    def _may_begin(self: LayerwiseEngine) -> bool:
        """Whether an update that is due opens its checkpoint; else the boundary does."""
        return self._replicas.agreed and not self._optimizer.several

    def _begin(self: LayerwiseEngine, step: int, *, patience_s: float | None = None) -> None:
        """Opens the attempt of `step` behind its update, and captures all."""
        if self._scheduler.set_order(self._optimizer.layer_order):
            self._surveyor.forget()
        self._heed_replicas()
        self._unsaved = False
        self._open = self._attempts.open(step, patience_s=patience_s)
        if self._open is not None:
            self._take(self._open, self._scheduler.flush())

    def _heed_replicas(self: LayerwiseEngine) -> None:
        if self._replicas.heed():
            self._surveyor.forget()

    def _may_update(self: LayerwiseEngine) -> None:
        if self._restorer.undefined is not None:
            raise DamageError(self._restorer.undefined)
        if not self._ready:
            raise BoundaryError(f"{self.config.path} already holds checkpoints: {self._way_on}")

    def _take(self: LayerwiseEngine, capture: Capture, batches: Collection[int]) -> None:
        if batches and self._guarded(capture, lambda: capture.take(batches)) and self._trace is not None:
            self._trace.captured(capture, batches)

    def _end_leases(self: LayerwiseEngine, layers: Collection[str] | None = None) -> None:
        """These layers, or all, are overwritten next."""
        for capture in self._captures:
            self._attempts.learn(capture.fence(layers), "the next update")
        self._captures = [capture for capture in self._captures if not capture.over]

    def _guarded(self: LayerwiseEngine, capture: Capture, action: Callable[[], Any]) -> bool:
        """Runs a step of a capture; if its lease is broken the attempt ends for all ranks, and training goes on.

        Raises as `Attempts.fail`.
        """
        try:
            action()
            return True
        except (LayerwiseError, OSError) as error:
            if capture is self._open:
                self._open = None
            self._attempts.fail(capture.write.attempt, error, capture.write)
            return False

    def _give_up(self: LayerwiseEngine, reason: str) -> None:
        if self._open is not None:
            self._participant.failed(self._open.write.attempt, reason, self._open.write)
            self._open = None
