# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own checkpoint tests, with this library's drop-in in DeepSpeed's place.

    python tests/foreign/deepspeed.py SOURCE_TREE [-k EXPRESSION] [--json FILE] [--deadline S]

SOURCE_TREE is a checkout of DeepSpeed near the version that is installed; only its tests/ are read, nothing is copied
from it and nothing is written to it. Each test of tests/unit/checkpoint runs on two CPU ranks, first with DeepSpeed
alone. Those that pass run again with `deepspeed.initialize()` being the drop-in's. EXPRESSION selects tests as
pytest's does. FILE gets all results as JSON. The exit code is 0 if each test that DeepSpeed passes alone passes with
the drop-in as well, or is one of those in `reasons.json`, each with the reason why it cannot.

DeepSpeed compiles operators at their first use, which takes minutes; the first run may need a longer deadline.
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
# This file is called as what it tests: its folder must not be where `import deepspeed` looks.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
_PATIENCE_S = 8.0  # for the other rank, once one has raised


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE_TREE")
    parser.add_argument("-k", dest="expression", default="", help="only these tests, as pytest's -k selects them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all results go")
    parser.add_argument("--deadline", type=float, default=90.0, metavar="S", help="seconds for each test")
    options = parser.parse_args(argv)
    source, tests = options.source.resolve(), "tests/unit/checkpoint"
    if not (source / tests).is_dir():
        parser.error(f"{source} has no {tests}: it is no checkout of DeepSpeed")
    os.environ["DS_UNITTEST_TIMEOUT"] = str(int(options.deadline) + 60)  # ours comes first, and kills one test only
    in_place = _load_in_place()
    in_place.prepare(source)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then either
    scratch = Path(tempfile.mkdtemp(prefix="layerwise_foreign_"))
    try:
        names = _collect(in_place, source / tests, options.expression, scratch, options.deadline)
        results = _run_all(in_place, source, names, scratch, options.deadline, options.json)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _summary(results, json.loads((HERE / "reasons.json").read_text()), complete=not options.expression)


def _load_in_place() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("layerwise_in_place", HERE / "in_place.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _collect(in_place: Any, folder: Path, expression: str, scratch: Path, deadline_s: float) -> list[str]:
    out = scratch / "names.json"
    _in_a_fork(lambda: in_place.collect(folder, expression, out), scratch / "collect.log", deadline_s, lambda: False)
    if not out.exists():
        raise SystemExit(f"the tests could not be collected:\n{(scratch / 'collect.log').read_text()[-4000:]}")
    return [name.rpartition("unit/checkpoint/")[2] for name in json.loads(out.read_text())]


def _run_all(
    in_place: Any, source: Path, names: list[str], scratch: Path, deadline_s: float, out: Path | None
) -> list[dict[str, Any]]:
    results = []
    for number, name in enumerate(names, 1):
        result: dict[str, Any] = {"test": name}
        for kind in ("plain", "drop_in"):
            if kind == "drop_in" and result["plain"]["outcome"] != "passed":
                continue
            result[kind] = _run(in_place, source, name, kind == "drop_in", scratch / f"{number}_{kind}", deadline_s)
        results.append(result)
        said = ", ".join(f"{kind} {result[kind]['outcome']}" for kind in ("plain", "drop_in") if kind in result)
        print(f"[{number}/{len(names)}] {name}: {said}", flush=True)
        if out is not None:  # each time, for who ends it early
            out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _run(in_place: Any, source: Path, name: str, drop_in: bool, scratch: Path, deadline_s: float) -> dict[str, Any]:
    scratch.mkdir()
    test = f"{source}/tests/unit/checkpoint/{name}"
    began = time.monotonic()

    def raised() -> bool:
        return any(scratch.glob("*.raised"))

    log, locks = scratch / "log", _build_locks()
    try:
        _in_a_fork(lambda: in_place.run_test(test, drop_in=drop_in, scratch=scratch), log, deadline_s, raised)
    finally:
        for lock in _build_locks() - locks:  # of a build that was killed: the next would wait for it without end
            lock.unlink(missing_ok=True)
    result = {"outcome": "failed", "reason": f"it did not end within {deadline_s:g} s"}
    if (scratch / "result.json").exists():
        result = json.loads((scratch / "result.json").read_text())
    if result["outcome"] == "failed":
        first = sorted(scratch.glob("*.raised"), key=lambda path: path.stat().st_mtime)
        result["reason"] = first[0].read_text() if first else result["reason"]
        result["log"] = log.read_text(errors="replace")[-20000:]
    shutil.rmtree(scratch, ignore_errors=True)
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def _build_locks() -> set[Path]:
    return set(Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"))


def _in_a_fork(action: Any, log: Path, deadline_s: float, raised: Any) -> None:
    """Runs it in a process and a session of its own; nothing of them is left when this returns."""
    from layerwise_dist.supervision.processes import kill_all

    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(target, 1)
            os.dup2(target, 2)
            action()
            code = 0
        finally:
            os._exit(code)
    deadline, since, over = time.monotonic() + deadline_s, None, False
    try:
        while not (over := os.waitpid(pid, os.WNOHANG)[0] == pid):
            now = time.monotonic()
            since = since or (now if raised() else None)
            if now > deadline or (since is not None and now > since + _PATIENCE_S):
                break
            time.sleep(0.05)
    finally:
        if not over:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        kill_all(lambda: _in_session(pid), 20)


def _in_session(session: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[3]) == session:
                found.append(int(entry))
    return found


def _summary(results: list[dict[str, Any]], reasons: dict[str, str], *, complete: bool) -> int:
    """Prints it; the exit code. `reasons` are by test, or by all that a test's name begins with."""
    passed = [each["test"] for each in results if each.get("drop_in", {}).get("outcome") == "passed"]
    failed = [each for each in results if "drop_in" in each and each["test"] not in passed]
    alone = [each for each in results if "drop_in" not in each]
    reason_of = {
        each["test"]: next((why for start, why in reasons.items() if each["test"].startswith(start)), None)
        for each in failed
    }
    unexplained = [each for each in failed if reason_of[each["test"]] is None]
    stale = [start for start in reasons if not any(test.startswith(start) for test in reason_of)] if complete else []
    print(f"\nDeepSpeed alone passes {len(passed) + len(failed)} tests; of these, with the drop-in in its place:")
    print(f"  {len(passed)} pass, {len(failed) - len(unexplained)} cannot pass, {len(unexplained)} fail")
    print(f"{len(alone)} are skipped on CPU or fail with DeepSpeed alone")
    for each in failed:
        why = reason_of[each["test"]]
        print(f"  {'cannot pass' if why else 'FAILS'}: {each['test']}: {why or each['drop_in']['reason'][:600]}")
    for start in stale:
        print(f"  reasons.json explains {start}, which does not fail")
    return 1 if unexplained or stale else 0


if __name__ == "__main__":
    sys.exit(main())
