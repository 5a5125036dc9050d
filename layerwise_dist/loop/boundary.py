"""Where an iteration ends: events of the training loop in, boundaries out.

A checkpoint at step t holds the process after all that iteration t does and before anything of iteration t+1. No hook
of torch sees that point in every loop, so there are three ways to know it, and each checkpoint records which one it
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
of several; that is recognised by the pace and warned of.

What cannot be seen: a GradScaler that skips a step calls no hook. Without steps()/end_step() such an iteration is no
boundary and is counted together with the next one; with them it counts, with `updated=False`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from layerwise_dist.errors import BoundaryError, MismatchError
from layerwise_dist.loop import rng
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.loop.loose import LooseLoaders, Started
from layerwise_dist.loop.mark import BoundaryMark, Kind, PendingRng, RngEvent

_IDLE_LIMIT = 3  # boundaries in a row without an observed update
_UNSEALED_LIMIT = 1000  # updates without a boundary, after which something is said


class Log(Protocol):
    """`logging.Logger`, or anything that can warn like it."""

    def warning(self, message: str) -> None: ...


@dataclass
class _Ahead:
    """A loader and the generators before the first draw since the last training forward."""

    snapshot: dict[str, Any]
    rng: rng.RngState
    after_update: bool


class Boundary:
    """Counts the iterations of one training loop, on the one thread that makes it (BoundaryError on any other).

    Args:
        on_boundary: called once per boundary, on the training thread, with `completed` already counting it.
        taps: the attached loaders by name; their callbacks are set to this object where they are None.
        log: takes the warnings; each is given once.
        excuse: asked at the third boundary in a row, and each one after, at which no update was observed. True lets it
            pass (a GradScaler whose scale fell); otherwise that is a BoundaryError.
        several: several optimizers update one by one, so that a forward behind an update tells nothing: a
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
        self._several = several
        self._on_boundary, self._taps, self._log, self._excuse = on_boundary, dict(taps), log, excuse
        self._on_last = on_last
        self._thread = threading.get_ident()
        self._completed = self._idle = 0
        self._explicit = self._in_steps = self._in_loop = False
        self._kind: Kind | None = None  # of the last boundary
        self._pending: PendingRng | None = None
        self._warned: set[str] = {"inferred"} if by_call else set()
        self._feeds: set[LoaderTap] = set()  # alone since the last forward: certain
        self._may_feed: set[LoaderTap] = set()  # one of several: believed while nothing is certain
        # The generators where end_step() was called or a loop over steps() ended, until what comes next.
        self._end: tuple[Any, ...] | None = None
        self._ended: list[Started] = []  # loaders that are not attached, and that the next iteration starts anew
        self._loose = LooseLoaders(self._starting)
        self._reset_loop()
        for tap in self._taps.values():
            tap.on_draw, tap.on_iter = tap.on_draw or self.draw, tap.on_iter or self.iterating

    def _reset_loop(self) -> None:
        self._pace: dict[LoaderTap, list[tuple[object, int]]] = {}
        self._used: dict[LoaderTap, tuple[object, int]] = {}  # draws as of the last training forward
        self._reset_iteration()

    def _reset_iteration(self) -> None:
        self._updates = self._skips = 0
        self._forward = False
        self._drew: set[LoaderTap] = set()
        self._ahead: dict[LoaderTap, _Ahead] = {}
        self._iters: dict[LoaderTap, dict[str, Any]] = {}
        self._update_rng: rng.RngState | None = None

    @property
    def completed(self) -> int:
        """Boundaries completed: the step of the newest one."""
        return self._completed

    def start_at(self, step: int) -> None:
        """Count on from `step` completed boundaries."""
        self._completed = step

    # -- explicit boundaries ------------------------------------------------------------------------------------------
    def explicit(self, *, restored_in_loop: bool = False) -> None:
        """Say that this loop will call `end_step()`: needed only if its first iteration updates more than once.

        With `restored_in_loop` what follows restore() is what follows end_step(), a batch drawn by hand say, so that
        random numbers can be put back by restore() itself, unless an attached loader tells better.
        """
        self._check_thread("explicit()")
        self._explicit, self._in_loop = True, restored_in_loop and not self._taps

    def steps(self, total: int) -> Iterator[int]:
        """Yield the steps from `completed` up to `total`, with a boundary at each back edge of the loop.

        Leaving by break or by an exception makes no boundary; `close()` seals what break left.
        """
        self._check_thread("steps()")
        self._explicit = True
        if self._end is not None:
            self._compare_end()
        if self._pending is not None:
            self._pending.at_steps()
        while (step := self._completed) < total:
            if self._on_last is not None and step + 1 == total:
                self._on_last()
            self._in_steps = True
            try:
                yield step
            finally:  # also where the loop is left
                self._in_steps = False
            if self._completed != step:
                raise BoundaryError(
                    f"steps() yielded step {step}, and its body counted {self._completed - step} boundaries itself: "
                    "use either steps() or end_step()"
                )
            self._mark("explicit")
            if step + 1 == total and "end" not in self._warned:
                self._end = rng.glance()

    def end_step(self) -> None:
        """The iteration ends here."""
        if not self._explicit and self._kind is not None:
            raise BoundaryError(
                f"end_step() was called for the first time after {self._completed} boundaries of kind "
                f"{self._kind!r}: an iteration with several updates or an "
                "evaluation was cut in two. Call explicit() before the loop, or loop with steps()"
            )
        self._explicit = True
        mark = self._mark("explicit")
        if mark.rng_event == "boundary" and "end" not in self._warned and not self._in_loop:
            self._end = rng.glance()

    @property
    def told(self) -> bool:
        """Whether the loop tells where its iterations end, by steps() or end_step()."""
        return self._explicit

    @property
    def step_of_call(self) -> int:
        """The step that `call()` would be of. Raises BoundaryError within an iteration whose end is told otherwise."""
        self._check_thread("save()")
        if self._explicit and (self._in_steps or self._progress):
            raise BoundaryError(
                "save() within an iteration whose end is told by steps() or end_step(): those are saved as "
                "every_n_steps says, and committed behind their end; wait(step) waits for one. Between end_step() and "
                "the next iteration it may be called"
            )
        return self._completed + (self._progress > 0)

    def call(self) -> BoundaryMark | None:
        """The script saves now: the iteration ends here if it has updated. Otherwise nothing is counted, and a mark of
        the last boundary, as it is now, is returned, of which `on_boundary` does not hear.
        """
        if self.step_of_call > self._completed:
            self._mark("call")
            return None
        return self._make_mark("explicit" if self._explicit else "call", (), self._completed)[0]

    # -- events of the optimizer and the model ------------------------------------------------------------------------
    def update_starting(self, in_closure: bool = False) -> None:
        """An optimizer is about to update. With `in_closure` its closure runs first, then this is called again."""
        self._check_thread("an optimizer update")
        if self._updates and not self._explicit and not in_closure:
            raise self._untold("a second optimizer update")

    def update_done(self) -> None:
        """The optimizer has updated."""
        self._check_thread("an optimizer update")
        self._updates += 1
        if self._explicit:
            if self._updates == _UNSEALED_LIMIT:
                self._warn(
                    "unsealed",
                    f"{_UNSEALED_LIMIT} optimizer updates since boundary {self._completed}: no step ends and "
                    "nothing is saved until steps() advances or end_step() is called",
                )
        elif not self._in_for():
            self._update_rng = rng.take()

    def update_skipped(self) -> None:
        """The optimizer saw that it must not update (fp16 overflow); the iteration counts, with `updated=False`."""
        self._check_thread("a skipped update")
        self._skips += 1
        if not self._explicit and not self._in_for():
            self._update_rng = rng.take()

    def training_forward(self) -> None:
        """The root's forward begins, with gradients, in training mode, and has drawn no random numbers yet."""
        self._check_thread("a training forward")
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if (problem := pending.at_forward()) is not None:
                self._warn("event", problem)
        if self._end is not None:
            self._compare_end()
        self._loose.forward()
        if self._progress and not self._explicit and not self._in_for():
            if self._several:
                raise self._untold("a forward behind the update of one of several optimizers")
            self._mark("inferred")
        drew = [tap for tap in self._drew if tap.alive and not tap.exhausted]
        if len(drew) == 1:
            self._feeds.add(drew[0])
        elif not self._feeds:
            self._may_feed.update(drew)
        for tap in drew:
            if tap in self._feeding:
                tap.feeds()
        for tap in self._pace:  # also those whose batch was drawn before the boundary
            self._used[tap] = (tap.position, tap.draws)
        self._drew.clear()
        self._ahead.clear()
        self._iters.clear()
        self._forward = True

    # -- events of the loaders ----------------------------------------------------------------------------------------
    def draw(self, tap: LoaderTap, by_for: bool) -> None:
        """A batch is about to be drawn from `tap`, by a `for` or by hand."""
        self._check_thread(f"loader {tap.name!r} was drawn from")
        if self._pending is not None:
            self._pending.at_draw(tap.name)
        feeding = self._feeding
        if self._end is not None and (not feeding or tap in feeding):
            self._compare_end()
        if tap.aside:
            return
        if by_for and self._progress and not self._explicit and tap in feeding:
            self._mark("loader", at=(tap.name,))
        elif self._forward and tap not in self._ahead:
            # Behind an update that may end the iteration, the random numbers of that update are the ones that count.
            self._ahead[tap] = _Ahead(tap.snapshot(), self._update_rng or rng.take(), bool(self._progress))
        self._pace.setdefault(tap, [(tap.position, tap.draws)])
        self._drew.add(tap)

    def iterating(self, tap: LoaderTap) -> None:
        """`iter()` of the tap's loader is about to run; it draws random numbers too."""
        if self._progress and not self._explicit and tap not in self._ahead:
            self._iters.setdefault(tap, tap.snapshot())

    def _starting(self, loader: Any, name: str) -> bool | None:
        """A DataLoader is about to be started (`LooseLoaders`)."""
        if threading.get_ident() != self._thread or any(tap.loader is loader for tap in self._taps.values()):
            return None
        if self._pending is not None:
            self._pending.at_start(name)
        if any(each.dataset is loader.dataset for each in self._ended):
            if self._end is not None:
                self._compare_end()
            self._ended = []
        return self._in_steps or any(tap.in_for for tap in self._taps.values())

    # -- coming back and ending ---------------------------------------------------------------------------------------
    def restore(self, state: dict[str, Any]) -> None:
        """Take up `BoundaryMark.state()`: loaders at once, random numbers at the event they were taken at.

        Raises MismatchError if the checkpoint holds a loader that is not attached under that name.
        """
        self._check_thread("restore()")
        missing = sorted(state["loaders"].keys() - self._taps.keys())
        if missing:
            raise MismatchError(
                f"the checkpoint holds the position of loaders {missing}, attached are {sorted(self._taps)}"
            )
        for name, snapshot in state["loaders"].items():
            self._taps[name].restore(snapshot)
        self._reset_loop()
        self._end, self._ended = None, []
        self._pending = PendingRng(state, self._taps.keys(), here=self._in_loop)

    def close(self, *, seal: bool = True) -> bool:
        """Seal an iteration that has updated and was not ended (the loop was left by break). True if there was one.

        The position of a loader whose `for` was left counts, so that a longer run goes on within the epoch.
        `seal=False`: the job ends by an exception, and what is unsealed may be half an iteration.
        """
        try:
            if not (seal and self._progress):
                return False
            self._check_thread("close()")
            self._mark("close")
            return True
        finally:
            self._loose.close()

    # -- inside -------------------------------------------------------------------------------------------------------
    @property
    def _progress(self) -> int:
        return self._updates + self._skips

    @property
    def _feeding(self) -> set[LoaderTap]:
        return self._feeds or self._may_feed

    def _untold(self, what: str) -> BoundaryError:
        return BoundaryError(
            f"{what} since boundary {self._completed}, and nothing told where the iteration ends (several optimizers, "
            "or several updates an iteration as in GAN or PPO): loop with `for step in ckpt.steps(total)`, or call "
            "explicit() before the loop and end_step() at the end of its body"
        )

    def _in_for(self) -> bool:
        return any(tap.in_for for tap in self._feeding)

    def _mark(self, kind: Kind | Literal["close"], at: tuple[str, ...] = ()) -> BoundaryMark:
        self._check_thread("a boundary")
        doubts, self._ended = self._loose.boundary(closing=kind == "close")
        mark, resume = self._make_mark(kind, at, self._completed + 1)
        for doubt in doubts:
            self._warn(doubt, doubt)
        self._count(kind, resume)
        self._on_boundary(mark)
        return mark

    def _make_mark(self, kind: Kind | Literal["close"], at: tuple[str, ...], step: int) -> tuple[BoundaryMark, Kind]:
        closing = kind == "close"
        resume: Kind = (
            ("explicit" if self._explicit else self._kind or ("loader" if self._in_for() else "inferred"))
            if kind == "close"
            else kind
        )
        inferred = resume == "inferred"
        feeding = self._feeding
        ahead = {
            tap: each
            for tap, each in self._ahead.items()
            if tap in feeding and (tap.alive or closing) and not (inferred and each.after_update)
        }  # fmt: skip
        loaders = {}
        for name, tap in self._taps.items():
            if tap in ahead:
                loaders[name] = ahead[tap].snapshot
            elif inferred and tap in self._iters:
                loaders[name] = self._iters[tap]
            elif inferred and tap in self._ahead:
                loaders[name] = self._ahead[tap].snapshot
            else:
                loaders[name] = tap.snapshot(even_if_dropped=closing and tap in feeding)
        after = None
        event: RngEvent = "boundary"
        if ahead:
            first = next(iter(ahead))
            random, event, at = ahead[first].rng, "draw", (first.name,)
            after = rng.take() if resume == "explicit" else None
        else:
            random = (self._update_rng if inferred else None) or rng.take()
            at = at or tuple(tap.name for tap in feeding)
        untold = resume == "explicit" and event == "boundary" and not feeding and not self._in_loop
        starts = tuple(sorted({each.name for each in self._ended})) if untold else ()
        return BoundaryMark(step, kind, self._updates > 0, random, event, loaders, resume, at, after, starts), resume

    def _count(self, kind: str, resume: Kind) -> None:
        self._idle = 0 if self._progress else self._idle + 1
        if self._idle >= _IDLE_LIMIT and not (self._excuse is not None and self._excuse()):
            raise BoundaryError(
                f"no optimizer update was observed in the last {self._idle} iterations (boundary "
                f"{self._completed + 1}): the attached optimizer's step() is not what "
                "updates this model (a replayed graph, a foreign or another optimizer), so checkpoints would hold "
                "stale state"
            )
        if kind == "inferred":
            self._warn(
                "inferred",
                "the end of an iteration is inferred from the next forward, since no `for` iterates an attached "
                "loader and steps() is not used: a resume is not exact if "
                "the loop draws random numbers or changes state (evaluation, scheduler) elsewhere than between "
                "forward and optimizer.step(), or updates more than "
                "once an iteration. Loop with `for step in ckpt.steps(total)`",
            )
        for tap in self._taps.values():
            if tap.doubt is not None:
                self._warn(f"doubt {tap.name}", f"loader {tap.name!r}: a resume may not be exact: {tap.doubt}")
        self._check_pace()
        self._completed += 1
        self._kind = resume
        self._reset_iteration()

    def _check_pace(self) -> None:
        """More batches before the first boundary than before the second: one is always drawn ahead of its forward."""
        for tap, used in self._used.items():
            pace = self._pace.get(tap)
            if pace is None or len(pace) >= 3:
                continue
            pace.append(used)
            if len(pace) == 3 and tap in self._feeding and pace[0][0] is pace[1][0] is pace[2][0]:
                before, between = pace[1][1] - pace[0][1], pace[2][1] - pace[1][1]
                if before > between > 0:
                    self._warn(
                        f"pace {tap.name}",
                        f"loader {tap.name!r} gave {before} batches to the first iteration and {between} to the "
                        "second: if the loop draws batches ahead, draw one at most, and after the forward of the one "
                        "before it, otherwise a resume skips what was drawn and not used",
                    )

    def _compare_end(self) -> None:
        end, self._end = self._end, None
        if end != rng.glance():
            self._warn(
                "end",
                "random numbers were drawn between end_step() and the next iteration's first batch or forward, or "
                f"between two loops over steps(): a resume from step {self._completed} is not exact there. Draw them "
                "within the body of one `for step in ckpt.steps(total)`, whose boundary is restored before them",
            )

    def _check_thread(self, what: str) -> None:
        if threading.get_ident() != self._thread:
            raise BoundaryError(
                f"{what} on thread {threading.current_thread().name!r}: training must stay on the one thread that "
                "attached, since the end of an iteration cannot be told across threads"
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._log.warning(message)
