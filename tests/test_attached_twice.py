# SPDX-License-Identifier: Apache-2.0
"""What an engine has is no other engine's while it is open; an attach() that fails leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.commit import start
from layerwise_dist.engine import assembly, at_exit, holdings, hooks, restores, workings

torch.set_num_threads(1)


def job(seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(ckpt: Any, model: nn.Module, optimizer: Any, total: int) -> None:
    for _ in ckpt.steps(total):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


class Shelf(nn.Module):
    """Holds a parameter that another model has, too."""

    def __init__(self, param: nn.Parameter) -> None:
        super().__init__()
        self.held, self.own = param, nn.Linear(3, 2)


def same_optimizer(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    """Whose groups have been given the other model's parameters by now."""
    other = nn.Linear(3, 2)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    return {"model": other, "optimizer": optimizer}


def same_inside(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    other = nn.Linear(3, 2)
    outer = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    outer.inner = optimizer  # type: ignore[attr-defined]
    return {"model": other, "optimizer": outer}


def same_loader(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    other, its = job(1)
    return {"model": other, "optimizer": its, "state": {"mine": loader}}


def same_param(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    other = Shelf(model[1].weight)
    return {"model": other, "optimizer": torch.optim.SGD(other.own.parameters(), lr=0.1)}


def same_memory(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    other, its = job(1)
    other[0].bias.data = model[0].bias.data[:]
    return {"model": other, "optimizer": its}


def same_untrained_here(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    """No optimizer of the first engine's has it, which saves it all the same; the second would train it."""
    other = Shelf(model[0].weight)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p is not model[0].weight]
    optimizer.state.pop(model[0].weight, None)
    return {"model": other, "optimizer": torch.optim.SGD([model[0].weight], lr=0.1)}


TWICE: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "optimizer": (same_optimizer, r"this optimizer \(AdamW\)"),
    "optimizer within another": (same_inside, r"this optimizer \(AdamW\)"),
    "loader": (same_loader, r"the loader state\['mine'\], there as 'data',"),
    "parameter": (same_param, r"the memory of parameter held, there of 1\.weight, which is trained and"),
    "memory": (same_memory, r"the memory of parameter 0\.bias, there of 0\.bias, which is trained and"),
    "parameter that the first one only saves": (same_untrained_here, r"parameter held, there of 0\.weight, .*"),
}


@pytest.mark.parametrize("what", TWICE)
def test_what_an_open_engine_has_is_refused_to_a_second_by_name(tmp_path: Path, what: str) -> None:
    make, says = TWICE[what]
    model, optimizer = job()
    loader = DataLoader(list(torch.randn(8, 3)), batch_size=2)
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path / "one"), state={"data": loader})
    held = optimizer.param_groups[0]["params"]
    second = make(model, optimizer, loader)
    with pytest.raises(errors.UnsupportedError, match=rf"{says} is already attached, with checkpoints in .*one: close"):
        lwd.attach(dir=str(tmp_path / "two"), **second)
    assert not (tmp_path / "two").exists()
    wanted = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = held if "first one only" not in what else wanted
    train(ckpt, model, optimizer, 2)
    assert ckpt.stats()["captures"] == 2
    ckpt.close()
    optimizer.param_groups[0]["params"] = wanted
    optimizer.state.clear()
    with lwd.attach(dir=str(tmp_path / "two"), **second):
        pass


def test_what_no_optimizer_trains_may_be_in_two_models(tmp_path: Path) -> None:
    base = nn.Parameter(torch.randn(5), requires_grad=False)
    one, two = Shelf(base), Shelf(base)
    first, second = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (one, two))
    with lwd.attach(one, first, dir=str(tmp_path / "1")), lwd.attach(two, second, dir=str(tmp_path / "2")):
        pass


def test_mutation_engines_that_compare_models_only_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings.Holdings, "common", holdings.Holdings._common_model)
    for number, what in enumerate(TWICE):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_what_an_open_engine_has_is_refused_to_a_second_by_name(tmp_path / str(number), what)
        for each in at_exit.open_engines():
            each.end(orderly=False)


# -- what an attach() that fails leaves -------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> int:
    modules = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def traces(model: nn.Module, optimizer: Any, loader: Any) -> dict[str, Any]:
    """Everything that an engine registers anywhere."""
    gc.collect()
    return {
        "hooks": hooks_of(model),
        "optimizer's": len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
        "attributes": sorted(vars(optimizer)),
        "loader": type(loader),
        "loaders": DataLoader.__iter__,
        "open": len(at_exit.open_engines()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": len(os.listdir("/proc/self/task")),
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if exists(fd)),
        "signal": signal.getsignal(signal.SIGTERM),
    }


def exists(fd: str) -> bool:
    """And is no epoll, eventfd or listing that comes and goes with torch's own."""
    return os.path.lexists(f"/proc/self/fd/{fd}") and "/proc/" not in os.readlink(f"/proc/self/fd/{fd}")


def differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Fewer tasks and threads are none of an engine's: the kernel's own for io_uring come and go, and a thread of the
    engine before this one may still be on its last word.
    """
    more = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    if "threads" in more and not Counter(after["threads"]) - Counter(before["threads"]):
        del more["threads"]
    return {name: pair for name, pair in more.items() if name != "tasks" or pair[1] > pair[0]}


class Boom(errors.LayerwiseError):
    pass


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Boom("on purpose")


STAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "what sealing would write": lambda patch: patch.setattr(assembly.Sealer, "try_out", boom),
    "another rank's part": lambda patch: patch.setattr(assembly, "Replicas", boom),
    "the directory": lambda patch: patch.setattr(start, "open_session", boom),
    "the coordinator": lambda patch: patch.setattr(start, "start_coordinator", boom),
    "the writer": lambda patch: patch.setattr(assembly, "open_writer", boom),
    "a look at the file system": lambda patch: patch.setattr(assembly, "memory_by_magic", boom),
    "preemption": lambda patch: patch.setattr(assembly, "Preemption", boom),
    "the engine": lambda patch: patch.setattr(workings, "Restorer", boom),
    "its last hook": lambda patch: patch.setattr(hooks.Hooks, "register", _half_hooked),
    "the branch record": lambda patch: patch.setattr(restores.Restores, "follow", boom),
}


def _half_hooked(self: hooks.Hooks) -> None:
    _REGISTER(self)
    raise Boom("on purpose")


_REGISTER = hooks.Hooks.register


@pytest.mark.parametrize(
    ("stage", "update"), [*((stage, "whole") for stage in STAGES), ("its last hook", "pipelined_step")]
)
def test_an_attach_that_fails_leaves_nothing_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, update: str
) -> None:
    model, optimizer = job()
    loader = DataLoader(list(torch.randn(8, 3)), batch_size=2)
    options = {"dir": str(tmp_path), "update": update, "state": {"data": loader}, "preemption": {"enabled": True}}
    with lwd.attach(model, optimizer, **options) as ckpt:  # what torch and the interpreter make once is there now
        train(ckpt, model, optimizer, 1)
    before = traces(model, optimizer, loader)
    with monkeypatch.context() as patch:
        STAGES[stage](patch)
        with pytest.raises(errors.LayerwiseError, match="on purpose"):
            lwd.attach(model, optimizer, fresh=True, **options)
    deadline = time.monotonic() + 5
    while left := differing(before, traces(model, optimizer, loader)):  # threads end after their last word
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    with lwd.attach(model, optimizer, fresh=True, **options) as ckpt:
        train(ckpt, model, optimizer, 1)
        ckpt.wait(1)


def test_mutation_a_failed_attach_that_keeps_its_hooks_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks.Hooks, "remove", lambda self: None)
    with pytest.raises(AssertionError):
        test_an_attach_that_fails_leaves_nothing_registered(tmp_path, monkeypatch, "its last hook", "whole")
