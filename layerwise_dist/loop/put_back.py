# SPDX-License-Identifier: Apache-2.0
"""Restores a boundary's random numbers in a resumed loop, and warns if the loop leaves no place for that."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from layerwise_dist.loop import rng
from layerwise_dist.loop.counting import Counting
from layerwise_dist.loop.loose import Started
from layerwise_dist.loop.once import Once
from layerwise_dist.loop.sealed import BoundaryState, RngState


class PendingRng:
    """Restored random numbers that wait for the kind of event at which they were taken.

    Args:
        state: of `BoundaryMark.state()`.
        attached: names of the loaders there are now.
        here: this is the event at which those of an explicit boundary are to be put back.
    """

    def __init__(self, state: BoundaryState, attached: Collection[str], *, here: bool = False) -> None:
        self._state, self._put = state, False
        self._starts = state.get("starts", [])
        self._final = False  # put at the very event of the boundary, whatever comes
        self._at = [name for name in state["at"] if name in attached]
        # A script that saves by a call restores by one, and draws its next batch after either.
        here |= state["kind"] == "inferred" or (state["kind"] == "call" and not attached)
        if here and state["rng_event"] == "boundary":
            self._set(state["rng"])

    def _set(self, state: RngState) -> None:
        rng.put(state)
        self._put = True

    def at_draw(self, name: str) -> None:
        """A batch is about to be drawn from loader `name`."""
        if not self._put and (not self._at or name in self._at):
            self._set(self._state["rng"])

    def at_start(self, name: str) -> None:
        """A loader that `state=` does not name is about to be started."""
        if not self._final and name in self._starts:
            self._set(self._state["rng"])
            self._final = True

    def at_steps(self) -> None:
        """`steps()` starts. A draw before it may have put the generators back already, but this is the better event;
        the start of a loader that comes next is a better one.
        """
        if self._state["kind"] == "explicit" and not self._final:
            self._final = True
            if self._state["rng_event"] == "boundary":
                self._set(self._state["rng"])
            elif self._put:
                after = self._state["rng_after"]
                assert after is not None, "an explicit boundary with a draw ahead has both"
                self._set(after)

    def at_forward(self) -> str | None:
        """The first training forward begins, which ends the wait. Says what went wrong, if anything did."""
        if self._put:
            return None
        self._set(self._state["rng"])
        if self._starts:
            return (
                f"the random numbers of the boundary are restored at the first forward, since no {self._starts[0]} was "
                "started after restore(): this resume is not exact"
            )
        if self._state["kind"] in ("explicit", "call") and self._state["rng_event"] == "boundary":
            return None
        loaders = ", ".join(self._at) or "an attached loader"
        return (
            f"the random numbers of a boundary of kind {self._state['kind']!r} are restored at the first forward, "
            "since no "
            f"batch was drawn from {loaders} after restore(): this resume is not exact"
        )


class PutBack:
    """What waits for a place between one iteration and the next: restored random numbers for the event at which they
    were taken, and those of an explicit end for a look at whether the loop drew any before it went on.

    Args:
        attached: names of the loaders there are.
        counting: what the loop has counted.
        once: takes the warnings.
    """

    def __init__(self, attached: Collection[str], counting: Counting, once: Once) -> None:
        self._attached, self._counting, self._once = attached, counting, once
        self._pending: PendingRng | None = None
        self._in_loop = False
        # The generators where end_step() was called or a loop over steps() ended, until what comes next.
        self._end: tuple[Any, ...] | None = None
        self._ended: list[Started] = []  # loaders that are not attached, and that the next iteration starts anew

    def restored_in_loop(self, told: bool) -> None:
        """Whether what follows restore() is what follows end_step(), unless an attached loader tells better."""
        self._in_loop = told and not self._attached

    def restore(self, state: BoundaryState) -> None:
        """Take up `BoundaryMark.state()`."""
        self._end, self._ended = None, []
        self._pending = PendingRng(state, self._attached, here=self._in_loop)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def iteration_ended(self, ended: list[Started]) -> None:
        """`ended`: the loaders, not attached, that the next iteration starts anew."""
        self._ended = ended

    def starts(self) -> tuple[str, ...]:
        """At whose start the random numbers of an explicit boundary are to be put back, if no attached loader feeds
        the training.
        """
        return () if self._in_loop else tuple(sorted({each.name for each in self._ended}))

    def loop_ended(self) -> None:
        """A loop over steps() is over: the next one is to find the generators as they are."""
        if not self._once.was_given("end"):
            self._end = rng.glance()

    def step_ended(self) -> None:
        """By end_step(), with nothing drawn ahead: the next iteration is to find the generators as they are."""
        if not self._in_loop:
            self.loop_ended()

    # -- events -------------------------------------------------------------------------------------------------------

    def at_steps(self) -> None:
        """`steps()` starts."""
        self._compare_end()
        if self._pending is not None:
            self._pending.at_steps()

    def at_draw(self, name: str, *, may_feed: bool) -> None:
        """A batch is about to be drawn from an attached loader. `may_feed`: no other one feeds the training."""
        if self._pending is not None:
            self._pending.at_draw(name)
        if may_feed:
            self._compare_end()

    def at_start(self, name: str, dataset: object) -> None:
        """A loader that is not attached is about to be started."""
        if self._pending is not None:
            self._pending.at_start(name)
        if any(each.dataset is dataset for each in self._ended):
            self._compare_end()
            self._ended = []

    def at_forward(self) -> None:
        """A training forward begins."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if (problem := pending.at_forward()) is not None:
                self._once("event", problem)
        self._compare_end()

    def _compare_end(self) -> None:
        if self._end is None:
            return
        end, self._end = self._end, None
        if end != rng.glance():
            self._once(
                "end",
                "random numbers were drawn between end_step() and the next iteration's first batch or forward, or "
                f"between two loops over steps(): a resume from step {self._counting.completed} is not exact there. "
                "Draw them within the body of one `for step in ckpt.steps(total)`, whose boundary is restored before "
                "them",
            )
