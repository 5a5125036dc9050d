# SPDX-License-Identifier: Apache-2.0
"""One of DeepSpeed's own tests in a forked process, with plain DeepSpeed or with the drop-in in its place.

`prepare()` imports what all tests need, once; `run_test()` is called in a process of its own, forked from that one.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RANKS = 2
BLOCK = {"every_n_steps": None, "commit": {"timeout_s": 30.0}}


def prepare(source: Path) -> None:
    """REQUIRES: nothing has imported torch or DeepSpeed yet. Raises ImportError."""
    os.environ.update({
        "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1", "DS_DISABLE_REUSE_DIST_ENV": "1",
        "PYTHONWARNINGS": "ignore", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    })  # fmt: skip
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    sys.dont_write_bytecode = True  # the source tree stays as it is
    import deepspeed
    import torch
    import torch.multiprocessing

    import layerwise_dist.deepspeed  # noqa: F401

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only inference uses it, and it compiles for long
    # Of two versions near each other: what one's tests compare of engines, and the other's engines have no more.
    if not hasattr(deepspeed.DeepSpeedEngine, "sparse_tensor_module_names"):
        deepspeed.DeepSpeedEngine.sparse_tensor_module_names = frozenset()
    sys.path.insert(0, str(source / "tests"))
    # The tests ask for processes that import everything anew; a fork of this one has it.
    multiprocessing.set_start_method("fork", force=True)
    torch.multiprocessing.set_start_method = lambda *args, **kwargs: None
    import pytest  # noqa: F401

    gc.collect()
    gc.freeze()  # what each forked process would walk, and so copy, at each collection


def collect(folder: Path, expression: str, out: Path) -> None:
    """Writes the names of the tests in `folder` that pytest's -k selects by `expression` to `out`."""
    import pytest

    class Names:
        def pytest_collection_finish(self, session: Any) -> None:
            out.write_text(json.dumps([item.nodeid for item in session.items]))

    pytest.main(["--collect-only", "-q", "-k", expression, *_OPTIONS, str(folder)], plugins=[Names()])


def run_test(test: str, *, drop_in: bool, scratch: Path) -> None:
    """`test` is a path and pytest's name of a test within. Writes `scratch`/result.json when it ends, and
    `scratch`/<rank>.raised as soon as a rank raises.
    """
    import pytest

    if drop_in:
        put_in_place(scratch / "layerwise")
    _tell_what_ranks_raise(scratch)
    result: dict[str, Any] = {"outcome": "failed", "reason": "pytest did not run it"}

    class Report:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.skipped:
                result.update(outcome="skipped", reason=str(report.longrepr[2]))
            elif report.failed:
                result.update(outcome="failed", reason=_last_line(str(report.longrepr)))
            elif report.when == "call":
                result.update(outcome="passed", reason="")

    pytest.main([f"--basetemp={scratch}/pytest", *_OPTIONS, test], plugins=[Report()])
    (scratch / "result.tmp").write_text(json.dumps(result))
    (scratch / "result.tmp").rename(scratch / "result.json")


_OPTIONS = ["-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout", "-p", "no:randomly"]


def put_in_place(folder: Path) -> None:
    """From now on `deepspeed.initialize()` is the drop-in's, with a block that names `folder`."""
    import deepspeed

    import layerwise_dist.deepspeed as drop_in

    signature = inspect.signature(deepspeed.initialize)

    def initialize(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        name = "config" if given.get("config") is not None else "config_params"
        config = given.get(name)
        if config is None and hasattr(given.get("args"), "deepspeed_config"):
            name, config = "config", given["args"].deepspeed_config
            given["args"].deepspeed_config = None
        if isinstance(config, (str, os.PathLike)):
            config = json.loads(Path(config).read_text())
        if isinstance(config, Mapping):
            given[name] = {**config, "layerwise_checkpoint": {**BLOCK, "dir": str(folder)}}
        return drop_in.initialize(**given)

    deepspeed.initialize = initialize


def _tell_what_ranks_raise(scratch: Path) -> None:
    """A rank that raises leaves the other waiting in a collective: what it raised is told at once, in a file."""
    from _pytest.outcomes import Skipped
    from unit.common import DistributedExec

    run = DistributedExec._dist_run

    @functools.wraps(run)  # multiprocessing looks it up by its name
    def told(self: Any, local_rank: int, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, local_rank, *args, **kwargs)
        except Skipped:
            raise
        except BaseException as error:
            traceback.print_exc()
            (scratch / f"{local_rank}.raised").write_text(f"{type(error).__name__}: {error}")
            raise

    DistributedExec._dist_run = told


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E  ")]
    return lines[0][1:].strip() if lines else (text.strip().splitlines() or [""])[-1]
