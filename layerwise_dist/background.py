"""The threads of this package. None ends unheard: whatever ends one is told, by the thread's name, to who can stop all.

An exception that nobody catches ends a thread of Python's with a line on standard error, and the job goes on as if it
were still there. So every thread is started here.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger("layerwise_dist")

Failed = Callable[[str], None]
"""Is told why a thread, or one of its jobs, came to nothing: in words that name thread and error. On that thread."""

_Job = TypeVar("_Job")


def start(name: str, body: Callable[[], None], failed: Failed) -> threading.Thread:
    """Runs `body` on a daemon thread; whatever it raises, KeyboardInterrupt and SystemExit too, is told to `failed`.

    Raises OSError where the system gives no thread.
    """
    thread = threading.Thread(target=lambda: _guarded(name, body, failed), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"no thread {name} ({error}): see ulimit -u, or the control group's pids.max") from None
    return thread


def start_worker(
    name: str, jobs: queue.SimpleQueue[_Job | None], do: Callable[[_Job], None], failed: Failed
) -> threading.Thread:
    """As `start`, for a thread that does one job after the other until None comes. One that fails ends no others."""

    def work() -> None:
        while (job := jobs.get()) is not None:
            _guarded(name, lambda job=job: do(job), failed)

    return start(name, work, failed)


def _guarded(name: str, act: Callable[[], None], failed: Failed) -> None:
    try:
        act()
    except BaseException as error:  # nothing above this would take it
        try:
            log.error("thread %s: %r", name, error, exc_info=error)
        finally:
            failed(f"thread {name}: {describe(error)}")


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
