# SPDX-License-Identifier: Apache-2.0
"""Which event ends an iteration, how many have ended, and that all happens on one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from layerwise_dist.errors import BoundaryError
from layerwise_dist.loop.mark import Kind
from layerwise_dist.loop.once import Once

_IDLE_LIMIT = 3  # boundaries in a row without an observed update
_UNSEALED_LIMIT = 1000  # updates without a boundary, after which something is said


class Counting:
    """The iterations of one training loop, and the updates of the one that is under way.

    It belongs to the thread that makes it.

    Args:
        once: takes the warnings.
        excuse: as `Boundary`'s.
        several: as `Boundary`'s.

    Attributes:
        completed: boundaries completed.
        kind: of the last boundary; None before the first.
        explicit: the loop tells where its iterations end, by steps() or end_step().
        in_steps: the body of a loop over steps() is under way.
    """

    def __init__(self, once: Once, *, excuse: Callable[[], bool] | None, several: bool) -> None:
        self._once, self._excuse, self._several = once, excuse, several
        self._thread = threading.get_ident()
        self.completed = self._idle = 0
        self.kind: Kind | None = None
        self.explicit = self.in_steps = False
        self.begin()

    def begin(self) -> None:
        """An iteration begins: nothing has updated in it."""
        self._updates = self._skips = 0

    # -- threads ------------------------------------------------------------------------------------------------------

    @property
    def here(self) -> bool:
        """Is this the thread that trains?"""
        return threading.get_ident() == self._thread

    def check_thread(self, what: str) -> None:
        """Raises BoundaryError on any other thread than the one that trains."""
        if not self.here:
            raise BoundaryError(
                f"{what} on thread {threading.current_thread().name!r}: training must stay on the one thread that "
                "attached, since the end of an iteration cannot be detected across threads"
            )

    # -- the iteration that is under way ------------------------------------------------------------------------------

    @property
    def progress(self) -> bool:
        """Has the iteration updated, or seen that it must not?"""
        return self._updates + self._skips > 0

    @property
    def updated(self) -> bool:
        """Did an optimizer update since the last boundary?"""
        return self._updates > 0

    @property
    def may_be_over(self) -> bool:
        """Would a draw or a forward end the iteration? Not where the loop tells its ends itself."""
        return self.progress and not self.explicit

    def update_starting(self, in_closure: bool) -> None:
        """Raises BoundaryError for the second update of an iteration whose end nothing tells."""
        self.check_thread("an optimizer update")
        if self._updates and not self.explicit and not in_closure:
            raise self._untold("a second optimizer update")

    def update_done(self) -> None:
        self.check_thread("an optimizer update")
        self._updates += 1
        if self.explicit and self._updates == _UNSEALED_LIMIT:
            self._once(
                "unsealed",
                f"{_UNSEALED_LIMIT} optimizer updates since boundary {self.completed}: no step ends and "
                "nothing is saved until steps() advances or end_step() is called",
            )

    def update_skipped(self) -> None:
        self.check_thread("a skipped update")
        self._skips += 1

    def forward_ends(self, in_for: bool) -> bool:
        """Does the training forward that begins now end the iteration before it? `in_for`: a `for` over a loader that
        feeds the training is under way, whose next draw ends it.

        Raises BoundaryError where that can't be told.
        """
        if not self.may_be_over or in_for:
            return False
        if self._several:
            raise self._untold("a forward after the update of one of several optimizers")
        return True

    def _untold(self, what: str) -> BoundaryError:
        return BoundaryError(
            f"{what} since boundary {self.completed}, and nothing marked where the iteration ends (several optimizers, "
            "or several updates an iteration as in GAN or PPO): loop with `for step in ckpt.steps(total)`, or call "
            "explicit() before the loop and end_step() at the end of its body"
        )

    # -- its end ------------------------------------------------------------------------------------------------------

    def step_of_call(self) -> int:
        """Raises BoundaryError within an iteration whose end is marked otherwise."""
        self.check_thread("save()")
        if self.explicit and (self.in_steps or self.progress):
            raise BoundaryError(
                "save() within an iteration whose end is marked by steps() or end_step(): it is saved if "
                "every_n_steps says so, and committed after it ends; wait(step) waits for one. Call it between "
                "end_step() and the next iteration"
            )
        return self.completed + self.progress

    def end_step(self) -> None:
        """The loop tells its ends by end_step(). Raises BoundaryError if boundaries were known otherwise before."""
        if not self.explicit and self.kind is not None:
            raise BoundaryError(
                f"end_step() was called for the first time after {self.completed} boundaries of kind "
                f"{self.kind!r}: an iteration with several updates or an "
                "evaluation was cut in two. Call explicit() before the loop, or loop with steps()"
            )
        self.explicit = True

    def resume_kind(self, kind: Kind | Literal["close"], in_for: bool) -> Kind:
        """What a resume counts on at a boundary of that kind: at the last one, what the loop did until then."""
        if kind != "close":
            return kind
        return "explicit" if self.explicit else self.kind or ("loader" if in_for else "inferred")

    def check_idle(self) -> None:
        """At a boundary, before it counts. Raises BoundaryError at the third in a row without an observed update."""
        self._idle = 0 if self.progress else self._idle + 1
        if self._idle >= _IDLE_LIMIT and not (self._excuse is not None and self._excuse()):
            raise BoundaryError(
                f"no optimizer update was observed in the last {self._idle} iterations (boundary "
                f"{self.completed + 1}): the attached optimizer's step() is not what "
                "updates this model (a replayed graph, a foreign or another optimizer), so checkpoints would hold "
                "stale state"
            )

    def count(self, kind: str, resume: Kind) -> None:
        """One more boundary, of that kind; the next iteration begins."""
        if kind == "inferred":
            self._once(
                "inferred",
                "the end of an iteration is inferred from the next forward, since no `for` iterates an attached "
                "loader and steps() is not used: a resume is not exact if "
                "the loop draws random numbers or changes state (evaluation, scheduler) elsewhere than between "
                "forward and optimizer.step(), or updates more than "
                "once an iteration. Loop with `for step in ckpt.steps(total)`",
            )
        self.completed += 1
        self.kind = resume
        self.begin()
