"""Engines that a script has not closed: closed at the process's exit, while their threads can still end in order.

The interpreter ends daemon threads wherever they are; one that comes back from the native core then takes the process
down with SIGABRT.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from typing import Protocol

from layerwise_dist.errors import LayerwiseError

log = logging.getLogger("layerwise_dist")


class Closable(Protocol):
    def end(self, *, orderly: bool) -> None: ...


_open: dict[int, Closable] = {}  # by identity; alive until closed, since their threads are
_process = os.getpid()


def opened(engine: Closable) -> None:
    """Registers it, unless it is already. It is closed before whatever was registered earlier to end at the exit."""
    global _process
    if _process != os.getpid():  # a forked child: those of the parent are the parent's
        _open.clear()
        _process = os.getpid()
    _open[id(engine)] = engine
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def closed(engine: Closable) -> None:
    """Lets go of it."""
    _open.pop(id(engine), None)


def open_engines() -> list[Closable]:
    """Those of this process that are not closed yet."""
    return list(_open.values()) if _process == os.getpid() else []


def begun() -> bool:
    """Whether the script is over, and this is called by what was registered for the process's exit."""
    main = threading.main_thread()
    return threading.current_thread() is main and not main.is_alive()


def _close_all() -> None:
    error = getattr(sys, "last_value", None)  # what ended the script, if something did
    for engine in open_engines():
        if error is None:
            log.warning("close() was not called: done now, at the end of the script; an open iteration is not saved")
        try:
            engine.end(orderly=error is None)
        except LayerwiseError as failed:
            log.error("the last checkpoints were not committed: %s", failed)
