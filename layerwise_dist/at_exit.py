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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from layerwise_dist.errors import LayerwiseError, UnsupportedError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("layerwise_dist")


class Closable(Protocol):
    def end(self, *, orderly: bool) -> None: ...


@dataclass(frozen=True)
class _Open:
    engine: Closable
    models: list[torch.nn.Module]  # that it hooks
    directory: str


_open: dict[int, _Open] = {}  # by the engine's identity; alive until closed, since their threads are
_process = os.getpid()


def opened(engine: Closable, models: list[torch.nn.Module], directory: str) -> None:
    """Registers it, with the models that it hooks and its directory, unless it is already. It is closed before whatever
    was registered earlier to end at the exit.
    """
    global _process
    if _process != os.getpid():  # a forked child: those of the parent are the parent's
        _open.clear()
        _process = os.getpid()
    _open[id(engine)] = _Open(engine, models, directory)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def closed(engine: Closable) -> None:
    """Lets go of it."""
    _open.pop(id(engine), None)


def open_engines() -> list[Closable]:
    """Those of this process that are not closed yet."""
    return [each.engine for each in _open.values()] if _process == os.getpid() else []


def check_free(roots: Iterable[torch.nn.Module]) -> None:
    """Raises UnsupportedError if an engine that is open has any of these models, or a part of one: each would save what
    the other fences, and count the other's iterations.
    """
    wanted = {id(module) for root in roots for module in root.modules()}
    for each in list(_open.values()) if _process == os.getpid() else []:
        taken = [module for root in each.models for module in root.modules() if id(module) in wanted]
        if taken:
            raise UnsupportedError(
                f"this model, or a part of it ({type(taken[0]).__name__}), is attached already, with checkpoints in "
                f"{each.directory}: close() that first. Several models or optimizers of one loop belong into one "
                "attach(models={...}, optimizers={...})"
            )


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
