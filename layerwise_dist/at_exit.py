"""Engines that a script has not closed: closed at the process's exit, while their threads can still end in order.

The interpreter ends daemon threads wherever they are; one that comes back from the native core then takes the process
down with SIGABRT.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from typing import Protocol

from layerwise_dist.errors import LayerwiseError

log = logging.getLogger("layerwise_dist")

_LIMIT_S = 30.0  # for all of them


class Closable(Protocol):
    def end(self, *, orderly: bool, limit_s: float, seal: bool) -> None: ...


_open: dict[int, Closable] = {}  # by identity; alive until closed, since their threads are
_process = os.getpid()


def opened(engine: Closable) -> None:
    """Registers it, unless it is already."""
    global _process
    if _process != os.getpid():  # a forked child: those of the parent are the parent's
        _open.clear()
        _process = os.getpid()
    _open[id(engine)] = engine


def closed(engine: Closable) -> None:
    """Lets go of it."""
    _open.pop(id(engine), None)


@atexit.register
def _close_all() -> None:
    error = getattr(sys, "last_value", None)  # what ended the script, if something did
    deadline = time.monotonic() + _LIMIT_S
    for engine in list(_open.values()) if _process == os.getpid() else []:
        if error is None:
            log.warning("close() was not called: done now, at the end of the script; an open iteration is not saved")
        try:
            # Where in an iteration sys.exit() was called is not known: only what had ended is whole.
            engine.end(orderly=error is None, limit_s=max(0.1, deadline - time.monotonic()), seal=False)
        except LayerwiseError as failed:
            log.error("the last checkpoints were not committed: %s", failed)
