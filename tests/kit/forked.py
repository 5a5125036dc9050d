# SPDX-License-Identifier: Apache-2.0
"""Jobs of `layerwise bench` from a process that has imported torch: torchrun's agent and the workers are as they are,
without their imports.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from kit.runners import Warm, WarmJob
from layerwise_dist.bench import killing, launching


class Forked:
    """As the Popen of a job."""

    def __init__(self, job: WarmJob, log: Path, errors: IO[bytes]) -> None:
        self._job, self._log, self._errors, self.pid = job, log, errors, job.pid

    @property
    def stdout(self) -> Iterator[str]:
        while not self._log.exists():
            time.sleep(0.01)
        with open(self._log) as lines:
            part = ""
            while True:
                over = self._job.poll() is not None
                while text := lines.readline():
                    part += text
                    if part.endswith("\n"):
                        yield part
                        part = ""
                if over:
                    self._errors.write(self._log.read_bytes())
                    self._errors.flush()
                    return
                time.sleep(0.01)

    def poll(self) -> int | None:
        return self._job.poll()

    def wait(self) -> int:
        while (code := self._job.poll()) is None:
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def fork_from(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> list[WarmJob]:
    """From now on the benchmarks' jobs come from there. They are listed as they are started."""
    jobs: list[WarmJob] = []

    @contextmanager
    def running(command: list[str], errors: IO[bytes], environment: Mapping[str, str]) -> Iterator[Forked]:
        told = dict(word[2:].split("=") for word in command[:-1] if word.startswith("--") and "=" in word)
        ranks, restarts = int(told.get("nproc-per-node", 0)), int(told.get("max-restarts", 0))
        env = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment}
        job = warm.start("bench.py", ranks, *command[-2:], env=env, max_restarts=restarts)
        jobs.append(job)
        try:
            yield Forked(job, job._log, errors)
        finally:
            job.kill()

    monkeypatch.setattr(launching, "running", running)
    monkeypatch.setattr(killing, "running", running)
    return jobs
