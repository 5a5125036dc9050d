"""SIGTERM: all ranks agree on one boundary, commit it, and leave; and whatever happens, this process leaves in time.

Python runs signal handlers on the main thread, between two bytecodes. A main thread that sits in a collective of which
the other side is dead gets to none. So the signal is also heard through `signal.set_wakeup_fd`, by a thread, which asks
the other ranks, and ends the process at the deadline.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from layerwise_dist.errors import ConfigError

log = logging.getLogger("layerwise_dist")

_SIGNAL = signal.SIGTERM
_active: weakref.WeakSet[Preemption] = weakref.WeakSet()


def check_thread() -> None:
    """Raises ConfigError on another thread than the main one, where Python sets no signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("preemption.enabled needs attach() on the main thread: only there Python handles signals")


class Preemption:
    """From the constructor until `close`, one for a process. REQUIRES: made and closed on the main thread."""

    def __init__(self, rank: int, *, grace_s: float, exit_code: int, ask: Callable[[str], None]) -> None:
        """`ask(why)` asks all ranks to leave together; it is called on a thread of this object's and must not wait."""
        check_thread()
        self._rank, self._grace_s, self._ask = rank, grace_s, ask
        self.exit_code = exit_code
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._ear, self._mouth = socket.socketpair()
        for end in (self._ear, self._mouth):
            end.setblocking(False)
        self._before: Any = signal.signal(_SIGNAL, self._handle)
        self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="layerwise-signals", daemon=True)
        self._closed = threading.Event()
        self._thread.start()
        _active.add(self)

    def leaving(self, why: str) -> None:
        """All ranks leave: from now on the process has `grace_s` seconds.

        From any thread; only the first call counts.
        """
        with self._lock:
            if self._deadline is not None:
                return
            self._deadline = time.monotonic() + self._grace_s
        log.warning(
            "rank %d: leaving within %g s, with a checkpoint if all ranks reach one: %s", self._rank, self._grace_s, why
        )
        threading.Thread(target=self._end_in_time, name="layerwise-grace", daemon=True).start()

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
        """Signals are handled as before. If all are leaving, the deadline stands."""
        if self._closed.is_set():
            return
        self._closed.set()
        _active.discard(self)
        self._restore()
        self._mouth.send(b"\0")
        self._thread.join(5.0)
        self._ear.close()
        self._mouth.close()

    # -- inside -------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        if signal.getsignal(_SIGNAL) == self._handle:  # else somebody has put another in its place
            signal.signal(_SIGNAL, signal.SIG_DFL if self._before is None else self._before)
        if signal.set_wakeup_fd(-1) != self._mouth.fileno():
            log.warning("another signal.set_wakeup_fd() is undone: it came behind attach() and before close()")
        if self._wakeup_before != -1:
            signal.set_wakeup_fd(self._wakeup_before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Behind the wake-up, which did all: the handler of before still runs, if the script had one."""
        if callable(self._before):
            self._before(number, frame)

    def _listen(self) -> None:
        self._ear.setblocking(True)
        while not self._closed.is_set():
            for number in self._ear.recv(64):
                if number == _SIGNAL:
                    why = f"{signal.Signals(_SIGNAL).name} on rank {self._rank}"
                    self.leaving(why)
                    self._ask(why)
                if self._wakeup_before != -1 and number:
                    try:
                        os.write(self._wakeup_before, bytes([number]))
                    except OSError:
                        pass  # its reader is gone, or has not read for long

    def _end_in_time(self) -> None:
        assert self._deadline is not None
        while (left := self._deadline - time.monotonic()) > 0:
            time.sleep(left)
        log.warning(
            "rank %d: %g s are over: the process ends here (exit code %d)", self._rank, self._grace_s, self.exit_code
        )
        end_process(self.exit_code)


def end_process(exit_code: int) -> None:
    """At once, whatever its other threads are in. What was printed and logged is kept, unless nobody takes it."""
    last = threading.Thread(target=_flush, daemon=True)
    last.start()
    last.join(1.0)
    os._exit(exit_code)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass


def _in_child() -> None:
    """A forked child (a worker of a data loader) is no rank: its SIGTERM is its own, and must not wake the parent."""
    for preemption in list(_active):
        _active.discard(preemption)
        preemption._closed.set()
        preemption._restore()


os.register_at_fork(after_in_child=_in_child)


def _destroy_process_group() -> None:
    """Behind the script's own end: torch may abort the interpreter, and with it the exit code, if the group is left."""
    import torch.distributed as dist

    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
