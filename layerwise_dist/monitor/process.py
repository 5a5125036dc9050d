# SPDX-License-Identifier: Apache-2.0
"""The monitor as a process: started by the training process, it notices that one's death and survives it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import weakref

from layerwise_dist.supervision.processes import fields_of, own_environment

log = logging.getLogger("layerwise_dist")

COMMAND = [sys.executable, "-m", "layerwise_dist.monitor"]

_live: weakref.WeakSet[MonitorProcess] = weakref.WeakSet()


class MonitorProcess:
    """A new process, with its own session, none of this one's standard streams, and two descriptors: one end of a
    socket, and the memory file of the pool, which has no name anywhere.

    Attributes:
        pid: of the monitor.
        socket: this side's end. Whoever takes it closes it.
        memory: descriptor of the memory file.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self.socket, theirs = socket.socketpair()
        self.memory = -1
        try:
            self.memory = os.memfd_create("layerwise-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno()), str(self.memory), str(os.getpid())], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, close_fds=True,
                pass_fds=(theirs.fileno(), self.memory), env=own_environment(),
            )  # fmt: skip
        except BaseException:
            self.socket.close()
            if self.memory >= 0:
                os.close(self.memory)
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        _live.add(self)

    def ended(self, timeout_s: float) -> str | None:
        """How it ended, within so many seconds; None if it has not."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def close(self, timeout_s: float) -> None:
        """Waits for its end, which must have been asked for. One that is still busy then ends by itself later; one
        that is stopped cannot, and is killed.
        """
        _live.discard(self)
        deadline = time.monotonic() + timeout_s
        if self.ended(timeout_s) is None:
            if _is_stopped(self.pid):
                log.warning("the monitor (pid %d) is stopped and cannot exit: killing it", self.pid)
                self._process.send_signal(signal.SIGKILL)
                self.ended(max(5.0, deadline - time.monotonic()))
            else:
                log.warning(
                    "the monitor (pid %d) did not exit within %g s: it is left to finish", self.pid,
                    timeout_s,
                )  # fmt: skip
                self._process.returncode = 0  # nobody waits for it any more
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1

    def leave_to_parent(self) -> None:
        """In a forked child, which must not keep what the monitor learns of this process's death by."""
        for descriptor in (self.socket.detach(), self.memory):
            if descriptor >= 0:
                os.close(descriptor)
        self.memory = -1


def _is_stopped(pid: int) -> bool:
    return fields_of(pid)[:1] in (["T"], ["t"])


def _in_child() -> None:
    for process in list(_live):
        process.leave_to_parent()
    _live.clear()


os.register_at_fork(after_in_child=_in_child)
