# SPDX-License-Identifier: Apache-2.0
"""LR schedulers go with the param groups: torch's, DeepSpeed's, and those that somebody has written."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, SequentialLR, StepLR

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.frameworks.deepspeed import groups
from layerwise_dist.frameworks.deepspeed.groups import spread

pytestmark = pytest.mark.quick

RATES = {"0.weight": 0.5, "0.bias": 0.25, "2.weight": 0.5, "2.bias": 0.25}


class Floored(LRScheduler):
    """Keeps something for each group, and a list that has nothing to do with groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.floors = [group["lr"] / 8 for group in optimizer.param_groups]
        self.holds = [1, 2, 3]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        pairs = zip(self.base_lrs, self.floors, strict=True)
        return [max(floor, base / (1 + self.last_epoch) - 0 * self.holds[0]) for base, floor in pairs]


def warm_up(step: int, *, steps: int) -> float:
    """As transformers' get_*_schedule functions make them: a LambdaLR of a partial."""
    return min(1.0, (1 + step) / steps)


def sequence(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return SequentialLR(optimizer, [StepLR(optimizer, 1), Floored(optimizer)], milestones=[2])


SCHEDULES: dict[str, Any] = {
    "floored": Floored,
    "warm-up": lambda optimizer: LambdaLR(optimizer, functools.partial(warm_up, steps=8)),
    "in a sequence": sequence,
}


class Script:
    """Four parameters, in groups by rate, or in one each (`apart`), in another order (`turned`)."""

    def __init__(self, make: Any, *, apart: bool = False, turned: bool = False) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        named = list(self.model.named_parameters())
        by_rate = [[pair for pair in named if RATES[pair[0]] == rate] for rate in (0.5, 0.25)]
        made = [[pair] for pair in named] if apart else by_rate
        grouped = [{"params": [param for _, param in each], "lr": RATES[each[0][0]]} for each in made]
        self.optimizer = torch.optim.SGD(grouped[::-1] if turned else grouped)
        self.schedule = make(self.optimizer)

    def run(self, folder: Path, until: int) -> None:
        with lwd.attach(self.model, self.optimizer, dir=str(folder), state={"rates": self.schedule}) as ckpt:
            ckpt.restore()
            for _ in ckpt.steps(until):
                self.optimizer.zero_grad()
                self.model(torch.ones(2, 3)).square().mean().backward()
                self.optimizer.step()
                self.schedule.step()

    def rates(self) -> dict[str, float]:
        names = {param: name for name, param in self.model.named_parameters()}
        return {names[param]: group["lr"] for group in self.optimizer.param_groups for param in group["params"]}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_of_somebody_s_own_goes_with_its_groups(tmp_path: Path, name: str) -> None:
    Script(SCHEDULES[name]).run(tmp_path, 3)
    whole, split = Script(SCHEDULES[name]), Script(SCHEDULES[name], apart=True)
    whole.run(tmp_path / "whole", 6)
    split.run(tmp_path, 6)
    assert split.rates() == whole.rates()
    if name == "floored":
        assert split.schedule.floors == [0.0625, 0.03125, 0.0625, 0.03125] and split.schedule.holds == [1, 2, 3]


def test_a_list_that_may_be_of_groups_or_not_is_named_where_only_their_order_is_another(tmp_path: Path) -> None:
    Script(Floored).run(tmp_path, 3)
    other = Script(Floored, turned=True)
    with pytest.raises(
        errors.MismatchError, match=r"state\['rates'\]: .* 2 values as 'floors', and there are 2 param gr"
    ):
        other.run(tmp_path, 4)
    assert other.rates() == RATES


def test_mutation_only_what_is_known_by_name_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_follows_groups", lambda name, values, now, live: False)
    with pytest.raises((AssertionError, ValueError)):
        test_a_scheduler_of_somebody_s_own_goes_with_its_groups(tmp_path, "floored")


def test_lists_of_another_length_stay_as_they_are() -> None:
    schedule = {"base_lrs": [1.0, 2.0], "floors": (3, 4), "milestones": [5, 6], "name": "two"}
    live = {"floors": (0, 0, 0), "milestones": [5, 6]}
    assert spread(schedule, [1, 0, 1], 2, live) == {
        "base_lrs": [2.0, 1.0, 2.0], "floors": (4, 3, 4), "milestones": [5, 6], "name": "two",
    }  # fmt: skip
    assert spread(schedule, [1, 0, 1], 2)["floors"] == (3, 4), "nothing says that it is of groups"
