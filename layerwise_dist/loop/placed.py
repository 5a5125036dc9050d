# SPDX-License-Identifier: Apache-2.0
"""A loader that a host's loop draws from (Accelerate's, Lightning's, the Trainer's), where an integration tells the
boundaries.

Such a loop may draw one batch ahead of the one that its body uses. So what counts as consumed is what was drawn before
the newest draw, and that draw, which a resume makes again, may have used random numbers of its own: they are sealed as
`ahead`, as of just before it. Random numbers of the boundary itself are put back where the integration says.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from layerwise_dist.loop import rng
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.loop.sealed import LoaderState, RngState


class PlacedTap(LoaderTap):
    """A tap whose draws nobody else hears of. Give it in `attach(state={name: tap})`.

    Args:
        loader, name: as `LoaderTap`'s.
        one_ahead: the loop has drawn the next batch when it uses one.
    """

    def __init__(self, loader: DataLoader[Any], name: str, *, one_ahead: bool) -> None:
        super().__init__(loader, name, self._drawing, self._beginning)
        self._one_ahead = one_ahead
        self._before: LoaderState | None = None  # where it stood before the newest draw, if that is ahead
        self._ahead: RngState | None = None  # what a resume makes its first draw with
        self._here: RngState | None = None  # the generators of the restored boundary, until the loop continues from it

    # -- what the integration tells -----------------------------------------------------------------------------------

    def restored(self) -> None:
        """Right after `restore()`, which has put back the generators of the boundary: the loop is yet to come to it."""
        self._here = rng.take()

    def go_on(self) -> None:
        """The loop is where the restored boundary was: its random numbers continue from there. Once after a restore; a
        loop that draws continues by itself.
        """
        here, self._here = self._here, None
        if here is not None:
            rng.put(here)

    @property
    def resuming(self) -> bool:
        """Whether the next `iter()` goes on within an iteration of the checkpoint's."""
        return self._pending is not None

    def left(self) -> None:
        """The loop over it is over, at its end or by break: what comes next is a new `iter()`."""
        self._before = self._current = self._fed = None

    # -- what the engine asks -----------------------------------------------------------------------------------------

    def snapshot(self, *, even_if_dropped: bool = False) -> LoaderState:
        if self._before is not None:
            return self._before.copy()
        state = super().snapshot(even_if_dropped=True)  # what ends an iteration is `left`
        if self._ahead is not None:  # restored, and not drawn from since
            state["ahead"] = self._ahead
        return state

    def restore(self, snapshot: LoaderState) -> None:
        super().restore(snapshot)
        self._before, self._ahead = None, snapshot.get("ahead") if self.resuming else None

    # -- events -------------------------------------------------------------------------------------------------------

    def _beginning(self, _: LoaderTap) -> None:
        self._before = None

    def _drawing(self, _: LoaderTap, by_for: bool) -> None:
        if not self._one_ahead:
            self.go_on()
            return
        if self._ahead is not None:
            rng.put(self._ahead)
            self._ahead = None
        elif self._before is not None:  # the second draw since then is what follows the boundary
            self.go_on()
        state = super().snapshot()
        state["ahead"] = rng.take()
        self._before = state
