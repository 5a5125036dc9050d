# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own tests of DCP storage, with this library's writer and reader in place of the file system's.

    python tests/foreign/dcp.py SOURCE_TREE [--json FILE] [--deadline S]

SOURCE_TREE is a checkout of PyTorch near the version that is installed; only test/distributed/checkpoint is read,
nothing is copied from it and nothing is written to it. Each file of tests runs on CPU in a process of its own, first
with PyTorch alone. Then FileSystemWriter and FileSystemReader are LayerwiseWriter and LayerwiseReader, also where DCP
chooses them by itself. FILE gets all results as JSON; S is the deadline of one file of tests in one of the two ways,
seconds. The exit code is 0 if each test that PyTorch passes alone passes with this library too, or is one of those in
`reasons_dcp.json`, each with the reason why it cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]  # its names are others' packages'
FILES = (
    "file_system_checkpoint_cpu", "planner", "nested_dict", "dtensor_resharding", "dedup_tensors", "save_load_api"
)  # fmt: skip
_OPTIONS = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout", "-p", "no:randomly"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE_TREE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all results go")
    parser.add_argument("--deadline", type=float, default=300.0, metavar="S", help="seconds for each file")
    options = parser.parse_args(argv)
    folder = options.source.resolve() / "test" / "distributed" / "checkpoint"
    files = [path for name in FILES if (path := folder / f"test_{name}.py").is_file()]
    if not files:
        parser.error(f"{folder} has none of the tests of DCP storage: is {options.source} a checkout of PyTorch?")
    scratch = Path(tempfile.mkdtemp(prefix="layerwise_foreign_"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)  # the tests leave what they make
    results: dict[str, dict[str, Any]] = {}
    try:
        _prepare()
        for path in files:
            for kind in ("plain", "layerwise"):
                for test, found in _run(path, kind == "layerwise", scratch, options.deadline).items():
                    results.setdefault(f"{path.name}::{test}", {})[kind] = found
            for test, found in results.items():
                if test.startswith(path.name):
                    outcomes = (f"{kind} {each['outcome']}" for kind, each in found.items())
                    print(f"{test}: {', '.join(outcomes)}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return _summary(results, json.loads((HERE / "reasons_dcp.json").read_text()))


def _prepare() -> None:
    """Imports what all tests need, once."""
    os.environ.update({"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    sys.dont_write_bytecode = True  # the source tree stays as it is
    import pytest  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    import torch.multiprocessing
    from torch.testing._internal import common_distributed
    from torch.testing._internal.distributed._tensor import common_dtensor

    import layerwise_dist.dcp  # noqa: F401

    torch.set_num_threads(1)

    # What asks for GPUs for no other reason than that DCP is tested on them runs on CPU; what needs one then fails
    # with PyTorch alone, and is left out.
    def anywhere(*args: Any, **kwargs: Any) -> Any:
        return lambda test: test

    common_distributed.skip_if_lt_x_gpu = common_dtensor.skip_if_lt_x_gpu = anywhere

    def fork(self: Any) -> None:  # in place of processes that import everything anew
        self._start_processes(torch.multiprocessing.get_context("fork").Process)

    common_distributed.MultiProcessTestCase._spawn_processes = fork


def put_in_place() -> None:
    """From now on DCP's storage on a file system is this library's."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import _storage_utils, filesystem

    from layerwise_dist.dcp import LayerwiseReader, LayerwiseWriter
    from layerwise_dist.errors import UnsupportedError

    class Writer(LayerwiseWriter):
        """Options of how files are cut and flushed are this library's own affair."""

        def __init__(self, path: Any, *args: Any, _extensions: Any = None, **options: Any) -> None:
            if _extensions:
                raise UnsupportedError("_extensions: streams of bytes that nobody but DCP's own storage can read")
            super().__init__(path)

    class Reader(LayerwiseReader):
        def __init__(self, path: Any, _extension_registry: Any = None) -> None:
            super().__init__(path)

    for module in (dcp, filesystem, _storage_utils):
        module.FileSystemWriter, module.FileSystemReader = Writer, Reader  # type: ignore[attr-defined]


def _run(path: Path, in_place: bool, scratch: Path, deadline_s: float) -> dict[str, dict[str, str]]:
    """By each test's name, what became of it; of one that did not end in time too."""
    out = scratch / "results.jsonl"
    out.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            target = os.open(scratch / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(target, 1)
            os.dup2(target, 2)
            _test(path, in_place, out)
            code = 0
        finally:
            os._exit(code)
    deadline, over = time.monotonic() + deadline_s, False
    try:
        while time.monotonic() < deadline and not (over := os.waitpid(pid, os.WNOHANG)[0] == pid):
            time.sleep(0.05)
    finally:
        if not over:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        _clear(pid)
    found: dict[str, dict[str, str]] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        each = json.loads(line)
        found[each["test"]] = {"outcome": each["outcome"], "reason": each["reason"]}
    if not found:
        print((scratch / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
    return found


def _test(path: Path, in_place: bool, out: Path) -> None:
    import pytest

    if in_place:
        put_in_place()

    def tell(test: str, outcome: str, reason: str) -> None:
        with out.open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")

    class Report:
        def pytest_collection_finish(self, session: Any) -> None:
            for item in session.items:
                tell(item.nodeid.partition("::")[2], "failed", "it did not end in time")

        def pytest_runtest_logreport(self, report: Any) -> None:
            test = report.nodeid.partition("::")[2]
            if report.skipped:
                tell(test, "skipped", str(report.longrepr[2]))
            elif report.failed:
                lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
                said = [line for line in lines if "Error" in line or "Exception" in line]
                tell(test, "failed", (said or lines or [""])[-1].strip())
            elif report.when == "call":
                tell(test, "passed", "")

    pytest.main([f"--rootdir={path.parent}", *_OPTIONS, str(path)], plugins=[Report()])


def _clear(session: int) -> None:
    from layerwise_dist.supervision.processes import kill_all

    def left() -> list[int]:
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[3]) == session:
                found.append(int(entry))
        return found

    kill_all(left, 20)


def _summary(results: dict[str, dict[str, Any]], reasons: dict[str, str]) -> int:
    """Prints it; the exit code. `reasons` are by test, or by all that a test's name begins with."""
    alone = {test for test, found in results.items() if found.get("plain", {}).get("outcome") == "passed"}
    passed = {test for test in alone if results[test].get("layerwise", {}).get("outcome") == "passed"}
    why = {
        test: next((reason for start, reason in reasons.items() if test.startswith(start)), None)
        for test in alone - passed
    }
    unexplained = sorted(test for test, reason in why.items() if reason is None)
    print(f"\nPyTorch alone passes {len(alone)} tests; of these, with this library as the storage:")
    print(f"  {len(passed)} pass, {len(why) - len(unexplained)} cannot pass, {len(unexplained)} fail")
    print(f"{len(results) - len(alone)} are skipped or fail with PyTorch alone")
    for test in sorted(why):
        said = why[test] or results[test].get("layerwise", {}).get("reason", "it did not run")[:600]
        print(f"  {'cannot pass' if why[test] else 'FAILS'}: {test}: {said}")
    for test in sorted(set(results) - alone):
        found = results[test].get("plain", {"outcome": "failed", "reason": "it did not run"})
        print(f"  {found['outcome']} alone: {test}: {found['reason'][:200]}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
