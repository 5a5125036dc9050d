# SPDX-License-Identifier: Apache-2.0
"""Scripts for DeepSpeed that save and load by the engine's own calls; run by zero.py. Each gives what was wrong."""

from __future__ import annotations

import copy
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from job_kit import differences
from zero_kit import STEPS, STOP, Job, Net, expect, settings

import layerwise_dist as lwd
import layerwise_dist.deepspeed as drop_in
from layerwise_dist import errors
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.frameworks.deepspeed import counters


class UserScript:
    """It was changed by one import, and by the block in its ds_config."""

    def __init__(
        self, root: str, seed: int, case: str = "2-bf16-accumulate2", net: Any = None, trained: bool = True,
        **block: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.net = Net() if net is None else net
        stage, *features = case.split("-")
        config = settings(int(stage), set(features))
        config["layerwise_checkpoint"] = {"dir": root, "every_n_steps": None, "commit": {"timeout_s": 30.0}, **block}
        optimizer = None
        if trained:
            optimizer = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=0.01)
        else:
            del config["scheduler"]
        self.engine, *_ = drop_in.initialize(model=self.net, optimizer=optimizer, config=config)
        self.window = self.engine.gradient_accumulation_steps()
        torch.manual_seed(1000 * seed + dist.get_rank())

    def micro_batch(self) -> str:
        tokens, targets = torch.randint(0, 19, (2, 6)), torch.randint(0, 19, (12,))
        loss = torch.nn.functional.cross_entropy(self.engine(tokens).flatten(0, 1).float(), targets)
        self.engine.backward(loss)
        self.engine.step()
        return loss.item().hex()

    def train(self, windows: int) -> list[str]:
        return [self.micro_batch() for _ in range(self.window * windows)]

    def held(self) -> dict[str, Any]:
        return Job.contents(SimpleNamespace(engine=self.engine))  # type: ignore[arg-type]

    def close(self) -> None:
        self.engine.layerwise.close()


def calls(root: str) -> list[str]:
    script = UserScript(f"{root}/whole", 1)
    losses = script.train(STEPS)
    script.close()

    script = UserScript(f"{root}/ckpt", 1)
    found = [] if script.engine.load_checkpoint(f"{root}/ckpt") == (None, None) else ["a checkpoint in an empty folder"]
    script.train(STOP)
    asked = {"at": STOP, "rank": dist.get_rank(), "args": Namespace(lr=0.1, more=SimpleNamespace(names=("a", "b")))}
    saved = script.engine.save_checkpoint(f"{root}/ckpt", client_state=asked)
    if saved is not True or script.engine.layerwise.committed_step != STOP:
        found.append(f"save_checkpoint returned {saved} before its commit")
    script.micro_batch()
    script.engine.save_checkpoint(f"{root}/within")  # a window that DeepSpeed begins anew too
    for nowhere in (None, ""):
        found += expect(
            ValueError, "name of a directory", lambda nowhere=nowhere: script.engine.save_checkpoint(nowhere)
        )
    script.micro_batch()
    script.engine.save_checkpoint(f"{root}/ckpt", tag=8, client_state={"at": STOP + 1})
    script.engine.save_checkpoint(f"{root}/tags", tag=f"of{dist.get_rank()}")  # ds_config has nothing against it
    found += [] if script.engine.load_checkpoint(f"{root}/tags", "of0")[0] else ["rank 0's tag does not count"]
    script.close()

    for tag, at in ((None, STOP + 1), (f"global_step{STOP}", STOP)):
        script = UserScript(f"{root}/ckpt", 2)
        path, state = script.engine.load_checkpoint(f"{root}/ckpt", tag)
        expected = {"at": at} if tag is None else asked
        if state != expected or path is None or script.engine.global_steps != at:
            found.append(f"load_checkpoint({tag}): {path}, {state}, global step {script.engine.global_steps}")
        if script.train(STEPS - at) != losses[2 * at :]:
            found.append(f"load_checkpoint({tag}): other losses")
        script.close()
    script = UserScript(f"{root}/anew", 2)
    script.engine.load_checkpoint(f"{root}/within")
    if (script.engine.global_steps, script.engine.micro_steps) != (STOP, 2 * STOP):
        found.append(f"saved within a window: {script.engine.global_steps}, {script.engine.micro_steps}")
    script.train(1)
    script.close()
    script = UserScript(f"{root}/backward", 2, "3-bf16-inbackward-accumulate2", update="in_backward")
    script.micro_batch()
    found += expect(
        errors.BoundaryError,
        "within an accumulation window",
        lambda: script.engine.save_checkpoint(f"{root}/backward"),
    )
    script.close()
    script = UserScript(f"{root}/ckpt", 2)
    found += expect(errors.BoundaryError, r"call engine.load_checkpoint\('.*/ckpt'\)", lambda: script.train(1))
    found += expect(
        errors.UnsupportedError,
        "custom_load_fn",
        lambda: script.engine.load_checkpoint(f"{root}/ckpt", custom_load_fn=print),
    )
    script.close()
    return found


# -- a part of a checkpoint ------------------------------------------------------------------------------------------

_MODEL = ("live/", "master/")


def only(names: list[str], *starts: str) -> list[str]:
    return [name for name in names if name.startswith(starts)]


def without(names: list[str], *starts: str) -> list[str]:
    return [name for name in names if not name.startswith(starts)]


def parts(case: str, root: str) -> list[str]:
    """What each of load_checkpoint()'s switches leaves as it was, and what all of them load."""
    script = UserScript(f"{root}/ckpt", 1, case)
    script.train(STOP)
    script.engine.save_checkpoint(f"{root}/ckpt", client_state={"at": STOP})
    saved = script.held()
    script.close()
    found = []

    def load(**switches: bool) -> tuple[list[str], list[str]]:
        """(what is unlike the checkpoint now, what is unlike the engine before), and it trains on."""
        script = UserScript(f"{root}/ckpt", 2, case, net=Net())
        workings_of(script.engine.layerwise).restores.ready = True  # it trains, as after a load of another checkpoint
        script.train(1)
        before = copy.deepcopy(script.held())
        path, state = script.engine.load_checkpoint(f"{root}/ckpt", **switches)
        if path is None or state != {"at": STOP}:
            found.append(f"{switches}: {path}, {state}")
        now = script.held()
        result = differences(now, saved), differences(now, before)
        script.train(1)
        script.close()
        return result

    unlike, changed = load(load_optimizer_states=False)
    found += [
        f"no optimizer states: {name}" for name in only(unlike, *_MODEL, "counters", "scheduler", "rng", "forwards")
    ]
    found += [f"no optimizer states: {name} was loaded" for name in only(changed, "exp_avg", "step/", "group/")]
    unlike, changed = load(load_lr_scheduler_states=False)
    found += [f"no scheduler: {name}" for name in without(unlike, "scheduler")]
    found += [f"no scheduler: {name} was loaded" for name in only(changed, "scheduler")]
    unlike, changed = load(load_module_only=True)
    found += [f"module only: {name}" for name in only(unlike, *_MODEL, "forwards")]
    found += [f"module only: {name} was loaded" for name in without(changed, *_MODEL, "forwards")]
    return found + not_strict(case, root)


def not_strict(case: str, root: str) -> list[str]:
    """A model with one layer more and one less takes what both have."""
    net = Net()
    del net.frozen
    net.frozen = torch.nn.Identity()
    net.more = torch.nn.Linear(7, 3)
    script = UserScript(f"{root}/other", 3, case, net=net)
    before = script.held()
    found = expect(
        errors.MismatchError,
        "missing from the checkpoint: master/more",
        lambda: script.engine.load_checkpoint(f"{root}/ckpt", load_optimizer_states=False),
    )
    found += [f"{name} was loaded" for name in without(differences(script.held(), before), "rng")]
    script.engine.load_checkpoint(f"{root}/ckpt", load_module_strict=False, load_optimizer_states=False)
    now = script.held()
    saved = UserScript(f"{root}/third", 2, case)
    saved.engine.load_checkpoint(f"{root}/ckpt")
    expected = saved.held()
    shared = {name for name in now.keys() & expected.keys() if name.startswith(_MODEL)}
    found += differences({name: now[name] for name in shared}, {name: expected[name] for name in shared})
    more = [name for name in now if "/more." in name and name.startswith("master/")]
    found += differences({name: now[name] for name in more}, {name: before[name] for name in more})
    saved.close()
    script.train(1)
    script.close()
    return [f"not strict: {each}" for each in found] + ([] if len(more) == 2 and shared else ["nothing compared"])


def parts_mutation(root: str) -> list[str]:
    """Counters that take everything, whatever was asked for."""
    original = counters.Counters.put
    from layerwise_dist.frameworks.deepspeed import framework

    part_of = framework.DeepSpeedFramework.part_of
    framework.DeepSpeedFramework.part_of = lambda self, carried, parts: carried  # type: ignore[method-assign]
    try:
        return [] if parts("2-bf16", root) else ["not seen"]
    finally:
        framework.DeepSpeedFramework.part_of = part_of  # type: ignore[method-assign]
        assert counters.Counters.put is original


# -- directories and engines -----------------------------------------------------------------------------------------


def two_directories(root: str, **block: Any) -> list[str]:
    """What is saved elsewhere is a whole checkpoint, changes nothing here, and any engine goes on from it."""
    script = UserScript(f"{root}/dir", 1, every_n_steps=1, keep_last=1, keep_tags=2, **block)
    losses, found = [], []
    for step in range(STEPS):
        losses += script.train(1)
        if step + 1 in (2, STOP):
            script.engine.save_checkpoint(f"{root}/dir_best", tag="best", client_state={"at": step + 1})
    script.close()
    if script.engine.layerwise.stats()["checkpoints_committed"] < STEPS - 1:
        found.append(f"{script.engine.layerwise.stats()['checkpoints_committed']} committed")
    whole = UserScript(f"{root}/whole", 1)
    found += [] if whole.train(STEPS) == losses else ["saving elsewhere changed the training"]
    whole.close()

    script = UserScript(f"{root}/dir", 2, **block)  # goes on beside what is in its own directory
    _, state = script.engine.load_checkpoint(f"{root}/dir_best")
    found += [] if state == {"at": STOP} and script.engine.global_steps == STOP else [f"{state}"]
    found += [] if script.train(STEPS - STOP) == losses[2 * STOP :] else ["other losses after dir_best"]
    script.engine.save_checkpoint(f"{root}/dir_best", tag="last")
    script.engine.save_checkpoint(f"{root}/dir")
    script.close()
    script = UserScript(f"{root}/dir", 3, **block)
    for folder, tag, at in (("dir_best", "best", STOP), ("dir_best", None, STEPS), ("dir", None, STEPS)):
        path, _ = script.engine.load_checkpoint(f"{root}/{folder}", tag)
        if path is None or not path.startswith(f"{root}/{folder}/step_{at:010d}"):
            found.append(f"load_checkpoint({folder}, {tag}): {path}")
    script.close()
    os.makedirs(f"{root}/empty", exist_ok=True)
    script = UserScript(f"{root}/fresh", 3)
    found += [] if script.engine.load_checkpoint(f"{root}/empty") == (None, None) else ["something in an empty folder"]
    script.close()
    return found


@contextmanager
def warnings_of() -> Iterator[list[str]]:
    """What the library's logger says meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("layerwise_dist").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("layerwise_dist").removeHandler(handler)


def block_alone(root: str) -> list[str]:
    """A block that nobody reads is told of at the first forward, once; one that is read or off is not."""
    found = []
    on = {"dir": root, "every_n_steps": None}
    for block, attach, told in ((on, False, 1), (on, True, 0), ({**on, "enabled": False}, False, 0), (None, False, 0)):
        net = Net()
        config = settings(2, {"bf16"})
        if block is not None:
            config["layerwise_checkpoint"] = block
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
        with warnings_of() as warned:
            engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
            ckpt = lwd.attach(engine) if attach else None
            for _ in range(2):
                engine(torch.randint(0, 19, (2, 6)))
            if ckpt is not None:
                ckpt.close()
        said = [each for each in warned if "checkpointed by nobody" in each]
        found += [] if len(said) == told else [f"{block}, attached {attach}: {said}"]
    return found


def second_engine(root: str) -> list[str]:
    """Two engines of one ds_config: each has all of its own, and the second takes what the first has saved."""
    first = UserScript(f"{root}/ckpt", 1, every_n_steps=1)
    first.train(STOP)
    first.engine.save_checkpoint(f"{root}/ckpt")
    expected = first.held()
    with warnings_of() as warned:
        second = UserScript(f"{root}/ckpt", 2, every_n_steps=1)
    found = (
        [] if any(f"this one saves in {root}/ckpt/engine2" in each for each in warned) else [f"no warning: {warned}"]
    )
    path, _ = second.engine.load_checkpoint(f"{root}/ckpt")
    found += [] if path is not None and path.startswith(f"{root}/ckpt/step_") else [f"loaded {path}"]
    found += differences(second.held(), expected)
    first.train(1)
    found += [] if second.train(1) and second.engine.save_checkpoint(f"{root}/ckpt") else ["not saved"]
    expected = second.held()
    first.close()
    second.close()
    first, second = UserScript(f"{root}/ckpt", 3), UserScript(f"{root}/ckpt", 4)
    first.engine.layerwise.restore()
    path, _ = second.engine.load_checkpoint(f"{root}/ckpt")
    found += [] if path is not None and path.startswith(f"{root}/ckpt/engine2/") else [f"loaded {path}"]
    found += differences(second.held(), expected)
    first.close()
    second.close()
    return found


def untrained(root: str) -> list[str]:
    """Engines without an optimizer save and load what they hold: of the modes that DeepSpeed has them in."""
    found = []
    for case in ("0-fp32", "0-fp16", "0-bf16", "3-fp32", "3-fp16", "3-bf16", "3-bf16-gather"):
        script = UserScript(f"{root}/{case}", 1, case, trained=False)
        expected = {name: param.clone() for name, param in whole(script)}
        script.engine.save_checkpoint(f"{root}/{case}", client_state={"case": case})
        script.engine.save_checkpoint(f"{root}/{case}-else")
        script.close()
        for folder in (case, f"{case}-else"):
            script = UserScript(f"{root}/{case}", 2, case, trained=False)
            before = {name: param.clone() for name, param in whole(script)}
            if not differences(before, expected):
                found.append(f"{case}: alike before the load")
            path, _ = script.engine.load_checkpoint(f"{root}/{folder}")
            found += [f"{folder}: {each}" for each in differences(dict(whole(script)), expected)]
            found += [] if path is not None else [f"{folder}: nothing was loaded"]
            script.close()
    return found


def whole(script: UserScript) -> list[tuple[str, torch.Tensor]]:
    with drop_in.zero.GatheredParameters(list(script.net.parameters())):
        return [(name, param.detach().clone()) for name, param in script.net.named_parameters()]


def from_deepspeeds_own(root: str) -> list[str]:
    """A job that comes from DeepSpeed's own checkpoints loads its last one, and saves its own from then on."""
    job = Job("2-bf16", seed=1)
    job.train(None, STOP)
    job.engine.save_checkpoint(f"{root}/theirs", client_state={"at": STOP})
    expected = job.contents()
    job = Job("2-bf16", seed=2)
    ckpt = job.attach(f"{root}/ours")
    drop_in.serve_checkpoint_calls(job.engine, ckpt)
    _, state = job.engine.load_checkpoint(f"{root}/theirs")
    found = [] if state["at"] == STOP else [f"client_state {state}"]
    names = [name for name in differences(job.contents(), expected) if name not in ("rng", "forwards", "counters")]
    job.engine.save_checkpoint(f"{root}/ours", "first")
    ckpt.close()
    job = Job("2-bf16", seed=3)
    ckpt = job.attach(f"{root}/ours")
    ckpt.restore(tag="first")
    ckpt.close()
    found += names + [name for name in differences(job.contents(), expected) if name.startswith("master/")]
    job = Job("2-bf16", seed=4)  # beside what is in its own directory by now
    with job.attach(f"{root}/ours") as ckpt:
        drop_in.serve_checkpoint_calls(job.engine, ckpt)
        job.engine.load_checkpoint(f"{root}/theirs")
        job.train(None, 1)
    return found


CHECKS: dict[str, Callable[[str], Any]] = {
    "calls": calls, "from DeepSpeed's own": from_deepspeeds_own, "two directories": two_directories,
    "two directories, monitored": partial(two_directories, mode="monitor"),
    "second engine": second_engine, "untrained": untrained, "block alone": block_alone,
    "parts mutation": parts_mutation,
    **{f"parts {case}": partial(parts, case) for case in ("0-fp32", "0-bf16", "1-bf16-fp32grads", "2-bf16", "3-bf16")},
}  # fmt: skip
