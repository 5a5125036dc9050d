# SPDX-License-Identifier: Apache-2.0
"""Jobs of `layerwise bench` and `selftest` from a process that has imported torch: torchrun's agent and the workers are
as they are, without their imports.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pytest

from kit.runners import Warm, WarmJob
from layerwise_dist.bench import killing, launching
from layerwise_dist.supervision import processes


class Forked:
    """As the Popen of a job."""

    def __init__(self, job: WarmJob, log: Path, errors: IO[bytes], stdin: IO[str] | None = None) -> None:
        self._job, self._log, self._errors, self.pid, self.stdin = job, log, errors, job.pid, stdin

    @cached_property
    def stdout(self) -> Iterator[str]:
        while not self._log.exists() and self._job.poll() is None:
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


@contextmanager
def _input() -> Iterator[tuple[str, IO[str]]]:
    """A pipe's name, and its end to write to: the standard input of a job that has the name as ASKED."""
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "asked")
        os.mkfifo(name)
        with os.fdopen(os.open(name, os.O_RDWR), "w") as pipe:  # for writing alone it would wait for the job
            yield name, pipe


def fork_from(
    warm: Warm, monkeypatch: pytest.MonkeyPatch, places: Sequence[Any] = (launching, killing)
) -> list[WarmJob]:
    """From now on the jobs of these modules come from there, the benchmarks' by default. They are listed as they
    are started.
    """
    jobs: list[WarmJob] = []

    @contextmanager
    def running(
        command: list[str], errors: IO[bytes], environment: Mapping[str, str], *, asked: bool = False
    ) -> Iterator[Any]:
        if "-I" in command:  # another installation
            with processes.running(command, errors, environment, asked=asked) as other:
                yield other
            return
        told = dict(word[2:].split("=") for word in command[:-1] if word.startswith("--") and "=" in word)
        ranks, restarts = int(told.get("nproc-per-node", 0)), int(told.get("max-restarts", 0))
        env = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment}
        with _input() if asked else nullcontext(("", None)) as (env["ASKED"], pipe):
            job = warm.start("bench.py", ranks, *command[-2:], env=env, max_restarts=restarts)
            jobs.append(job)
            try:
                yield Forked(job, job._log, errors, pipe)
            finally:
                job.kill()

    for each in places:
        monkeypatch.setattr(each, "running", running)
    return jobs
