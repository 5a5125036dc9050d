# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: all ranks agree on one boundary, commit it, and leave; in any case this process leaves in time.

Python runs signal handlers on the main thread, between two bytecodes. A main thread that sits in a collective whose
other side is dead gets to none, and both handler and wake-up descriptor may be taken by something else (asyncio,
the script). So the signal is heard by a handler of the native core, in front of whoever else handles it. That wakes a
thread, which asks the other ranks, and ends the process at the deadline.

A launcher signals whole process groups. Workers of data loaders that died of it would take the rest of the iteration
with them, and torch raises on the main thread for each that dies. So they leave their end to their rank, and from the
signal on, nothing hears of children that die.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from layerwise_dist import _native
from layerwise_dist.errors import ConfigError
from layerwise_dist.frameworks.private_names import require
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")

FAREWELL_S = 3.0  # of the time to leave: for closing, and for what the script does after it

_SIGNAL = signal.SIGTERM
_KEEP_MS = 200  # how long another handler, installed since, may stay in front
_WORKERS = "torch.utils.data._utils.signal_handling"
_active: weakref.WeakSet[Preemption] = weakref.WeakSet()


def check_here() -> None:
    """Raises ConfigError on another thread than the main one, which `SystemExit` would end alone. UnsupportedError if
    this torch lacks what workers of data loaders need.
    """
    require("preemption")
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "preemption.enabled needs attach() on the main thread: only the main thread can leave the process "
            "(SystemExit)"
        )


class Preemption:
    """From the constructor until `close`. REQUIRES: made on the main thread."""

    def __init__(
        self, rank: int, *, grace_s: float, exit_code: int, ask: Callable[[str], None], failed: background.Failed
    ) -> None:
        """`ask(why)` asks all ranks to leave together; it is called on a thread of this object's and must not wait.

        Raises OSError.
        """
        check_here()
        self._rank, self._grace_s, self._ask = rank, grace_s, ask
        self.exit_code = exit_code
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._closed = threading.Event()
        self._over = threading.Event()  # all are leaving, or it is closed
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Both at once: a process that is told to leave may get no thread any more.
        self.grace = background.start("layerwise-grace", self._end_in_time, lambda _: end_process(self.exit_code))
        self._thread = background.start("layerwise-signals", self._listen, failed)
        _active.add(self)
        _native.hear_signal(_SIGNAL, self.bell)

    def leaving(self, why: str) -> None:
        """All ranks leave: from now on the process has `grace_s` seconds.

        From any thread; only the first call counts.
        """
        with self._lock:
            if self._deadline is not None:
                return
            self._deadline = time.monotonic() + self._grace_s
        self._over.set()
        _native.forget_dead_children()
        log.warning(
            "rank %d: leaving within %g s, with a checkpoint if all ranks reach one: %s", self._rank, self._grace_s, why
        )

    @property
    def begun(self) -> bool:
        """Whether all ranks were told to leave."""
        return self._deadline is not None

    @property
    def remaining_s(self) -> float:
        """Seconds until the process ends, whatever it does."""
        return self._grace_s if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def leave(self) -> None:
        """Raises SystemExit with the exit code. What is left of the script may clean up; the deadline stands."""
        atexit.register(_destroy_process_group)
        raise SystemExit(self.exit_code)

    def close(self) -> None:
        """Signals are handled as before. If all are leaving, the deadline stands, and further signals change nothing:
        a launcher signals the rest once the first rank has left.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._over.set()
        os.eventfd_write(self.bell, 1)
        self._thread.join(5.0)  # it may be about to take its place in front once more
        _active.discard(self)
        if not self.begun:
            _native.stop_hearing(self.bell)
            if not self._thread.is_alive():
                os.close(self.bell)

    # -- inside -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        bell = select.poll()
        bell.register(self.bell, select.POLLIN)
        while not self._closed.is_set():
            if bell.poll(_KEEP_MS):
                os.eventfd_read(self.bell)
                if not self._closed.is_set():
                    why = f"{signal.Signals(_SIGNAL).name} on rank {self._rank}"
                    self.leaving(why)
                    self._ask(why)
            elif not self._closed.is_set():
                _native.hear_signal(_SIGNAL, self.bell)

    def _end_in_time(self) -> None:
        self._over.wait()
        if self._deadline is None:
            return
        while (left := self._deadline - time.monotonic()) > 0:
            time.sleep(left)
        log.warning(
            "rank %d: %g s have passed: the process exits now (exit code %d)", self._rank, self._grace_s, self.exit_code
        )
        end_process(self.exit_code)


def end_process(exit_code: int) -> None:
    """At once, whatever its other threads are in. What was printed and logged is kept, unless nobody takes it."""
    try:
        background.start("layerwise-flush", _flush, lambda _: None).join(1.0)
    finally:
        os._exit(exit_code)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass


def _in_child() -> None:
    """A forked child is no rank: its SIGTERM is its own. That of a data loader's worker is its rank's to decide on."""
    if not _active:
        return
    for preemption in list(_active):
        preemption._closed.set()
        _native.stop_hearing(preemption.bell)
    _active.clear()
    workers: Any = sys.modules.get(_WORKERS)
    if workers is not None:
        plain = workers._set_worker_signal_handlers

        def outliving() -> None:
            plain()
            _native.outlive_signal(_SIGNAL)

        workers._set_worker_signal_handlers = outliving  # in this process, which calls it if it is a worker


os.register_at_fork(after_in_child=_in_child)


def _destroy_process_group() -> None:
    """After the script's own end: torch may abort the interpreter, and with it the exit code, if the group is left."""
    import torch.distributed as dist

    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
