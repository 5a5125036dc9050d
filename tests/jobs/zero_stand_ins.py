# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed engine's LR scheduler and loss scale, and those that a script without an engine names in `state`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CyclicLR, StepLR
from zero_kit import expect

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.restore import stand_ins

CONFIG = {"commit": {"timeout_s": 30.0, "on_failure": "raise"}}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def cyclic(optimizer: torch.optim.Optimizer) -> Any:
    """One that keeps something for each group."""
    return CyclicLR(optimizer, base_lr=0.01, max_lr=0.03, step_size_up=4, cycle_momentum=False)


def stepwise(optimizer: torch.optim.Optimizer) -> Any:
    return StepLR(optimizer, step_size=2)


class Engine:
    """ZeRO-2 with two param groups."""

    def __init__(self, seed: int, make: Callable[[Any], Any] | None = cyclic, precision: str = "fp16") -> None:
        model = net(seed)
        params = list(model.parameters())
        groups = [{"params": params[::2], "lr": 0.02}, {"params": params[1::2], "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        scale = {"initial_scale_power": 12, "loss_scale_window": 4, "hysteresis": 1}
        config = {
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            precision: {"enabled": True, **(scale if precision == "fp16" else {})},
        }  # fmt: skip
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=make and make(optimizer), config=config
        )
        self.dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    def attach(self, folder: str, **state: Any) -> Any:
        return lwd.attach(self.engine, config={"dir": folder, **CONFIG}, state=state)

    def train(self) -> None:
        loss = self.engine(torch.ones(2, 5, dtype=self.dtype)).float().square().mean()
        self.engine.backward(loss)
        self.engine.step()

    def schedule(self) -> Any:
        """Without what is there for each group."""
        return common(self.engine.lr_scheduler)

    def rates(self) -> list[float]:
        return sorted({group["lr"] for group in self.engine.optimizer.param_groups})

    def scale(self) -> tuple[float, int]:
        """And how many of the updates are over after which it grows, as a GradScaler counts them."""
        scaler = self.engine.optimizer.loss_scaler
        since = scaler.cur_iter - scaler.last_overflow_iter - 1
        return float(scaler.cur_scale), max(0, since - 1) % 4


class Script:
    """DDP in fp32, and a group for each parameter."""

    def __init__(self, seed: int, make: Callable[[Any], Any] = cyclic) -> None:
        self.model = DistributedDataParallel(net(seed))
        params = list(self.model.parameters())
        rates = [0.02, 0.01, 0.02, 0.01]
        self.optimizer = torch.optim.AdamW([{"params": [p], "lr": r} for p, r in zip(params, rates, strict=True)])
        self.scheduler = make(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

    @property
    def state(self) -> dict[str, Any]:
        return {"rates": self.scheduler, "scaler": self.scaler}

    def attach(self, folder: str, **state: Any) -> Any:
        return lwd.attach(self.model, self.optimizer, config={"dir": folder, **CONFIG}, state=state)

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(torch.ones(2, 5)).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()

    def schedule(self) -> Any:
        return common(self.scheduler)

    def rates(self) -> list[float]:
        return sorted({group["lr"] for group in self.optimizer.param_groups})

    def scale(self) -> tuple[float, int]:
        return self.scaler.get_scale(), self.scaler.state_dict()["_growth_tracker"]


def common(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.state_dict().items() if isinstance(value, int | float)}


def saved(job: Any, folder: str, steps: int = 6, **state: Any) -> None:
    with job.attach(folder, **state) as ckpt:
        for _ in ckpt.steps(steps):
            job.train()


def same(what: str, found: Any, wanted: Any) -> list[str]:
    return [
        f"{what}: {name} {getattr(found, name)()}, not {getattr(wanted, name)()}"
        for name in ("schedule", "rates", "scale")
        if getattr(found, name)() != getattr(wanted, name)()
    ]


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def restored(job: Any, folder: str, **state: Any) -> str:
    """All that was warned of, on all ranks."""
    heard, logger = Heard(), logging.getLogger("layerwise_dist")
    logger.addHandler(heard)
    try:
        with job.attach(folder, **state) as ckpt:
            ckpt.restore()
    finally:
        logger.removeHandler(heard)
    told = [""] * dist.get_world_size()
    dist.all_gather_object(told, heard.text)
    return "".join(told)


def refused(job: Any, folder: str, message: str, **state: Any) -> list[str]:
    with job.attach(folder, **state) as ckpt:
        return expect(errors.MismatchError, message, ckpt.restore)


def stand_for_each_other(root: str) -> list[str]:
    engine, script = Engine(1), Script(1)
    saved(engine, f"{root}/engine")
    saved(script, f"{root}/script", 7, **script.state)
    found = []
    other = Script(2)
    said = restored(other, f"{root}/engine", **other.state)
    found += same("out of the engine", other, engine) + [f"warned of {said}"] * ("no place" in said)
    there = Engine(2)
    restored(there, f"{root}/script")
    found += same("into the engine", there, script)
    there.train()
    script.train()
    found += [f"one step later: {line}" for line in same("into the engine", there, script)]
    return found


def differ(root: str) -> list[str]:
    engine, script, plain = Engine(1), Script(1), Engine(1, None, "bf16")
    saved(engine, f"{root}/engine", 2)
    saved(script, f"{root}/script", 2, **script.state)
    saved(plain, f"{root}/bf16", 2)
    other, two = Script(2, stepwise), Script(2)
    found = refused(other, f"{root}/engine", r"state\['rates'\] is a StepLR, and .* engine had CyclicLR", **other.state)
    found += refused(
        two, f"{root}/engine", r"names \['one', 'rates'\]: nothing says which", **two.state, one=cyclic(two.optimizer)
    )
    found += refused(Engine(2, stepwise), f"{root}/script", r"engine has StepLR, .*state\['rates'\] is a CyclicLR")
    found += refused(Engine(2, None), f"{root}/script", r"holds \['rates'\], which attach\(state=...\) does not name")
    found += refused(Engine(2, stepwise), f"{root}/engine", "this engine has StepLR, the checkpoint's has CyclicLR")
    said = restored(Script(2), f"{root}/engine")
    if "DeepSpeed's LR scheduler (CyclicLR) and DeepSpeed's loss scale of the checkpoint has no place here" not in said:
        found.append(f"what has no place was not named: {said}")
    said = restored(Script(2), f"{root}/bf16")
    return found + [f"a scale that never changes was warned of: {said}"] * ("no place" in said)


def mutation(root: str) -> list[str]:
    """What does not go over is seen."""
    original = stand_ins.to_grad_scaler
    stand_ins.to_grad_scaler = lambda scale, live: {**live}
    try:
        return [] if stand_for_each_other(root) else ["not seen"]
    finally:
        stand_ins.to_grad_scaler = original


CHECKS: dict[str, Callable[[str], Any]] = {
    "stand-ins": stand_for_each_other, "stand-ins that differ": differ, "stand-ins mutation": mutation,
}  # fmt: skip
