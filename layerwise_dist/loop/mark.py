"""One boundary as a value, and the way of its random numbers back into a resumed loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from layerwise_dist.loop import rng

Kind = Literal["explicit", "loader", "inferred", "call"]
RngEvent = Literal["boundary", "draw"]


@dataclass(frozen=True)
class BoundaryMark:
    """One boundary: everything of the process at that point that is not in the model, the optimizer or `state=`.

    Attributes:
        step: boundaries completed, this one included.
        kind: how it was known; "close" is the last one of a job that ended within an iteration.
        updated: did an optimizer update since the last boundary?
        rng: the global generators (`capture.rng.RngState`), as of `rng_event`.
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
    rng: rng.RngState
    rng_event: RngEvent
    loaders: dict[str, dict[str, Any]]
    resume_kind: Kind
    at: tuple[str, ...]
    rng_after: rng.RngState | None
    starts: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """What `Boundary.restore` takes: plain values for typed JSON, sharing memory with the mark."""
        return {
            "kind": self.resume_kind,
            "rng": self.rng,
            "rng_event": self.rng_event,
            "rng_after": self.rng_after,
            "at": list(self.at),
            "starts": list(self.starts),
            "loaders": self.loaders,
        }


class PendingRng:
    """Restored random numbers that wait for the kind of event at which they were taken.

    Args:
        state: of `BoundaryMark.state()`.
        attached: names of the loaders there are now.
        here: this is the event at which those of an explicit boundary are to be put back.
    """

    def __init__(self, state: dict[str, Any], attached: Collection[str], *, here: bool = False) -> None:
        self._state, self._put = state, False
        self._starts = state.get("starts", [])
        self._final = False  # put at the very event of the boundary, whatever comes
        self._at = [name for name in state["at"] if name in attached]
        # A script that saves by a call restores by one, and draws its next batch behind either.
        here |= state["kind"] == "inferred" or (state["kind"] == "call" and not attached)
        if here and state["rng_event"] == "boundary":
            self._set(state["rng"])

    def _set(self, state: rng.RngState) -> None:
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
                self._set(self._state["rng_after"])

    def at_forward(self) -> str | None:
        """The first training forward begins, which ends the wait. Says what went wrong, if anything did."""
        if self._put:
            return None
        self._set(self._state["rng"])
        if self._starts:
            return (
                f"the random numbers of the boundary are put back at the first forward, since no {self._starts[0]} was "
                "started after restore(): this resume is not exact"
            )
        if self._state["kind"] in ("explicit", "call") and self._state["rng_event"] == "boundary":
            return None
        loaders = ", ".join(self._at) or "an attached loader"
        return (
            f"the random numbers of a boundary of kind {self._state['kind']!r} are put back at the first forward, "
            "since no "
            f"batch was drawn from {loaders} after restore(): this resume is not exact"
        )
