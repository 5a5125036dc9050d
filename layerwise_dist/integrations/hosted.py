# SPDX-License-Identifier: Apache-2.0
"""An engine whose iterations a host's loop ends; calls with which a script would end them are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from layerwise_dist.engine.engine import LayerwiseEngine
from layerwise_dist.engine.workings import Workings
from layerwise_dist.errors import BoundaryError
from layerwise_dist.loop.placed import PlacedTap


class HostedEngine(LayerwiseEngine):
    """As `LayerwiseEngine`, but for `steps()`, `end_step()` and `explicit()`, which the integration calls.

    Args:
        host: whose loop it is, for messages.
        within: whether that loop has used batches since the last boundary, and nothing has updated since: they count as
            consumed, and are in no gradient that is saved. So nothing is to be saved or restored then.
        tap: of the loader that feeds it.
    """

    def __init__(self, workings: Workings, host: str, within: Callable[[], bool], tap: PlacedTap) -> None:
        super().__init__(workings)
        self._host, self._within, self._tap = host, within, tap
        workings.boundary.explicit(restored_in_loop=True)

    def _refuse(self, what: str) -> BoundaryError:
        return BoundaryError(f"{what}: {self._host}'s loop marks where its iterations end; leave the call out")

    def steps(self, total: int) -> Iterator[int]:
        raise self._refuse("steps()")

    def end_step(self) -> None:
        raise self._refuse("end_step()")

    def explicit(self, *, restored_in_loop: bool = False) -> None:
        raise self._refuse("explicit()")

    def end_iteration(self) -> None:
        """The integration's: the iteration ends here, if it has updated. Else nothing happens."""
        if self._workings.boundary.progress:
            super().end_step()

    def save(
        self, tag: str | None = None, client_state: Mapping[str, Any] | None = None, *, timeout: float | None = None,
        within_window: bool = False,
    ) -> int | None:  # fmt: skip
        """As `LayerwiseEngine.save`. With a tag it raises BoundaryError within an iteration."""
        if tag is not None:
            self._check_between(f"save({tag!r})", "save() without a tag saves this iteration's end")
        return super().save(tag, client_state, timeout=timeout, within_window=within_window)

    def restore(
        self, step: int | None = None, *, tag: str | None = None, saved: bool = False, on_missing: str | None = None,
        partly: bool = False, cast: str | None = None, objects: Mapping[str, str] | None = None,
        model_only: bool = False,
    ) -> int:  # fmt: skip
        """As `LayerwiseEngine.restore`. Within the loop it raises BoundaryError."""
        self._check_between("restore()", "restore before the loop")
        restored = super().restore(
            step, tag=tag, saved=saved, on_missing=on_missing, partly=partly, cast=cast, objects=objects,
            model_only=model_only,
        )  # fmt: skip
        if self.restored_from is not None:
            self._tap.restored()
        return restored

    def close(self) -> None:
        self._leave_out_what_is_open()
        super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._leave_out_what_is_open()
        super().__exit__(kind, error, trace)

    def _leave_out_what_is_open(self) -> None:
        """A window of accumulation that was left is repeated by a resume, from the newest checkpoint."""
        if self._within():
            self._workings.last.wanted = False

    def _check_between(self, what: str, way: str) -> None:
        if self._within():
            raise BoundaryError(
                f"{what} within an iteration of {self._host}'s loop, whose batches would count as consumed: {way}"
            )
