# SPDX-License-Identifier: Apache-2.0
"""The training thread, which alone can confirm that nothing changes what is still being read."""

from __future__ import annotations

import threading

from layerwise_dist.errors import BoundaryError


class TrainingThread:
    """The thread that made this. `ident` is compared on the way of every layer, and so is no property."""

    def __init__(self) -> None:
        self._thread = threading.current_thread()
        self.ident = threading.get_ident()

    def take_over(self) -> None:
        """From now on it is this one: once it has ended, any other can judge what it left. Raises BoundaryError before
        that.
        """
        if threading.get_ident() != self.ident:
            if self._thread.is_alive():
                raise BoundaryError(
                    f"close() on thread {threading.current_thread().name!r} while the training thread, "
                    f"{self._thread.name!r}, is still running: only that thread can confirm that nothing changes "
                    "what is still being read"
                )
            self.ident = threading.get_ident()
