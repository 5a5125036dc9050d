# SPDX-License-Identifier: Apache-2.0
"""Param groups that are split or merged between a checkpoint and its restore, and LR schedulers fitted to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.frameworks.deepspeed.groups import split_groups

pytestmark = pytest.mark.quick


def job(split: bool, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    decayed = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1, "lr": 0.02}
    others = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    groups = [decayed, others]
    return model, torch.optim.AdamW(lwd.param_groups(model, groups) if split else groups, lr=0.01)


def train(ckpt: Any, model: nn.Module, optimizer: torch.optim.Optimizer, until: int) -> None:
    for step in ckpt.steps(until):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(step))).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("split_first", [False, True], ids=["split", "merged"])
def test_groups_that_were_split_or_merged_go_on_bit_for_bit(tmp_path: Path, split_first: bool) -> None:
    model, optimizer = job(split_first)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "whole")) as ckpt:
        train(ckpt, model, optimizer, 6)
    first, its = job(split_first)
    with lwd.attach(first, its, dir=str(tmp_path / "ckpt")) as ckpt:
        train(ckpt, first, its, 3)
    second, its = job(not split_first, seed=1)
    its.param_groups[0]["lr"] = 7.0
    with lwd.attach(second, its, dir=str(tmp_path / "ckpt")) as ckpt:
        assert ckpt.restore() == 3
        train(ckpt, second, its, 6)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), second.parameters(), strict=True))


def test_a_group_always_has_a_trainable_parameter_if_its_base_has_one() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    for layer in (0, 2):
        model[layer].requires_grad_(False)
    weights, biases = [[each.weight for each in model], [each.bias for each in model]]
    groups = lwd.param_groups(model, [{"params": weights, "lr": 1.0}, {"params": biases}])
    assert [group["name"] for group in groups] == ["1", "3", "1", "3"]
    assert all(any(param.requires_grad for param in group["params"]) for group in groups)
    assert sum((group["params"] for group in groups), []) == [weights[i] for i in (1, 0, 2, 3)] + [
        biases[i] for i in (1, 0, 2, 3)
    ]
    frozen = lwd.param_groups(model, [{"params": weights[0]}])
    assert [group["name"] for group in frozen] == ["0"]


def test_groups_with_other_hyper_parameters_cannot_be_merged(tmp_path: Path) -> None:
    model, optimizer = job(True)
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        train(ckpt, model, optimizer, 1)
    model, _ = job(True)
    with lwd.attach(model, torch.optim.AdamW(model.parameters()), dir=str(tmp_path)) as ckpt:
        says = "has 0.weight and 0.bias, whose groups in the checkpoint differ in lr, weight_decay"
        with pytest.raises(errors.MismatchError, match=says):
            ckpt.restore()


def cyclic(optimizer: torch.optim.Optimizer) -> Any:
    rates = {"base_lr": [0.01, 0.02], "max_lr": [0.1, 0.3], "step_size_up": 3, "cycle_momentum": False}
    return lr_scheduler.CyclicLR(optimizer, **rates)


def lambdas(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.9**step])


def several(optimizer: torch.optim.Optimizer) -> Any:
    schedulers = [lr_scheduler.ConstantLR(optimizer, total_iters=2), lambdas(optimizer)]
    return lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[3])


@pytest.mark.parametrize("make", [cyclic, lambdas, several])
def test_a_scheduler_is_fitted_to_groups_that_are_split_in_place(make: Any) -> None:
    model, optimizer = job(False)
    expected, scheduler = [], make(optimizer)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
        expected.append([group["lr"] for group in optimizer.param_groups])
    model, optimizer = job(False)
    scheduler = make(optimizer)
    split_groups(model, optimizer, scheduler)
    assert [group["name"] for group in optimizer.param_groups] == ["0", "2", "0", "2"]
    for rates in expected:
        optimizer.step()
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [rates[0], rates[0], rates[1], rates[1]]


def test_a_torch_scheduler_follows_its_groups_into_another_order(tmp_path: Path) -> None:
    def make(first: float, *, biases_first: bool) -> tuple[Any, Any, Any]:
        model, _ = job(False)
        kinds = [
            [p for p in model.parameters() if (p.dim() == 1) == biases] for biases in (biases_first, not biases_first)
        ]
        rates = (0.2, 0.1) if biases_first else (0.1, 0.2)
        groups = [{"params": params, "lr": first * rate} for params, rate in zip(kinds, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups)
        return model, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, optimizer, schedule = make(1.0, biases_first=False)
    with lwd.attach(model, optimizer, dir=str(tmp_path), state={"schedule": schedule}) as ckpt:
        train(ckpt, model, optimizer, 2)
        schedule.step()
        ckpt.save("scheduled")
    model, optimizer, schedule = make(7.0, biases_first=True)
    with lwd.attach(model, optimizer, dir=str(tmp_path), state={"schedule": schedule}) as ckpt:
        ckpt.restore()
        assert schedule.base_lrs == [0.2, 0.1] and schedule.get_last_lr() == [0.1, 0.05]
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
