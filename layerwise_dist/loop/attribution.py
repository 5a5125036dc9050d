# SPDX-License-Identifier: Apache-2.0
"""Which attached loader feeds the training, and what the loop drew from it ahead of the forward that uses it.

A loader feeds the training when its iterator is alive and was drawn from before a grad-enabled training forward. A
batch that is drawn after an iteration's last forward belongs to the next one: its loader, and the random numbers, are
recorded as before that draw. Batches that are drawn earlier still are recognized by the pace alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerwise_dist.loop import rng
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.loop.once import Once
from layerwise_dist.loop.sealed import LoaderState, RngState


@dataclass
class Ahead:
    """A loader and the generators before the first draw since the last training forward."""

    tap: LoaderTap
    snapshot: LoaderState
    rng: RngState
    after_update: bool


class Attribution:
    """What is known of the loaders in the iteration that is under way, and which of them feed the training.

    Args:
        taps: the attached loaders by name.
        once: takes the warnings.
    """

    def __init__(self, taps: Mapping[str, LoaderTap], once: Once) -> None:
        self._taps, self._once = taps, once
        self._feeds: set[LoaderTap] = set()  # alone since the last forward: certain
        self._may_feed: set[LoaderTap] = set()  # one of several: believed while nothing is certain
        self.begin_loop()

    def begin_loop(self) -> None:
        """At the start, and after a restore."""
        self._pace: dict[LoaderTap, list[tuple[object, int]]] = {}
        self._used: dict[LoaderTap, tuple[object, int]] = {}  # draws as of the last training forward
        self.begin()

    def begin(self) -> None:
        """An iteration begins."""
        self._forward = False
        self._drew: set[LoaderTap] = set()
        self._ahead: dict[LoaderTap, Ahead] = {}
        self._iters: dict[LoaderTap, LoaderState] = {}
        self._update_rng: RngState | None = None

    @property
    def feeding(self) -> set[LoaderTap]:
        """The loaders that feed the training, as far as is known."""
        return self._feeds or self._may_feed

    @property
    def in_for(self) -> bool:
        """Is a `for` over a loader that feeds the training under way?"""
        return any(tap.in_for for tap in self.feeding)

    # -- events -------------------------------------------------------------------------------------------------------

    def updated(self) -> None:
        """An update was done or skipped that may end the iteration: if so, its random numbers are those of now."""
        if not self.in_for:
            self._update_rng = rng.take()

    def draw(self, tap: LoaderTap, *, after_update: bool) -> None:
        """A batch is about to be drawn, and the boundary that this made, if it did, is over. `after_update`: the
        iteration has updated.
        """
        if self._forward and tap not in self._ahead:
            # After an update that may end the iteration, the random numbers of that update are the ones that count.
            self._ahead[tap] = Ahead(tap, tap.snapshot(), self._update_rng or rng.take(), after_update)
        self._pace.setdefault(tap, [(tap.position, tap.draws)])
        self._drew.add(tap)

    def iterating(self, tap: LoaderTap) -> None:
        """`iter()` of the tap's loader is about to run, after an update that may end the iteration."""
        if tap not in self._ahead:
            self._iters.setdefault(tap, tap.snapshot())

    def forward(self) -> None:
        """A training forward begins: what was drawn from alone before it feeds the training."""
        drew = [tap for tap in self._drew if tap.alive and not tap.exhausted]
        if len(drew) == 1:
            self._feeds.add(drew[0])
        elif not self._feeds:
            self._may_feed.update(drew)
        for tap in drew:
            if tap in self.feeding:
                tap.feeds()
        for tap in self._pace:  # also those whose batch was drawn before the boundary
            self._used[tap] = (tap.position, tap.draws)
        self._drew.clear()
        self._ahead.clear()
        self._iters.clear()
        self._forward = True

    # -- at a boundary ------------------------------------------------------------------------------------------------

    def stand(self, *, inferred: bool, closing: bool) -> tuple[dict[str, LoaderState], Ahead | None]:
        """Where each loader is to stand in a resume, by name, and the first draw that the next iteration has made
        already. `inferred`: the boundary is at the update; `closing`: it is the last one.
        """
        feeding = self.feeding
        ahead = {
            tap: each
            for tap, each in self._ahead.items()
            if tap in feeding and (tap.alive or closing) and not (inferred and each.after_update)
        }
        snapshots: dict[str, LoaderState] = {}
        for name, tap in self._taps.items():
            if tap in ahead:
                snapshots[name] = ahead[tap].snapshot
            elif inferred and tap in self._iters:
                snapshots[name] = self._iters[tap]
            elif inferred and tap in self._ahead:
                snapshots[name] = self._ahead[tap].snapshot
            else:
                snapshots[name] = tap.snapshot(even_if_dropped=closing and tap in feeding)
        return snapshots, next(iter(ahead.values()), None)

    def rng_there(self, *, inferred: bool) -> rng.LateRng:
        """The generators at a boundary that no draw went ahead of."""
        return rng.LateRng(self._update_rng if inferred else None)

    def check(self) -> None:
        """At a boundary: warns of loaders from which a resume may not be exact."""
        for tap in self._taps.values():
            if tap.doubt is not None:
                self._once(f"doubt {tap.name}", f"loader {tap.name!r}: a resume may not be exact: {tap.doubt}")
        self._check_pace()

    def _check_pace(self) -> None:
        """More batches before the first boundary than before the second: one is always drawn ahead of its forward."""
        for tap, used in self._used.items():
            pace = self._pace.get(tap)
            if pace is None or len(pace) >= 3:
                continue
            pace.append(used)
            if len(pace) == 3 and tap in self.feeding and pace[0][0] is pace[1][0] is pace[2][0]:
                before, between = pace[1][1] - pace[0][1], pace[2][1] - pace[1][1]
                if before > between > 0:
                    self._once(
                        f"pace {tap.name}",
                        f"loader {tap.name!r} gave {before} batches to the first iteration and {between} to the "
                        "second: if the loop draws batches ahead, draw one at most, and after the forward of the one "
                        "before it, otherwise a resume skips what was drawn but not used",
                    )
