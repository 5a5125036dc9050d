# SPDX-License-Identifier: Apache-2.0
"""Callbacks of a script: each commit, and each failure."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from layerwise_dist.errors import BoundaryError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")

OnCommit = Callable[[int, str], object]
"""`(step, path)`: the folder of the checkpoint, as an absolute path."""
OnFailure = Callable[[int | None, str], object]
"""`(step, reason)`: the step whose checkpoint was aborted; None where checkpoints have stopped for good."""


class Notices:
    """Runs callbacks one after the other on a thread of its own, in the order in which things happened on this rank.

    What a callback raises is logged under its name, and nothing else comes of it. The thread starts with the first
    callback.
    """

    def __init__(self, root: str, epoch: int) -> None:
        """`epoch`: of the session in the directory `root`."""
        self._root, self._epoch = root, epoch
        self._on_commit: list[OnCommit] = []
        self._on_failure: list[OnFailure] = []
        self._queue: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._running, self._stopped, self._closed = "", False, False

    # -- what a script asks for, on the training thread -----------------------------------------------------------

    def on_commit(self, callback: OnCommit) -> None:
        """Raises TypeError, BoundaryError after `close`, OSError where the system gives no thread."""
        self._begin("on_commit", callback)
        self._on_commit.append(callback)

    def on_failure(self, callback: OnFailure) -> None:
        """Raises as `on_commit`."""
        self._begin("on_failure", callback)
        self._on_failure.append(callback)

    def close(self, timeout_s: float) -> None:
        """Waits until callbacks have run for all that was told by now; warns of one that does not end in time."""
        self._closed = True
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning(
                "close: the callback %s did not finish within %.3g s and is left running", self._running, timeout_s
            )

    # -- notices, from any thread; waits for nothing -----------------------------------------------------------

    def committed(self, seq: int, step: int) -> None:
        """The checkpoint of that attempt of this session is committed."""
        path = os.path.join(self._root, AttemptId(self._epoch, seq, step).folder)
        for callback in self._on_commit:
            self._queue.put((callback, (step, path)))

    def failed(self, step: int | None, reason: str) -> None:
        """The checkpoint of that step was aborted; with None, once, checkpointing has stopped."""
        if step is None:
            if self._stopped:
                return
            self._stopped = True
        for callback in self._on_failure:
            self._queue.put((callback, (step, reason)))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _begin(self, what: str, callback: object) -> None:
        if not callable(callback):
            raise TypeError(f"{what}() takes a callable, not {type(callback).__name__}")
        if self._closed:
            raise BoundaryError(f"{what}() after close()")
        if self._thread is None:
            self._thread = background.start("layerwise-notices", self._run, background.log_only)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            callback, args = item
            self._running = name_of(callback)
            try:
                callback(*args)
            except BaseException as error:  # it is the script's; checkpoints go on
                log.error(
                    "the callback %s failed at step %s: %s",
                    self._running, args[0], background.describe(error), exc_info=error,
                )  # fmt: skip


def name_of(callback: object) -> str:
    """As its author knows it."""
    name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
    return f"{getattr(callback, '__module__', '?')}.{name}"
