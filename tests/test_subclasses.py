# SPDX-License-Identifier: Apache-2.0
"""Optimizer state of tensor subclasses that stand for others: saved by what is inside, and put together again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.crash import in_ranks, settings
from kit.models import Keeping
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.frameworks import subclasses, torch_optimizer
from layerwise_dist.frameworks.ddp import DDPFramework

pytestmark = pytest.mark.quick

torch.set_num_threads(1)


class Named(torch.Tensor):
    """Stands for one tensor; all else that it needs is in its context."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, note: Any) -> Named:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float64, device=inner.device)

    def __init__(self, inner: torch.Tensor, note: Any) -> None:
        self.inner, self.note = inner, note

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], self.note

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], note: Any, size: Any, stride: Any) -> Named:
        made = Named(inner["inner"], note)
        assert made.shape == size and made.stride() == stride
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].note)
        raise NotImplementedError(func)


class Standing(Keeping):
    """Keeps state that stands for other tensors, changes it in place, and uses it."""

    def keep(self, number: int, param: torch.Tensor, state: dict[Any, Any]) -> None:
        if "two" not in state:
            state["two"] = TwoTensor(torch.zeros_like(param), torch.ones_like(param))
            state["after"] = 0
            if number == 0:
                note = {"of": ("a", 1, torch.float16), "shape": param.shape, "scale": 0.5}
                inside = TwoTensor(TwoTensor(param.clone(), param * 2), torch.zeros(param.shape))
                state["named"] = Named(inside, note)
        state["after"] += 1
        state["two"].a.add_(param)
        state["two"].b.mul_(1.5)
        param.sub_(state["two"].a, alpha=0.01)
        if number == 0:
            state["named"].inner.a.b.add_(state["two"].b)
            param.add_(state["named"].inner.a.b, alpha=1e-4 * state["named"].note["scale"])


def torchao(kind: str) -> Callable[[Any], Any]:
    def make(params: Any) -> Any:
        optim = pytest.importorskip("torchao.optim", exc_type=ImportError)  # 0.18 is not for torch 2.9
        return getattr(optim, kind)(params, lr=0.01, weight_decay=0.1)

    return make


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "standing": Standing,
    "AdamW8bit": torchao("AdamW8bit"),
    "AdamW4bit": torchao("AdamW4bit"),
    "AdamWFp8": torchao("AdamWFp8"),
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its update, which takes a minute of two processors."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def build(seed: int, make: Callable[[Any], Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Linear(64, 2))
    return model, make(model.parameters())


def train(ckpt: Any, model: nn.Module, optimizer: Any, total: int) -> None:
    for step in ckpt.steps(total) if ckpt is not None else range(total):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 64, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Every tensor inside, bit by bit, and which classes and contexts are around them."""
    found: dict[str, Any] = {name: param.detach().clone() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            place = f"{key} of {name}"
            if subclasses.stands_for_others(value):
                found[place] = subclasses.describe(value)
                found |= {path: inner.clone() for path, inner in subclasses.inside(place, value)}
            else:
                found[place] = value.clone() if isinstance(value, torch.Tensor) else value
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    bad = [name for name in one if name not in other or not subclasses.same(one[name], other[name])]
    return bad + [name for name in other if name not in one] + ([] if [*one] == [*other] else ["order"])


def run(folder: Path, kind: str, seed: int, total: int) -> tuple[int, dict[str, Any]]:
    model, optimizer = build(seed, OPTIMIZERS[kind])
    with lwd.attach(model, optimizer, dir=str(folder), commit={"on_failure": "raise"}) as ckpt:
        restored = ckpt.restore()
        train(ckpt, model, optimizer, total)
    return restored, contents(model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, kind: str) -> None:
    model, optimizer = build(0, OPTIMIZERS[kind])
    train(None, model, optimizer, 7)
    plain = contents(model, optimizer)
    assert any("::" in name for name in plain), "there is such state"
    _, whole = run(tmp_path / "whole", kind, 0, 7)
    assert differing(plain, whole) == [], "training is the same with the engine on"
    run(tmp_path / "parts", kind, 0, 4)
    restored, resumed = run(tmp_path / "parts", kind, 1, 7)
    assert restored == 4
    assert differing(plain, resumed) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["standing", "AdamW8bit"])
def test_a_restore_fills_the_tensors_inside_what_is_there(tmp_path: Path, kind: str) -> None:
    _, saved = run(tmp_path, kind, 0, 3)
    model, optimizer = build(1, OPTIMIZERS[kind])
    train(None, model, optimizer, 1)
    of = optimizer.state[model[0].weight]
    before = {name: value for name, value in of.items() if subclasses.stands_for_others(value)}
    places = [inner.data_ptr() for name, value in before.items() for _, inner in subclasses.inside(name, value)]
    assert places
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        assert ckpt.restore() == 3
        now = optimizer.state[model[0].weight]
        assert all(now[name] is value for name, value in before.items())
        assert places == [inner.data_ptr() for name in before for _, inner in subclasses.inside(name, now[name])]
        assert differing(saved, contents(model, optimizer)) == []


def test_mutation_a_restore_beside_what_is_there_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_optimizer, "live_inner", lambda get, name: None if "::" in name else get(name))
    with pytest.raises(AssertionError):
        test_a_restore_fills_the_tensors_inside_what_is_there(tmp_path, "AdamW8bit")


def test_mutation_a_context_that_is_not_saved_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = subclasses.describe
    monkeypatch.setattr(subclasses, "describe", lambda tensor: {**describe(tensor), "context": None})
    with pytest.raises((AssertionError, errors.CommitError)):
        test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, "AdamW8bit")


@pytest.mark.parametrize("kind", ["standing", "AdamW4bit"])
def test_ranks_that_hold_it_alike_each_write_a_part(tmp_path: Path, kind: str) -> None:
    def body(transport: LocalTransport, built: list[Any], total: int) -> tuple[int, dict[str, Any]]:
        model, optimizer = built[transport.rank]
        ddp = DDPFramework(model, transport.rank, 2)
        with assembly.assemble(model, optimizer, settings(str(tmp_path)), transport, PosixEnv(), framework=ddp) as ckpt:
            restored = ckpt.restore()
            train(ckpt, model, optimizer, total)
        return restored, contents(model, optimizer)

    make = OPTIMIZERS[kind]
    first = [build(0, make), build(0, make)]
    (_, held), _ = in_ranks(lambda transport: body(transport, first, 3))
    again = [build(1, make), build(2, make)]
    for restored, found in in_ranks(lambda transport: body(transport, again, 3)):
        assert restored == 3
        assert differing(held, found) == []
    names = [set(load_file(path)) for path in sorted(tmp_path.glob("step_*3-*/rank_*.safetensors"))]
    inside = {name for each in names for name in each if "::" in name}
    assert inside and len(names) == 2 and any(name not in names[1] for name in inside), "what is no part is there once"


class Bare(torch.Tensor):
    """Has no memory, and does not tell what it stands for."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Bare:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(func)


class Keeps(Keeping):
    make: Any = None

    def keep(self, number: int, param: torch.Tensor, state: dict[Any, Any]) -> None:
        for name, value in self.make(param).items():
            state.setdefault(name, value)


REFUSED: dict[str, tuple[Callable[[torch.Tensor], dict[str, Any]], str]] = {
    "bare": (lambda param: {"odd": Bare(torch.zeros_like(param))}, "odd of .* is a Bare, which has no memory"),
    "a context that cannot be written": (
        lambda param: {"odd": Named(torch.zeros_like(param), print)},
        r"state odd of .* is a test_subclasses:Named, and its __tensor_flatten__ returns what cannot be written",
    ),
    "bare inside": (
        lambda param: {"odd": Named(Bare(torch.zeros_like(param)), None)},
        "odd::inner of .* is a Bare, which has no memory",
    ),
    "inside on meta": (
        lambda param: {"odd": Named(torch.zeros(3, device="meta"), None)},
        "odd::inner of .* is on the meta device",
    ),
    "a name like those of parts": (
        lambda param: {"odd": Named(torch.zeros_like(param), None), "odd::inner": torch.zeros(2)},
        "state under 'odd::inner' beside",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, says = REFUSED[kind]
    model, optimizer = build(0, Keeps)
    optimizer.make = make
    ckpt = lwd.attach(model, optimizer, dir=str(tmp_path))
    with pytest.raises(errors.UnsupportedError, match=says):
        train(ckpt, model, optimizer, 2)
    with suppress(errors.LayerwiseError):
        ckpt.close()
    assert not [*tmp_path.glob("step_*/manifest.json")]


class Lora(nn.Module):
    """A frozen layer whose weight stands for others, and what is trained beside it."""

    def __init__(self, seed: int, make: Callable[[torch.Tensor], torch.Tensor], width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(width, width, bias=False)
        self.frozen.weight = nn.Parameter(make(torch.randn(width, width)), requires_grad=False)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.frozen.weight
        if isinstance(weight, Named):
            weight = weight.inner.a - weight.inner.b
            return nn.functional.linear(x, weight) + self.up(self.down(x))
        return self.frozen(x) + self.up(self.down(x))


def named(weight: torch.Tensor) -> torch.Tensor:
    return Named(TwoTensor(weight, weight.roll(1)), {"device": weight.device, "block": 4})


def nf4(weight: torch.Tensor) -> torch.Tensor:
    workflow = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", exc_type=ImportError)
    return workflow.to_nf4(weight, 64, 64)


# Small ones are in every checkpoint, large ones in a base.
PARAMETERS = {"small": (named, 64), "large": (named, 512), "NF4": (nf4, 512)}


@pytest.mark.parametrize("kind", ["small", "large", pytest.param("NF4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", ["all", "trained"])
def test_frozen_parameters_are_saved_by_what_they_stand_for(tmp_path: Path, kind: str, given: str) -> None:
    make, width = PARAMETERS[kind]

    def run(folder: Path, seed: int, total: int) -> tuple[int, dict[str, torch.Tensor]]:
        model = Lora(seed, make, width)
        params = model.parameters() if given == "all" else [*model.down.parameters(), *model.up.parameters()]
        optimizer = torch.optim.AdamW(params, lr=0.01)
        inside = dict(subclasses.inside("frozen.weight", model.frozen.weight))
        places = [tensor.data_ptr() for tensor in inside.values()]
        with lwd.attach(model, optimizer, dir=str(folder), commit={"on_failure": "raise"}) as ckpt:
            restored = ckpt.restore()
            for step in ckpt.steps(total):
                x = torch.randn(8, width, generator=torch.Generator().manual_seed(step))
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert places == [t.data_ptr() for _, t in subclasses.inside("frozen.weight", model.frozen.weight)]
        found = {name: tensor.clone() for name, tensor in inside.items()}
        return restored, found | {
            name: p.detach().clone() for name, p in model.named_parameters() if "frozen" not in name
        }

    _, whole = run(tmp_path / "whole", 0, 5)
    run(tmp_path / "parts", 0, 3)
    restored, resumed = run(tmp_path / "parts", 1, 5)
    assert restored == 3
    assert len(whole) > 3 and differing(whole, resumed) == []
    names = {name for path in tmp_path.glob("parts/**/rank_*.safetensors") for name in load_file(path)}
    assert {f"param/{name}" for name in whole} <= names and "param/frozen.weight" not in names


def test_a_parameter_of_another_kind_is_a_mismatch_and_loads_nothing(tmp_path: Path) -> None:
    def attach(model: nn.Module) -> Any:
        return lwd.attach(model, torch.optim.SGD(model.down.parameters(), lr=0.1), dir=str(tmp_path))

    model = Lora(0, named)
    with attach(model) as ckpt:
        ckpt.save("first")
    for make, says in (
        (
            lambda weight: Named(TwoTensor(weight, weight), {"device": weight.device, "block": 8}),
            "frozen.weight is a Named",
        ),
        (lambda weight: Named(weight, None), "frozen.weight::inner"),
        (lambda weight: weight, "missing from the checkpoint: param/frozen.weight"),
    ):
        other = Lora(1, make)
        before = other.down.weight.detach().clone()
        with attach(other) as ckpt:
            with pytest.raises(errors.MismatchError, match=says):
                ckpt.restore()
        assert torch.equal(other.down.weight, before)


def test_such_parameters_and_buffers_are_refused_by_name(tmp_path: Path) -> None:
    def attach(model: nn.Module) -> Any:
        return lwd.attach(model, torch.optim.SGD(model.down.parameters(), lr=0.1), dir=str(tmp_path))

    for make, says in ((Bare, "Bare, which has no memory"), (lambda codes: Named(codes, None), "Named, which has no")):
        model = Lora(0, named)
        model.down.register_buffer("odd", make(torch.zeros(4)))
        with pytest.raises(errors.UnsupportedError, match=rf"buffer down\.odd is a {says}"):
            attach(model)
    with pytest.raises(errors.UnsupportedError, match=r"parameter frozen\.weight is a Bare, which has no memory"):
        attach(Lora(0, Bare))
    model = Lora(0, named)
    model.frozen.weight = nn.Parameter(TwoTensor(torch.zeros(64, 64), torch.zeros(64, 64)))
    with pytest.raises(errors.UnsupportedError, match=r"parameter frozen\.weight is a TwoTensor.*this one is trained"):
        attach(model)
    with pytest.raises(
        errors.UnsupportedError,
        match=r"parameter frozen\.weight is a test_subclasses:Named, and its __tensor_flatten__.*cont",
    ):
        attach(Lora(0, lambda weight: Named(weight, print)))


def test_a_class_that_is_not_there_is_a_mismatch_and_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "standing", 0, 2)
    model, optimizer = build(1, Standing)
    before = contents(model, optimizer)
    monkeypatch.delattr(sys.modules[__name__], "Named")
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        with pytest.raises(errors.MismatchError, match="test_subclasses:Named, which is not there: import it"):
            ckpt.restore()
    assert differing(before, contents(model, optimizer)) == []
