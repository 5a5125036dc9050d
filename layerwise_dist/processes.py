"""Processes that a benchmark or the self-test starts: none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_GRACE_S = 10.0


@contextmanager
def running(command: list[str], errors: Any, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, all of which is gone when the body ends, however it does.

    `errors` takes its standard error; `environment` goes on top of this process's.
    """
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
            try:
                job.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all of it has ended by itself
        job.wait()
        if job.stdout is not None:
            job.stdout.close()


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the body as Ctrl-C does, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
