# SPDX-License-Identifier: Apache-2.0
"""Runs the commands and `restore()` on crafted directories, each in a process of its own that is forked from this one.

    worker.py FOLDER

makes the good directories below FOLDER. Then lines of JSON come on standard input, {"theme", "number"}, and for each
an answer goes out, as `run.Outcome` takes it. A forked process has so much address space as the directory is large and
256 MB more, and a minute for each command.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import importlib
import io
import json
import logging
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import layerwise_dist as lwd  # noqa: E402
import layerwise_dist.cli.restorable  # noqa: E402, F401
import layerwise_dist.engine.assembly  # noqa: E402, F401
from attacks import THEMES  # noqa: E402
from attacks.kit import Target, copy  # noqa: E402
from attacks.run import budget  # noqa: E402
from layerwise_dist.capture import survey  # noqa: E402
from layerwise_dist.cli import app, console  # noqa: E402
from layerwise_dist.commit import records  # noqa: E402
from layerwise_dist.errors import LayerwiseError  # noqa: E402
from layerwise_dist.loop import rng
from layerwise_dist.storage import header, strict_json  # noqa: E402

LIMIT_S = 60  # of a machine on which much else runs; the budget is in seconds of the processor
MORE_BYTES = 256 << 20
# Threads of a session have stacks and arenas, which are address space and not memory.
THREADS_BYTES = 512 << 20


class Job:
    """Trained and frozen parameters, a loader within an epoch, a scheduler: all that there can be in a state."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.loader = DataLoader(torch.arange(24.0).view(8, 3), batch_size=2, shuffle=True)
        self.extra: dict[str, Any] = {}
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.state = {"loader": self.loader, "scheduler": scheduler, "extra": self.extra}

    def attach(self, folder: Path) -> Any:
        return lwd.attach(self.model, self.optimizer, dir=os.fspath(folder), keep_last=9, state=self.state)

    def train(self, steps: int) -> None:
        for step, batch in enumerate(self.loader):
            self.model(batch).square().sum().backward()
            self.optimizer.step()
            if step == steps - 1:
                break

    def digest(self) -> str:
        """Of parameters and optimizer state."""
        found = hashlib.sha256()
        tensors = [*self.model.state_dict().items()]
        for name, param in self.model.named_parameters():
            tensors += [(f"{name}/{key}", each) for key, each in self.optimizer.state.get(param, {}).items()]
        for name, each in tensors:
            found.update(name.encode())
            found.update(each.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def make_good(folder: Path) -> dict[str, str]:
    """Three commits; of these, `branched` goes back to the second and has one more. Digests by step of both."""
    digests: dict[str, str] = {}
    job = Job(1)
    with job.attach(folder / "plain") as ckpt:
        ckpt.restore()
        job.train(3)
    copy(folder / "plain", folder / "branched")
    job = Job(2)
    with job.attach(folder / "branched") as ckpt:
        ckpt.restore(step=2)
        job.train(1)
    for name in ("plain", "branched"):
        for step in (1, 2, 3):
            copy(folder / name, folder / "look")
            job = Job(3)
            with job.attach(folder / "look") as ckpt:
                ckpt.restore(step=step)
            digests[f"{name} {step}"] = job.digest()
            shutil.rmtree(folder / "look")
    return digests


# -- one case ----------------------------------------------------------------------------------------------------------


def command(*args: str) -> dict[str, Any]:
    """What one of the commands does: {"code", "said"}, or {"foreign"}."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["layerwise", *args]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app.main()
        code: Any = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # noqa: BLE001
        return {"foreign": f"{type(error).__name__}: {str(error)[:300]}", "trace": traceback.format_exc()[-3000:]}
    return {"code": code, "said": out.getvalue() + err.getvalue()}


def restore(root: Path) -> dict[str, Any]:
    """What a start does: {"step", "digest"}, {"named"} or {"foreign"}."""
    job = Job(9)
    fresh = job.digest()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("layerwise_dist").addHandler(handler)
    logging.getLogger("layerwise_dist").propagate = False
    try:
        ckpt = job.attach(root)
        try:
            step = ckpt.restore()
        finally:
            ckpt.close()
        return {"step": step, "digest": job.digest(), "said": log.getvalue()}
    except LayerwiseError as error:
        said = str(error)
        if job.digest() != fresh and "undefined" not in said:
            return {"foreign": f"tensors were changed, and the error does not say so: {said[:300]}"}
        return {"named": f"{type(error).__name__}: {said}", "said": log.getvalue() + said}
    except BaseException as error:  # noqa: BLE001
        return {"foreign": f"{type(error).__name__}: {str(error)[:300]}", "trace": traceback.format_exc()[-3000:]}


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


def measured(action: Callable[[], dict[str, Any]], cpu_s: int | None = None) -> dict[str, Any]:
    """With seconds of the processor, seconds in all, and what the peak of memory grew by. SIGXCPU after `cpu_s`."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    if cpu_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + cpu_s, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")
    before, began, used = status("VmRSS"), time.monotonic(), time.process_time()
    result = action()
    return {
        **result, "seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - used,
        "bytes": status("VmHWM") - before,
    }  # fmt: skip


def size_of(folder: Path) -> int:
    return sum(each.lstat().st_size for each in folder.rglob("*"))


def listing(folder: Path) -> list[Any]:
    found = []
    for each in sorted(folder.rglob("*")):
        info = each.lstat()
        found.append((str(each), info.st_mode, info.st_size, info.st_mtime_ns))
    return found


def look(root: Path, outside: Path, json_too: bool, cpu_s: int | None = None) -> dict[str, Any]:
    """All that is done with one directory."""
    before = listing(outside)
    name = os.fspath(root)
    result = {
        "ls": measured(lambda: command("ls", name), cpu_s),
        "show": measured(lambda: command("show", name), cpu_s),
        "verify": measured(lambda: command("verify", name), cpu_s),
        **({"json": measured(lambda: command("verify", name, "--json"), cpu_s)} if json_too else {}),
        "restore": measured(lambda: restore(root), cpu_s),
    }
    return {"actions": result, "outside": listing(outside) != before}


def modules_of_a_look(folder: Path) -> list[str]:
    """What each case would import by itself otherwise."""
    before = set(sys.modules)
    copy(folder / "plain", folder / "look")
    look(folder / "look", folder / "plain", True)
    shutil.rmtree(folder / "look")
    return sorted(sys.modules.keys() - before)


def run(request: dict[str, Any], good: Path, digests: dict[str, str]) -> dict[str, Any]:
    attack = THEMES[request["theme"]][request["number"]]
    place = Path(request["place"])
    outside = place / "outside"
    outside.mkdir(parents=True)
    (outside / "file").write_text("of somebody else")
    template = "branched" if attack.name.startswith("branched") else "plain"
    root = place / os.fsdecode(request.get("folder", "dir").encode("latin-1"))
    copy(good / template, root)
    pid, answer = _fork(lambda: _case(attack, root, outside, request.get("mutation")))
    ended, said = _outlive(pid, answer, LIMIT_S * 5 + 5)
    size = size_of(root)
    shutil.rmtree(place)
    if not said:
        return {"died": ended, "size": size}
    return {**json.loads(said), "size": size, "good": digests, "template": template}


# Checks that are taken out, to see that crafted directories are found by them.
MUTATIONS: dict[str, Callable[[], None]] = {
    "weight": lambda: setattr(strict_json, "WEIGHT_CAP", 1 << 40) or setattr(strict_json.loads, "__kwdefaults__", {
        "cap": 1 << 40}),
    "hashes": lambda: setattr(strict_json, "COLLIDING", 1 << 40),
    "tensors": lambda: setattr(header, "_check_tensor", lambda name, item: None),
    "contradictions": lambda: setattr(records, "_contradiction", lambda manifest: None),
    "random numbers": lambda: setattr(rng, "problems", lambda state: {}),
    "shown": lambda: setattr(console, "shown", lambda text, limit=0: text),
}  # fmt: skip


def _case(attack: Any, root: Path, outside: Path, mutation: str | None) -> dict[str, Any]:
    attack.make(Target(root))
    if mutation is not None:
        MUTATIONS[mutation]()
    os.chdir(outside)
    size = size_of(root)
    limit = status("VmSize") + size + MORE_BYTES + THREADS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # With a mutation a command may well take minutes: it may end as soon as it is too slow.
    cpu_s = None if mutation is None else int(budget(size, crowded=True)) + 1
    return look(root, outside, attack.name.startswith(("terminal", "a name")), cpu_s)


def _fork(action: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """(pid, descriptor of its answer)"""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            text = json.dumps(action()).encode()
            with open(write, "wb") as file:
                file.write(text)
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    return pid, read


def _outlive(pid: int, answer: int, limit_s: float) -> tuple[str, bytes]:
    """(how it ended, its answer)"""
    deadline, said = time.monotonic() + limit_s, b""
    while True:
        if not select.select([answer], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(answer)
            return "hung", b""
        data = os.read(answer, 1 << 16)
        if not data:
            break
        said += data
    os.close(answer)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"ended with {code}", said if code == 0 else b""


def main() -> None:
    torch.set_num_threads(1)
    survey.LEAST_BASE_BYTES = 1
    app.app = typer.main.get_command(app.app)  # type: ignore[assignment]  # once, instead of at each call
    Job(0).digest()  # torch imports more when the first optimizer is made
    folder = Path(sys.argv[1])
    pid, answer = _fork(lambda: {"digests": make_good(folder), "modules": modules_of_a_look(folder)})
    ended, said = _outlive(pid, answer, 60)
    if not said:
        raise SystemExit(f"the good directories could not be made: {ended}")
    digests, modules = json.loads(said).values()
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a forked process would copy only to look at it
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), folder, digests)), flush=True)


if __name__ == "__main__":
    main()
