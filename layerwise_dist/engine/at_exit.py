# SPDX-License-Identifier: Apache-2.0
"""Engines that a script has not closed: closed at the process's exit, while their threads can still end in order.

What they have is no other engine's until then.

The interpreter ends daemon threads wherever they are; one that comes back from the native core then takes the process
down with SIGABRT.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from layerwise_dist.errors import LayerwiseError, UnsupportedError

if TYPE_CHECKING:
    from layerwise_dist.engine.holdings import Holdings

log = logging.getLogger("layerwise_dist")


class Closable(Protocol):
    """What ends an engine."""

    def end(self, *, orderly: bool) -> None: ...


@dataclass(frozen=True)
class _Open:
    closing: Closable
    holdings: Holdings | None  # None if all that it has is lent
    directory: str


_open: dict[int, _Open] = {}  # by identity; alive until closed, since their threads are
_process = os.getpid()


def opened(closing: Closable, holdings: Holdings | None, directory: str) -> None:
    """Registers an engine, with what it has and its directory, unless it is already. It is closed before whatever was
    registered earlier to end at the exit.
    """
    global _process
    if _process != os.getpid():  # a forked child: those of the parent are the parent's
        _open.clear()
        _process = os.getpid()
    _open[id(closing)] = _Open(closing, holdings, directory)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def closed(closing: Closable) -> None:
    """Lets go of it."""
    _open.pop(id(closing), None)


def open_engines() -> list[Closable]:
    """What ends those of this process that are not closed yet."""
    return [each.closing for each in _here()]


def open_directories() -> list[str]:
    """Where these save."""
    return [each.directory for each in _here()]


def _here() -> list[_Open]:
    return list(_open.values()) if _process == os.getpid() else []


def check_free(wanted: Holdings) -> None:
    """Raises UnsupportedError, by name, if an engine that is open has any of this."""
    for each in _here():
        if each.holdings is not None and (common := wanted.common(each.holdings)):
            raise UnsupportedError(
                f"{common} is already attached, with checkpoints in {each.directory}: close() that first. Several "
                "models or optimizers of one loop belong in one attach(models={...}, optimizers={...})"
            )


def begun() -> bool:
    """Whether the script is over, and this is called by what was registered for the process's exit."""
    main = threading.main_thread()
    return threading.current_thread() is main and not main.is_alive()


def _close_all() -> None:
    error = getattr(sys, "last_value", None)  # what ended the script, if something did
    for closing in open_engines():
        if error is None:
            log.warning("close() was not called; closing now, at the end of the script. An open iteration is not saved")
        try:
            closing.end(orderly=error is None)
        except LayerwiseError as failed:
            log.error("the last checkpoints were not committed: %s", failed)
