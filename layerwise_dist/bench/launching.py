# SPDX-License-Identifier: Apache-2.0
"""The jobs that a benchmark starts, and what their rank 0 says: lines of JSON after a mark on standard output."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerwise_dist.bench.failure import BenchFailed
from layerwise_dist.supervision.processes import running

_MARK = "@layerwise-bench "
_SHOWN = 15  # lines of what a job that failed has said
_PR_SET_PDEATHSIG = 1


def tell(what: object) -> None:
    """Of a worker: to the benchmark."""
    print(_MARK + json.dumps(what), flush=True)


def end_with_launcher() -> None:
    """Of a worker, first of all: one that outlives whoever started it would go on writing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def command_of(module: str, spec: Mapping[str, Any], ranks: int | None, *, restarts: int = 0) -> list[str]:
    """What runs a module of this room with `spec` as its argument, under torchrun with so many ranks, or alone with
    None. torchrun starts all ranks again when one dies, `restarts` times.
    """
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher += [f"--max-restarts={restarts}"]
    return [*launcher, "-m", f"layerwise_dist.bench.{module}", json.dumps(spec)]


def told_by(line: str) -> Any | None:
    """What a worker told by this line of its standard output; None if it is another one's."""
    return json.loads(line[len(_MARK) :]) if line.startswith(_MARK) else None


def told(job: subprocess.Popen[str]) -> Iterator[Any]:
    """What the job tells, as it comes, until it ends."""
    assert job.stdout is not None
    for line in job.stdout:
        if (each := told_by(line)) is not None:
            yield each


def last_words(errors: Path) -> list[str]:
    """The end of what a job has said to its standard error."""
    return errors.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN:]


def launch(
    module: str, spec: Mapping[str, Any], folder: Path, *, what: str, ranks: int | None,
    environment: Mapping[str, str], heard: Callable[[Any], None],
) -> None:  # fmt: skip
    """Runs a module of this room with `spec` as its argument, under torchrun with so many ranks, or alone with None.
    `heard` gets what it tells, as it comes. Its standard error goes into a file in `folder`.

    Raises BenchFailed, which says `what` and shows the end of that file, if the job fails.
    """
    errors = folder / "errors.txt"
    with open(errors, "wb") as file, running(command_of(module, spec, ranks), file, environment) as job:
        for each in told(job):
            heard(each)
        code = job.wait()
    if code != 0:
        raise BenchFailed("\n".join([f"{what} ended with exit code {code}:", *last_words(errors)]))
