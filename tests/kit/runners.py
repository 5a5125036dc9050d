# SPDX-License-Identifier: Apache-2.0
"""Jobs of tests, under torchrun or any other command: none outlives its test, and each wait has a deadline."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerwise_dist.supervision.processes import fields_of, is_over, kill_all, marked

JOBS = Path(__file__).parents[1] / "jobs"
# The environment of DeepSpeed's jobs. What it compiles lies in this virtual environment: a DeepSpeed in another place
# would compile it anew.
DEEPSPEED = {
    "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # ninja may be in the virtual environment only
}  # fmt: skip
_TOKEN = "LAYERWISE_TEST_JOB"
# torch looks up the names of the addresses that its stores hear from; a name server that loses one question in ten
# would hold each of these jobs up for five seconds.
QUICK = {
    "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RES_OPTIONS": "timeout:1 attempts:1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a process that imports Inductor would start others that compile for it
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A job that ended: `output` is standard output and error of launcher and ranks, interleaved."""

    returncode: int
    output: str

    def lines(self, prefix: str) -> list[str]:
        """What follows `prefix` in each output line that starts with it."""
        return [line[len(prefix) :].strip() for line in self.output.splitlines() if line.startswith(prefix)]


class Running:
    """A command and all its descendants, known by a token in their environment: torchrun gives ranks sessions of their
    own.
    """

    def __init__(self, command: list[str], env: Mapping[str, str] | None = None) -> None:
        self._mark = f"{_TOKEN}={uuid.uuid4().hex}".encode()
        name, value = self._mark.decode().split("=")
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **QUICK, **(env or {}), name: value},
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def pids(self) -> list[int]:
        """Processes of this job that are alive, the launcher included."""
        return marked(self._mark)

    def rank_pid(self, rank: int, variable: str = "RANK") -> int | None:
        """The process of one rank, or None when it is not (or no longer) there.

        `variable` is the launcher's name of it.
        """
        wanted = f"{variable}={rank}".encode()
        for pid in self.pids():
            try:
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
            except OSError:
                continue
        return None

    def kill(self) -> None:
        """SIGKILL for all, the launcher first, until none is left."""
        self._process.kill()
        kill_all(self.pids, 20)
        self._process.wait(20)

    def output(self) -> str:
        self._log.flush()
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def wait(self, timeout: float) -> Finished:
        """Waits for the launcher; fails the test with the output so far at `timeout` seconds.

        Nothing is left behind.
        """
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            output = self.output()
            self.kill()
            pytest.fail(f"still running after {timeout:g} s; output:\n{output[-8000:]}")
        self.kill()
        return Finished(self._process.returncode, self.output())

    def close(self) -> None:
        self.kill()
        self._log.close()


def told(out: Path, name: str | int = 0) -> list[dict[str, Any]]:
    """What a process of a job has written into `<name>.jsonl` so far, a rank's under its number."""
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def torchrun_command(script: str | os.PathLike[str], nproc: int, *args: Any, max_restarts: int = 0) -> list[str]:
    """`script` is a path, or the name of a file in tests/jobs. A free port each: --standalone."""
    path = JOBS / script if not os.path.isabs(script) else Path(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return [*launcher, "--max-restarts", str(max_restarts), str(path), *map(str, args)]


class WarmJob:
    """A job started by `Warm`: agent and ranks share one session, whose id is the agent's pid."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self._log = pid, log
        self._rc = Path(f"{log}.rc")
        self._over = self._ended = False

    def poll(self) -> int | None:
        """The agent's exit code; -9 when it was killed; None while it runs.

        A wait asks fifty times a second: it looks at one process, and not at all that the machine has.
        """
        alive = not self._ended and not is_over(fields_of(self.pid))
        self._ended = not alive  # from now on its number may be somebody else's
        if self._rc.exists():  # looked at after the process: it may have written it and ended in between
            return int(self._rc.read_text())
        return None if alive else -signal.SIGKILL

    def pids(self) -> list[int]:
        found: list[int] = []
        for entry in [] if self._over else os.listdir("/proc"):
            if entry.isdigit():
                fields = fields_of(int(entry))
                # The agent itself counts before its setsid() too.
                if not is_over(fields) and self.pid in (int(entry), int(fields[3])):
                    found.append(int(entry))
        self._over = not found  # from now on these numbers may be somebody else's
        return found

    def kill(self) -> None:
        """SIGKILL for all, the agent first, until none is left."""
        kill_all(lambda: sorted(self.pids(), key=lambda pid: pid != self.pid), 20)

    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def ends_within(self, timeout: float) -> bool:
        """Whether the agent ends by itself in time; it is killed with all its ranks in any case."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        by_itself = self.poll() is not None
        self.kill()
        return by_itself

    def wait(self, timeout: float) -> Finished:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                for pid in self.pids():
                    os.kill(pid, signal.SIGUSR1)  # prints where it is (see tests/jobs/warm.py)
                    time.sleep(0.2)
                output = self.output()
                self.kill()
                pytest.fail(f"still running after {timeout:g} s; output:\n{output[-20000:]}")
            time.sleep(0.02)
        self.kill()
        return Finished(code, self.output())


class Warm:
    """torchrun's agent, or a script alone, forked from a process that has imported torch, in a fraction of a second."""

    def __init__(
        self, folder: Path, *modules: str, env: Mapping[str, str] | None = None, out_of: Warm | None = None
    ) -> None:  # fmt: skip
        """`modules` are imported beforehand too, with `env` in the environment; out of another such process, which has
        imported torch already and outlives this one, if there is one.
        """
        self._folder, self._count = folder, 0
        self._jobs: list[WarmJob] = []
        self._asking = threading.Lock()
        self._errors = folder / "server.log"
        self._server: subprocess.Popen[bytes] | None = None
        if out_of is None:
            with open(self._errors, "wb") as errors:
                self._server = subprocess.Popen(
                    [sys.executable, str(JOBS / "warm.py"), *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, env={**os.environ, **QUICK, **(env or {})}, start_new_session=True,
                )  # fmt: skip
            assert self._server.stdin is not None and self._server.stdout is not None
            self._pid = self._server.pid
            self._requests, self._answers = self._server.stdin, self._server.stdout
            return
        with socket.socket(socket.AF_UNIX) as listener:
            name = f"layerwise-warm-{uuid.uuid4().hex}"
            listener.bind(f"\0{name}")
            listener.listen(1)
            listener.settimeout(60)
            more = {"branch": name, "modules": modules, "env": dict(env or {}), "log": str(self._errors)}
            self._pid = out_of._ask(more)
            connection, _ = listener.accept()
        with connection:
            self._requests, self._answers = connection.makefile("wb"), connection.makefile("rb")

    def _ask(self, request: dict[str, Any]) -> int:
        """The process that it has forked for this."""
        with self._asking:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
            assert select.select([self._answers], [], [], 120)[0], f"no answer within 120 s: {self._errors.read_text()}"
            answer = self._answers.readline()
        assert answer, self._errors.read_text()
        return int(json.loads(answer)["pid"])

    def start(
        self, script: str | os.PathLike[str], nproc: int, *args: Any, env: Mapping[str, str] | None = None,
        max_restarts: int = 0, folder: str | os.PathLike[str] = ".", node: dict[str, str] | None = None,
        whole_exit: bool = False, **options: Any,
    ) -> WarmJob:  # fmt: skip
        """`options` are for torchrun's LaunchConfig. `nproc` 0 is the script alone, without an agent, in `folder`; with
        `whole_exit` it ends as an interpreter does, for tests of that, and of examples as users run them.

        May be called from several threads. `node` is what it runs on (see `enter` in tests/jobs/warm.py).
        """
        with self._asking:
            self._count += 1
            log = self._folder / f"job_{self._count}.log"
        request = {
            "script": str(JOBS / script), "nproc": nproc, "args": [str(arg) for arg in args], "env": dict(env or {}),
            "folder": str(folder), "log": str(log), "max_restarts": max_restarts, "options": options, "node": node,
            "whole_exit": whole_exit,
        }  # fmt: skip
        job = WarmJob(self._ask(request), log)
        self._jobs.append(job)
        return job

    def run(
        self, script: str | os.PathLike[str], nproc: int, *args: Any, timeout: float = 60.0, check: bool = True,
        **options: Any,
    ) -> Finished:  # fmt: skip
        finished = self.start(script, nproc, *args, **options).wait(timeout)
        if check and finished.returncode:
            pytest.fail(
                f"{script} on {nproc} ranks ended with {finished.returncode}; output:\n{finished.output[-8000:]}"
            )
        return finished

    def close(self) -> None:
        for job in self._jobs:
            job.kill()
        kill_all(lambda: [] if is_over(fields_of(self._pid)) else [self._pid], 20)
        if self._server is not None:
            self._server.wait(20)
        self._requests.close()
        self._answers.close()
