# SPDX-License-Identifier: Apache-2.0
"""How much is free on a disk, asked on a thread of its own: a disk that hangs leaves the last answer, and its age."""

from __future__ import annotations

import os
import threading
import time
from typing import NamedTuple

from layerwise_dist.supervision import background
from layerwise_dist.telemetry.assembling import Measures

_PATIENCE_S = 2.0  # a disk that is well answers within a millisecond


class _Answer(NamedTuple):
    at: float
    nbytes: int | None


class FreeSpace:
    """Of the disk of one directory. `measures` belongs to one thread, which waits for an answer once, and for a short
    time: while that one does not come, nothing is asked again and nothing waits.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._question: threading.Thread | None = None
        self._answer: _Answer | None = None  # replaced as a whole, by the thread of the question

    def measures(self) -> Measures:
        """`disk_free_bytes` and `disk_free_age_s`; None of a disk that has not answered yet, or with an error."""
        if self._question is None or not self._question.is_alive():
            try:
                self._question = background.start("layerwise-free-space", self._ask, background.log_only)
                self._question.join(_PATIENCE_S)
            except OSError:
                pass  # no thread is to be had now: the last answer ages, which the measures tell
        answer = self._answer
        if answer is None or answer.nbytes is None:
            return {"disk_free_bytes": None, "disk_free_age_s": None}
        return {"disk_free_bytes": answer.nbytes, "disk_free_age_s": time.monotonic() - answer.at}

    def _ask(self) -> None:
        found = free_bytes(self._directory)
        self._answer = _Answer(time.monotonic(), found)


def free_bytes(directory: str) -> int | None:
    """Bytes that are left to the user; None where the system does not say."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
