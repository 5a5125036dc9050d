# SPDX-License-Identifier: Apache-2.0
"""Where an iteration ends: events of the training loop in, boundaries out.

A checkpoint at step t holds the process after all that iteration t does and before anything of iteration t+1. No hook
of torch sees that point in every loop, so there are four ways to know it, and each checkpoint records which one it
was:

explicit
    `for step in ckpt.steps(total)`: the loop's back edge; or `ckpt.end_step()` as the body's last statement. Once
    either was used, nothing else makes a boundary.
loader
    The moment before a `for` draws the next batch (or finds no more) from an attached loader that feeds the training,
    if an update happened since the last boundary. A loader feeds the training when its iterator is alive and was drawn
    from before a grad-enabled training forward; an evaluation's loader never is, since a `for` lets go of its iterator
    when it ends.
call
    `ckpt.save()`: the iteration, if it has updated, ends there. In explicit loops only between `end_step()` and the
    next.
inferred
    Everything else: the next training forward after an update, with the random numbers as of the update. Exact only if
    the loop draws nothing between the update and its end; warned of once.

A batch drawn after an iteration's last forward belongs to the next one (prefetch). Its loader and the random numbers
are then recorded as before that draw, `rng_event` is "draw", and a resume puts them back when that batch is drawn
again. A batch drawn *before* the forward of the one ahead of it looks like an ordinary draw, and so do those of a queue
of several; that is recognized by the pace and warned of.

What cannot be seen: a GradScaler that skips a step calls no hook. Without steps()/end_step() such an iteration is no
boundary and is counted together with the next one; with them it counts, with `updated=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from layerwise_dist.errors import BoundaryError, MismatchError
from layerwise_dist.loop.attribution import Attribution
from layerwise_dist.loop.counting import Counting
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.loop.loose import LooseLoaders
from layerwise_dist.loop.mark import BoundaryMark, Kind
from layerwise_dist.loop.once import Log, Once
from layerwise_dist.loop.placed import PlacedTap
from layerwise_dist.loop.put_back import PutBack
from layerwise_dist.loop.rng import LateRng
from layerwise_dist.loop.sealed import BoundaryState


class Boundary:
    """Counts the iterations of one training loop, on the one thread that makes it (BoundaryError on any other).

    Events come in here, and go on to what counts them (`Counting`), to what knows the loaders (`Attribution`,
    `LooseLoaders`), and to what puts random numbers back (`PutBack`). At a boundary it makes the mark from all of them.

    Args:
        on_boundary: called once per boundary, on the training thread, with `completed` already counting it.
        taps: the attached loaders by name; their callbacks are set to this object where they are None.
        log: takes the warnings; each is given once.
        excuse: asked at the third boundary in a row, and each one after, at which no update was observed. True lets it
            pass (a GradScaler whose scale fell); otherwise that is a BoundaryError.
        several: several optimizers update one by one, so that a forward after an update tells nothing: a
            BoundaryError asks for an explicit end.
        by_call: nothing is saved but by `call()`, so how other boundaries are known makes no difference.
        on_last: called before the last iteration of a loop over `steps()`.
    """

    def __init__(
        self,
        on_boundary: Callable[[BoundaryMark], None],
        taps: Mapping[str, LoaderTap],
        *,
        log: Log,
        excuse: Callable[[], bool] | None = None,
        several: bool = False,
        by_call: bool = False,
        on_last: Callable[[], None] | None = None,
    ) -> None:
        self._on_boundary, self._taps, self._on_last = on_boundary, dict(taps), on_last
        self._once = Once(log, {"inferred"} if by_call else ())
        self._counting = Counting(self._once, excuse=excuse, several=several)
        self._loaders = Attribution(self._taps, self._once)
        told = [name for name, tap in self._taps.items() if not isinstance(tap, PlacedTap)]
        self._put_back = PutBack(told, self._counting, self._once)
        self._loose = LooseLoaders(self._starting)
        for tap in self._taps.values():
            tap.on_draw, tap.on_iter = tap.on_draw or self.draw, tap.on_iter or self.iterating

    @property
    def completed(self) -> int:
        """Boundaries completed: the step of the newest one."""
        return self._counting.completed

    @property
    def progress(self) -> bool:
        """Has the iteration that is under way updated, or seen that it must not?"""
        return self._counting.progress

    def start_at(self, step: int) -> None:
        """Count on from `step` completed boundaries."""
        self._counting.completed = step

    # -- explicit boundaries ------------------------------------------------------------------------------------------
    def explicit(self, *, restored_in_loop: bool = False) -> None:
        """Say that this loop will call `end_step()`: needed only if its first iteration updates more than once.

        With `restored_in_loop` what follows restore() is what follows end_step(), a batch drawn by hand say, so that
        random numbers can be put back by restore() itself, unless an attached loader tells better.
        """
        self._counting.check_thread("explicit()")
        self._counting.explicit = True
        self._put_back.restored_in_loop(restored_in_loop)

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps from `completed` up to `total`, with a boundary at each back edge of the loop.

        Leaving by break or by an exception makes no boundary; `close()` seals what break left.
        """
        counting = self._counting
        counting.check_thread("steps()")
        counting.explicit = True
        self._put_back.at_steps()
        while (step := counting.completed) < total:
            if self._on_last is not None and step + 1 == total:
                self._on_last()
            counting.in_steps = True
            try:
                yield step
            finally:  # also where the loop is left
                counting.in_steps = False
            if counting.completed != step:
                raise BoundaryError(
                    f"steps() yielded step {step}, and its body counted {counting.completed - step} boundaries itself: "
                    "use either steps() or end_step()"
                )
            self._mark("explicit")
            if step + 1 == total:
                self._put_back.loop_ended()

    def end_step(self) -> None:
        """The iteration ends here."""
        self._counting.end_step()
        if self._mark("explicit").rng_event == "boundary":
            self._put_back.step_ended()

    @property
    def told(self) -> bool:
        """Whether the loop tells where its iterations end, by steps() or end_step()."""
        return self._counting.explicit

    @property
    def step_of_call(self) -> int:
        """The step that `call()` would be of. Raises BoundaryError within an iteration that ends elsewhere."""
        return self._counting.step_of_call()

    def call(self) -> BoundaryMark | None:
        """The script saves now: the iteration ends here if it has updated. Otherwise nothing is counted, and a mark of
        the last boundary, as it is now, is returned, and `on_boundary` does not hear of it.
        """
        if self.step_of_call > self.completed:
            self._mark("call")
            return None
        return self._make_mark("explicit" if self.told else "call", (), self.completed)

    # -- events of the optimizer and the model ------------------------------------------------------------------------
    def update_starting(self, in_closure: bool = False) -> None:
        """An optimizer is about to update. With `in_closure` its closure runs first, then this is called again."""
        self._counting.update_starting(in_closure)

    def update_done(self) -> None:
        """The optimizer has updated."""
        self._counting.update_done()
        if not self.told:
            self._loaders.updated()

    def update_skipped(self) -> None:
        """The optimizer saw that it must not update (fp16 overflow); the iteration counts, with `updated=False`."""
        self._counting.update_skipped()
        if not self.told:
            self._loaders.updated()

    def training_forward(self) -> None:
        """The root's forward begins, with gradients, in training mode, and has drawn no random numbers yet."""
        self._counting.check_thread("a training forward")
        self._put_back.at_forward()
        self._loose.forward()
        if self._counting.forward_ends(self._loaders.in_for):
            self._mark("inferred")
        self._loaders.forward()

    # -- events of the loaders ----------------------------------------------------------------------------------------
    def draw(self, tap: LoaderTap, by_for: bool) -> None:
        """A batch is about to be drawn from `tap`, by a `for` or by hand."""
        self._counting.check_thread(f"loader {tap.name!r} was drawn from")
        feeding = self._loaders.feeding
        self._put_back.at_draw(tap.name, may_feed=not feeding or tap in feeding)
        if tap.aside:
            return
        if by_for and self._counting.may_be_over and tap in feeding:
            self._mark("loader", at=(tap.name,))
        self._loaders.draw(tap, after_update=self._counting.progress)

    def iterating(self, tap: LoaderTap) -> None:
        """`iter()` of the tap's loader is about to run; it draws random numbers too."""
        if self._counting.may_be_over:
            self._loaders.iterating(tap)

    def _starting(self, loader: Any, name: str) -> bool | None:
        """A DataLoader is about to be started (`LooseLoaders`)."""
        if not self._counting.here or any(tap.loader is loader for tap in self._taps.values()):
            return None
        self._put_back.at_start(name, loader.dataset)
        return self._counting.in_steps or any(tap.in_for for tap in self._taps.values())

    # -- coming back and ending ---------------------------------------------------------------------------------------
    def restore(self, state: BoundaryState) -> None:
        """Take up `BoundaryMark.state()`: loaders at once, random numbers at the event they were taken at.

        Raises MismatchError if the checkpoint holds a loader that is not attached under that name.
        """
        self._counting.check_thread("restore()")
        missing = sorted(state["loaders"].keys() - self._taps.keys())
        if missing:
            raise MismatchError(
                f"the checkpoint holds the position of loaders {missing}, this job has {sorted(self._taps)}"
            )
        for name, snapshot in state["loaders"].items():
            self._taps[name].restore(snapshot)
        self._counting.begin()
        self._loaders.begin_loop()
        self._put_back.restore(state)

    def close(self, *, seal: bool = True) -> bool:
        """Seal an iteration that has updated and was not ended (the loop was left by break). True if there was one.

        The position of a loader whose `for` was left counts, so that a longer run goes on within the epoch.
        `seal=False`: the job ends by an exception, and what is unsealed may be half an iteration.
        """
        try:
            if not (seal and self._counting.progress):
                return False
            self._counting.check_thread("close()")
            self._mark("close")
            return True
        finally:
            self._loose.close()

    # -- inside -------------------------------------------------------------------------------------------------------
    def _mark(self, kind: Kind | Literal["close"], at: tuple[str, ...] = ()) -> BoundaryMark:
        self._counting.check_thread("a boundary")
        doubts, ended = self._loose.boundary(closing=kind == "close")
        self._put_back.iteration_ended(ended)
        mark = self._make_mark(kind, at, self.completed + 1)
        for doubt in doubts:
            self._once(doubt, doubt)
        self._counting.check_idle()
        self._counting.count(kind, mark.resume_kind)
        self._loaders.check()
        self._loaders.begin()
        self._on_boundary(mark)
        mark.over()
        return mark

    def _make_mark(self, kind: Kind | Literal["close"], at: tuple[str, ...], step: int) -> BoundaryMark:
        closing = kind == "close"
        resume = self._counting.resume_kind(kind, self._loaders.in_for)
        inferred, explicit = resume == "inferred", resume == "explicit"
        snapshots, ahead = self._loaders.stand(inferred=inferred, closing=closing)
        updated, feeding = self._counting.updated, self._loaders.feeding
        if ahead is not None:
            after = LateRng() if explicit else None
            return BoundaryMark(
                step, kind, updated, LateRng(ahead.rng), "draw", snapshots, resume, at=(ahead.tap.name,),
                rng_after=after,
            )  # fmt: skip
        random = self._loaders.rng_there(inferred=inferred)
        starts = self._put_back.starts() if explicit and not feeding else ()
        at = at or tuple(tap.name for tap in feeding)
        return BoundaryMark(
            step, kind, updated, random, "boundary", snapshots, resume, at=at, rng_after=None, starts=starts
        )
