# SPDX-License-Identifier: Apache-2.0
"""The threads of this package. Whatever ends one is reported, with its name, to who can stop all ranks.

An exception that nobody catches ends a thread of Python's with a line on standard error, and the job goes on as if it
were still there. So every thread is started here.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable

log = logging.getLogger("layerwise_dist")

Failed = Callable[[str], None]
"""Is told why a thread, or one of its jobs, came to nothing: in words that name thread and error. On that thread."""


def start(name: str, body: Callable[[], None], failed: Failed) -> threading.Thread:
    """Runs `body` on a daemon thread; whatever it raises, KeyboardInterrupt and SystemExit too, goes to `failed`.

    Raises OSError where the system gives no thread.
    """
    thread = threading.Thread(target=lambda: guarded(name, body, failed), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(
            errno.EAGAIN, f"no thread {name} ({error}): see ulimit -u, or the control group's pids.max"
        ) from None
    return thread


def log_only(why: str) -> None:
    """For a thread whose failure is known to whoever waits for what it does, or that nothing needs: it is logged."""


def guarded(name: str, act: Callable[[], None], failed: Failed) -> None:
    """Does `act` on thread `name`; whatever it raises is logged, and told to `failed`."""
    try:
        act()
    except BaseException as error:  # nothing above this would take it
        try:
            log.error("thread %s: %r", name, error, exc_info=error)
        finally:
            failed(f"thread {name}: {describe(error)}")


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
