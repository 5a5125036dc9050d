# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW of torch and of DeepSpeed go on from one another's state; what one of them cannot do is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.frameworks import adams
from layerwise_dist.restore import anywhere
from layerwise_dist.tensors.values import alike

pytestmark = pytest.mark.quick

State = dict[str, dict[str, Any]]


class DeepSpeedCPUAdam(torch.optim.Optimizer):
    """What DeepSpeed's keeps and where (0.19.8), without its kernel. Its updates are torch's."""

    def __init__(self, params: Any, adamw_mode: bool = True, **options: Any) -> None:
        kept = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}
        super().__init__(params, {**kept, **self.more, **options})
        self.adam_w_mode = self.as_mode(adamw_mode)

    more: dict[str, Any] = {"amsgrad": False}
    as_mode: Callable[[bool], Any] = bool

    def begin(self, group: dict[str, Any], state: dict[str, Any], param: torch.Tensor) -> None:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            with_gradient = [param for param in group["params"] if param.grad is not None]
            for param in with_gradient:
                if not self.state[param]:
                    self.begin(group, self.state[param], param)
            for param in with_gradient:
                self.state[param]["step"] += 1
            self.update(group, with_gradient, [self.state[param]["step"] for param in with_gradient])

    def update(self, group: dict[str, Any], params: list[Any], counts: list[int]) -> None:
        for param, count in zip(params, counts, strict=True):
            state, kind = self.state[param], torch.optim.AdamW if self.adam_w_mode else torch.optim.Adam
            stand_in = nn.Parameter(param.detach())
            stand_in.grad = param.grad
            once = kind(
                [stand_in], lr=group["lr"], betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], foreach=False,
            )  # fmt: skip
            once.state[stand_in] = {
                "step": torch.tensor(float(count - 1)), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"],
            }  # fmt: skip
            once.step()


class FusedAdam(DeepSpeedCPUAdam):
    """It counts in the state of the last parameter of a group, and takes that for all of them."""

    more = {}
    as_mode = int

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group.setdefault("step", 0)
            with_gradient = [param for param in group["params"] if param.grad is not None]
            for param in with_gradient:
                if not self.state[param]:
                    self.begin(group, self.state[param], param)
            self.state[with_gradient[-1]]["step"] += 1
            self.update(group, with_gradient, [self.state[with_gradient[-1]]["step"]] * len(with_gradient))


for stand_in in (DeepSpeedCPUAdam, FusedAdam):
    stand_in.__module__ = "deepspeed.ops.adam"

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.5, weight_decay=0.3),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.5, weight_decay=0.3),
    "decoupled Adam": lambda params: torch.optim.Adam(params, lr=0.5, weight_decay=0.3, decoupled_weight_decay=True),
    "FusedAdam": lambda params: FusedAdam(params, lr=0.5),
    "FusedAdam as Adam": lambda params: FusedAdam(params, lr=0.5, adamw_mode=False),
    "DeepSpeedCPUAdam": lambda params: DeepSpeedCPUAdam(params, lr=0.5),
    "DeepSpeedCPUAdam as Adam": lambda params: DeepSpeedCPUAdam(params, lr=0.5, adamw_mode=False),
}
DECOUPLED = ("AdamW", "decoupled Adam", "FusedAdam", "DeepSpeedCPUAdam")
FUSED = ("FusedAdam", "FusedAdam as Adam")


class Script:
    def __init__(self, kind: Any, seed: int, *, apart: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """`apart`: each parameter is in a group of its own."""
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
        params = list(self.model.parameters())
        make = OPTIMIZERS[kind] if isinstance(kind, str) else kind
        self.optimizer = make([{"params": [param]} for param in params] if apart else params)
        self.dtype = dtype

    def train(self, step: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(self.dtype)
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()

    def run(self, folder: Path, steps: int, **options: Any) -> int:
        with lwd.attach(self.model, self.optimizer, dir=str(folder), **options) as ckpt:
            begin = ckpt.restore()
            for step in ckpt.steps(steps):
                self.train(step)
        return begin

    def state(self) -> State:
        """By name, with `step` as a number."""
        found: State = {}
        for name, param in self.model.named_parameters():
            each = {
                key: float(value) if key == "step" else value.clone()
                for key, value in self.optimizer.state[param].items()
            }
            found[name] = {"param": param.detach().clone(), **each}
        return found


# Of one class, torch's Adam takes `decoupled_weight_decay` from the checkpoint, as any hyper-parameter.
PAIRS = [pair for pair in itertools.product(OPTIMIZERS, OPTIMIZERS) if {*pair} != {"Adam", "decoupled Adam"}]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_equal_optimizers_go_on_from_one_another_and_others_are_refused(
    tmp_path: Path, source: str, target: str
) -> None:
    one, whole = Script(source, 1), Script(source, 1)
    one.optimizer.param_groups[0]["lr"] = whole.optimizer.param_groups[0]["lr"] = 0.02
    one.optimizer.param_groups[0]["weight_decay"] = whole.optimizer.param_groups[0]["weight_decay"] = 0.1
    one.run(tmp_path, 3)
    other = Script(target, 2, apart=source in FUSED and target in FUSED)
    if (source in DECOUPLED) != (target in DECOUPLED):
        before = other.state()
        with pytest.raises(errors.MismatchError, match=f"the checkpoint's .*{source.split()[-3:][0]}|adam_w_mode"):
            other.run(tmp_path, 3)
        assert alike(other.state(), before)
        return
    assert other.run(tmp_path, 3) == 3
    for name, each in other.state().items():
        assert alike(each, {**one.state()[name], "step": 3.0}), name
    for param in other.model.parameters():
        step = other.optimizer.state[param]["step"]
        assert isinstance(step, torch.Tensor) == isinstance(other.optimizer, torch.optim.Adam)
    assert other.optimizer.param_groups[0]["lr"] == 0.02
    for step in range(5):
        whole.train(step)
    other.train(3)
    other.train(4)
    for name, each in other.state().items():
        assert alike({**each, "step": 5.0}, {**whole.state()[name], "step": 5.0}), name


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (
            lambda p: torch.optim.AdamW(p, amsgrad=True),
            "FusedAdam",
            "AdamW has amsgrad=True, which FusedAdam cannot do",
        ),
        (lambda p: torch.optim.AdamW(p, maximize=True), "DeepSpeedCPUAdam", "has maximize=True"),
        (lambda p: FusedAdam(p, bias_correction=False), "AdamW", "bias_correction=False, which AdamW cannot do"),
        ("FusedAdam as Adam", "FusedAdam", "the checkpoint's FusedAdam has adam_w_mode=False, this one has True"),
        ("FusedAdam as Adam", "AdamW", "is FusedAdam with adam_w_mode=False, this one is AdamW"),
    ],
)
def test_what_the_other_class_cannot_do_is_named(tmp_path: Path, source: Any, target: str, says: str) -> None:
    Script(source, 1).run(tmp_path, 2)
    with pytest.raises(errors.MismatchError, match=says):
        Script(target, 2).run(tmp_path, 2)


def test_a_number_that_is_a_tensor_or_a_default_here_is_what_the_other_class_takes_for_it(tmp_path: Path) -> None:
    Script(lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.25)), 1).run(tmp_path, 2)
    other = Script(lambda params: FusedAdam(params, bias_correction=False), 2)
    other.run(tmp_path, 2)
    assert other.optimizer.param_groups[0]["lr"] == 0.25 and other.optimizer.param_groups[0]["bias_correction"] is True


def test_state_of_bf16_parameters_has_the_dtype_that_the_target_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeepSpeedCPUAdam, "update", lambda self, group, params, counts: None)
    Script("DeepSpeedCPUAdam", 1, dtype=torch.bfloat16).run(tmp_path, 1)  # it keeps fp32 state of bf16 parameters
    other = Script("AdamW", 2, dtype=torch.bfloat16)
    with pytest.raises(errors.MismatchError, match=r'4 tensors of kind exp_avg are F32 .* restore\(cast="target"\)'):
        other.run(tmp_path, 1)
    with lwd.attach(other.model, other.optimizer, dir=str(tmp_path)) as ckpt:
        assert ckpt.restore(cast="target") == 1
    for param in other.model.parameters():
        state = other.optimizer.state[param]
        assert state["exp_avg"].dtype == torch.bfloat16 and state["step"].item() == 1.0
    other.train(0)  # torch's raises with state of another dtype


def test_a_class_of_somebody_elses_is_no_equal() -> None:
    described = {"class": "AdamW", "groups": [{"lr": 0.1, "correct_bias": True, "params": ["a"]}]}
    live = {"class": "FusedAdam", "groups": [{"lr": 0.1, "params": ["a"]}], "adam_w_mode": True}
    assert adams.unequal(described, live) == [
        "the checkpoint's optimizer is AdamW, this one is FusedAdam with adam_w_mode=True"
    ]
    mute = {key: value for key, value in live.items() if key != "adam_w_mode"}
    torchs = {"class": "AdamW", "groups": [{"amsgrad": False, "maximize": False, "params": ["a"]}]}
    assert adams.unequal(torchs, live) == [] and adams.unequal(torchs, mute) and adams.unequal(mute, torchs)
    of_apex = type("FusedAdam", (FusedAdam,), {"__module__": "apex.optimizers"})
    assert adams.describe(of_apex([nn.Parameter(torch.zeros(1))]), together=True) == {}


@pytest.mark.parametrize(("source", "target"), [("AdamW", "FusedAdam"), ("FusedAdam", "AdamW")])
def test_mutation_steps_that_are_not_translated_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    monkeypatch.setattr(anywhere, "translations", lambda saved, live: {})
    with pytest.raises((AssertionError, TypeError)):
        test_equal_optimizers_go_on_from_one_another_and_others_are_refused(tmp_path, source, target)


def test_mutation_a_group_s_count_that_is_taken_for_a_parameter_s_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adams, "steps_of_groups", lambda saved, scalars: {})
    with pytest.raises(AssertionError):
        test_equal_optimizers_go_on_from_one_another_and_others_are_refused(tmp_path, "FusedAdam", "AdamW")
