# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own Adams and torch's: each goes on from the other's state. REQUIRES: their operators are built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from job_kit import differences
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zero_stand_ins import CONFIG, net, saved

import layerwise_dist as lwd
from layerwise_dist.commit import places

KINDS: dict[str, Callable[[Any], Any]] = {"fused": FusedAdam, "cpu": DeepSpeedCPUAdam}


def groups(model: nn.Module, turned: bool) -> list[dict[str, Any]]:
    params = list(model.parameters())
    found = [{"params": params[::2], "lr": 0.02, "weight_decay": 0.1}, {"params": params[1::2], "lr": 0.01}]
    return found[::-1] if turned else found


class Engine:
    def __init__(self, seed: int, kind: str, stage: int) -> None:
        self.net = net(seed)
        config = {
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        self.stage, self.engine = stage, None
        self.engine, *_ = deepspeed.initialize(
            model=self.net, optimizer=KINDS[kind](groups(self.net, turned=True)), config=config
        )

    def attach(self, folder: str, **state: Any) -> Any:
        return lwd.attach(self.engine, config={"dir": folder, **CONFIG})

    def train(self) -> None:
        self.engine.backward(self.engine(torch.ones(2, 5)).square().mean())
        self.engine.step()

    def contents(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        base = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for name, param in self.net.named_parameters():
            whole = self.stage == 0
            found[name] = (param if whole else safe_get_full_fp32_param(param)).detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state = base.state[param][key] if whole else safe_get_full_optimizer_state(param, key)
                found[f"{key}/{name}"] = state.clone()
        return found

    def steps(self) -> list[Any]:
        base = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        return [state["step"] for state in base.state.values() if "step" in state]


class Script:
    def __init__(self, seed: int) -> None:
        self.model = DistributedDataParallel(net(seed))
        self.optimizer = torch.optim.AdamW(groups(self.model, turned=False))

    def attach(self, folder: str, **state: Any) -> Any:
        return lwd.attach(self.model, self.optimizer, config={"dir": folder, **CONFIG})

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 5)).square().mean().backward()
        self.optimizer.step()

    def contents(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, param in self.model.module.named_parameters():
            found[name] = param.detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = self.optimizer.state[param][key].clone()
        return found

    def steps(self) -> list[Any]:
        return [state["step"] for state in self.optimizer.state.values()]


def folder(root: str, stage: int, moved: int) -> str:
    """With stage 2 on a disk of a node; ranks are `moved` nodes further. What tells nodes apart is patched."""
    if stage != 2:
        return f"{root}/{stage}"
    node = (dist.get_rank() + moved) % dist.get_world_size()
    places.place = lambda: f"node {node}"
    return f"{root}/{stage}-{node}"


def go_on(kind: str, root: str) -> list[str]:
    problems = []
    for stage in (0, 2, 3):
        there, other = Engine(1, kind, stage), Script(2)
        saved(there, folder(root, stage, 0), 3)
        with other.attach(folder(root, stage, 1)) as ckpt:
            ckpt.restore()
            problems += [f"stage {stage}: {name}" for name in differences(other.contents(), there.contents())]
            if [isinstance(step, torch.Tensor) and step.item() for step in other.steps()] != [3.0] * 4:
                problems.append(f"stage {stage}: steps {other.steps()}, of {there.steps()}")
            for _ in ckpt.steps(5):
                other.train()
        back = Engine(3, kind, stage)
        with back.attach(folder(root, stage, 0)) as ckpt:
            ckpt.restore()
            problems += [f"stage {stage}, back: {name}" for name in differences(back.contents(), other.contents())]
            if not all(type(step) is int and step == 5 for step in back.steps()):
                problems.append(f"stage {stage}, back: steps {back.steps()}")
            back.train()
    return problems


CHECKS: dict[str, Callable[[str], Any]] = {f"equal {kind}": partial(go_on, kind) for kind in KINDS}
