# SPDX-License-Identifier: Apache-2.0
"""One boundary as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerwise_dist.loop.rng import LateRng
from layerwise_dist.loop.sealed import BoundaryState, LoaderState

Kind = Literal["explicit", "loader", "inferred", "call"]
RngEvent = Literal["boundary", "draw"]


@dataclass(frozen=True)
class BoundaryMark:
    """One boundary: everything of the process at that point that is not in the model, the optimizer or `state=`.

    Attributes:
        step: boundaries completed, this one included.
        kind: how it was known; "close" is the last one of a job that ended within an iteration.
        updated: did an optimizer update since the last boundary?
        rng: the global generators, as of `rng_event`.
        rng_event: "boundary" itself, or the "draw" of the first batch that no forward has used yet.
        loaders: a `LoaderTap.snapshot()` for each attached loader.
        resume_kind: `kind`, or for "close" the kind that the loop had until then.
        at: names of the loaders at whose draw `rng` is to be put back; any loader if empty.
        rng_after: at an explicit boundary with rng_event "draw", the generators at the boundary itself; otherwise None.
        starts: loaders that `state=` does not name, at whose start, which comes next, `rng` is to be put back.
    """

    step: int
    kind: Kind | Literal["close"]
    updated: bool
    rng: LateRng
    rng_event: RngEvent
    loaders: dict[str, LoaderState]
    resume_kind: Kind
    at: tuple[str, ...]
    rng_after: LateRng | None
    starts: tuple[str, ...] = ()

    def state(self) -> BoundaryState:
        """What `Boundary.restore` takes: plain values for typed JSON, sharing memory with the mark.

        REQUIRES: it was asked for before `over`.
        """
        return {
            "kind": self.resume_kind,
            "rng": self.rng.state(),
            "rng_event": self.rng_event,
            "rng_after": None if self.rng_after is None else self.rng_after.state(),
            "at": list(self.at),
            "starts": list(self.starts),
            "loaders": self.loaders,
        }

    def over(self) -> None:
        """The loop goes on: what nobody has asked for by now is gone."""
        self.rng.over()
        if self.rng_after is not None:
            self.rng_after.over()
