# SPDX-License-Identifier: Apache-2.0
"""State that an optimizer keeps elsewhere than under `state[parameter]` comes back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.chain import on_a_slow_disk
from kit.odd_optimizers import SAVED, Container, Inner, InState, Sam, Told, differs, everything, job, of, train
from kit.runners import Warm
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.frameworks import elsewhere, nested

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", SAVED)
def test_state_elsewhere_comes_back_to_the_bit(tmp_path: Path, kind: str) -> None:
    assert not differs(tmp_path, SAVED[kind])


def test_state_elsewhere_comes_back_in_the_same_process(tmp_path: Path) -> None:
    """A roll-back: what was not there then is gone, and what stays is filled in place."""
    for kind in ("a string key", "a tensor under a string key", "told", "inside", "inside the inside"):
        model, optimizer = job(SAVED[kind])
        with lwd.attach(model, optimizer, dir=str(tmp_path / kind.replace(" ", "_")), keep_last=9) as ckpt:
            train(ckpt, model, optimizer, 2)
            expected = everything(model, optimizer)
            train(ckpt, model, optimizer, 4)
            ckpt.wait(4)
            assert everything(model, optimizer) != expected, kind
            assert ckpt.restore(step=2) == 2
            assert everything(model, optimizer) == expected, kind


class WideTold(Told):
    """Moments wider than their parameters, which torch's load_state_dict() casts; a told value that is made of them."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": [state["moment"].sum() for state in self.state.values()]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                moment = state.setdefault("moment", torch.zeros_like(param, dtype=torch.float32))
                moment.mul_(0.9).add_(param.grad.float() / 3)
                state["count"] = state.get("count", 0) + 1
                param.sub_((moment * group["lr"] / self.count()).to(param.dtype))


def test_float32_moments_of_bfloat16_parameters_stay_exact_beside_what_is_told(tmp_path: Path) -> None:
    assert not differs(tmp_path, of(WideTold), torch.bfloat16)
    model, optimizer = job(of(WideTold), 1, torch.bfloat16)
    with lwd.attach(model, optimizer, dir=str(tmp_path / "cut")) as ckpt:
        ckpt.restore()
    moments = [state["moment"] for state in optimizer.state.values()]
    assert all(moment.dtype == torch.float32 and (moment != moment.bfloat16()).any() for moment in moments)


def test_several_optimizers_keep_their_own(tmp_path: Path) -> None:
    def run(total: int, seed: int, root: str) -> list[Any]:
        model, _ = job(of(InState), seed)
        parts = {"one": Told(model[0].parameters()), "two": Inner(model[2].parameters())}  # type: ignore[index]
        with lwd.attach(model, optimizers=parts, dir=str(tmp_path / root)) as ckpt:
            ckpt.restore()
            for step in ckpt.steps(total):
                model(torch.full((2, 3), step / 7)).square().mean().backward()
                for part in parts.values():
                    part.step()
                    part.zero_grad()
        return [everything(model, part) for part in parts.values()]

    whole = run(6, 0, "whole")
    run(3, 0, "cut")
    assert run(6, 1, "cut") == whole


def test_each_rank_and_wrapper_keeps_its_own(warm: Warm, tmp_path: Path) -> None:
    """DDP, FSDP2, FSDP1 with flat parameters and ZeroRedundancyOptimizer; what ranks count differs."""
    warm.run("optimizer_state.py", 2, tmp_path, timeout=90)
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == dict.fromkeys(("ddp", "fsdp2", "fsdp1-flat", "zero", "refused"), []), f"rank {rank}"


def _none(self: Any, *args: Any) -> dict[str, Any]:
    return {}


def _nothing(self: Any, saved: Any, lacking: Any = ()) -> bool:
    return False


MUTATIONS: list[tuple[str, Any, str, Any]] = [
    ("a string key", elsewhere.Elsewhere, "_keyed", _none),
    ("a tensor under a string key", elsewhere.Elsewhere, "put", _nothing),
    ("told", elsewhere.Elsewhere, "put", _nothing),
    ("an object that is told", elsewhere.Elsewhere, "_told", _none),
    ("told by hooks", elsewhere.Elsewhere, "put", _nothing),
    ("inside", nested.Nest, "adopt_groups", _nothing),
    ("inside, one state", nested.Nest, "owners", lambda self: {"": self.outer, "other": self.inside["inner"]}),
    ("a list", elsewhere.Elsewhere, "put", _nothing),
    ("SAM", nested, "find", lambda outer: {}),
]


@pytest.mark.parametrize(("kind", "place", "name", "broken"), MUTATIONS, ids=[f"{m[0]}: {m[2]}" for m in MUTATIONS])
def test_mutation_state_that_is_left_out_of_a_checkpoint_or_of_a_restore_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: Any, name: str, broken: Any
) -> None:
    monkeypatch.setattr(place, name, broken)
    try:
        found = differs(tmp_path, SAVED[kind])
    except (errors.LayerwiseError, KeyError):
        found = True
    assert found


def test_a_step_that_calls_its_parent_s_is_one_update(tmp_path: Path) -> None:
    """torch wraps the step() of every class that an instance was made of, and calls the instance's hooks in each."""

    class Twice(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> None:
            super().step()
            if self.fails:
                raise ValueError
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(0.9)

    torch.optim.SGD([torch.zeros(1)])
    assert not differs(tmp_path, of(Twice, lr=0.1, momentum=0.9))
    model, optimizer = job(of(Twice, lr=0.1))
    with lwd.attach(model, optimizer, dir=str(tmp_path / "fails"), commit={"on_failure": "raise"}) as ckpt:
        for step in ckpt.steps(4):
            optimizer.fails = step == 1  # type: ignore[attr-defined]
            model(torch.ones(2, 3)).sum().backward()
            try:
                optimizer.step()
            except ValueError:
                optimizer.fails = False  # type: ignore[attr-defined]
                optimizer.step()
        ckpt.wait(4)


def _lost_on_a_slow_disk(root: Path) -> int:
    """How many checkpoints are, with an optimizer that changes parameters before it calls its closure."""
    model = nn.Linear(128, 256)
    optimizer = Sam(model.parameters())
    with on_a_slow_disk(model, optimizer, root) as ckpt:
        for _ in ckpt.steps(6):  # the first one is written before its boundary is over, since all is audited

            def backward() -> None:
                model(torch.ones(2, 128)).square().mean().backward()

            backward()
            optimizer.step(backward)
            optimizer.zero_grad()
    return int(ckpt.stats()["checkpoints_aborted"])


def test_what_an_optimizer_changes_before_its_closure_is_fenced(tmp_path: Path) -> None:
    assert _lost_on_a_slow_disk(tmp_path) == 0


def test_mutation_a_fence_only_after_the_closure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested.Nest, "foreign", False)
    assert _lost_on_a_slow_disk(tmp_path) > 0


def test_torch_s_own_optimizers_are_not_asked_for_their_state_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It maps every parameter, at every checkpoint."""
    model, optimizer = job(of(torch.optim.AdamW))
    calls = []
    monkeypatch.setattr(elsewhere.Elsewhere, "_attributes", lambda self: calls.append(self) or {})
    monkeypatch.setattr(elsewhere.Elsewhere, "_captured", lambda self: calls.append(self) or (set(), []))
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        train(ckpt, model, optimizer, 2)
    assert not calls


def test_frozen_parameters_beside_optimizers_within_optimizers_are_surveyed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    optimizer = Container(list(model[1].parameters()))
    surveys: list[None] = []
    real = Surveyor._survey
    monkeypatch.setattr(Surveyor, "_survey", lambda *args: (surveys.append(None), real(*args))[1])
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        for _ in ckpt.steps(6):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(surveys) <= 3  # at attach(), and when there is state
