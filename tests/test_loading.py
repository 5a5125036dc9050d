# SPDX-License-Identifier: Apache-2.0
"""`load`: a checkpoint into models without an engine. Wrappers of several ranks are in test_matrix.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.shards import differing
from torch import nn

import layerwise_dist as lwd
from layerwise_dist.errors import BoundaryError, DamageError, MismatchError, NotFoundError, UnsupportedError
from layerwise_dist.reading import meta

torch.set_num_threads(1)


class Net(nn.Module):
    """Tied weights, a persistent buffer, and two that no checkpoint has."""

    def __init__(self, width: int = 5, rotary: bool = True) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(7, width), nn.Linear(width, width), nn.Linear(width, 7, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.head.weight = self.emb.weight
        if rotary:
            self.rotary = Rotary(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.emb(x)
        hidden = self.rotary(hidden) if hasattr(self, "rotary") else hidden
        return self.head(self.norm(self.mid(hidden)))


class Rotary(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(width) / 3, persistent=False)
        self.register_buffer("places", torch.arange(width), persistent=False)

    def reset_parameters(self) -> None:
        self.angles = torch.arange(self.angles.numel()) / 3
        self.places.copy_(torch.arange(self.places.numel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.angles + self.places


def net(seed: int, **how: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**how)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(torch.arange(7) * (step + 1) % 7).square().mean().backward()
    optimizer.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net, torch.optim.Optimizer]:
    """Of two steps; the model and optimizer that made them."""
    folder = tmp_path_factory.mktemp("loading")
    model = net(0)
    optimizer = adamw(model)
    with lwd.attach(model, optimizer, dir=str(folder)) as ckpt:
        for step in ckpt.steps(2):
            update(model, optimizer, step)
    return folder, model, optimizer


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    found = dict(model.state_dict())
    if optimizer is not None:
        for name, param in model.named_parameters():
            found |= {f"{kind}/{name}": value for kind, value in optimizer.state[param].items()}
    return {name: value.detach().clone() for name, value in found.items()}


def test_a_model_computes_what_the_trained_one_does(trained: tuple[Path, Net, Any]) -> None:
    folder, model, _ = trained
    other = net(1)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    report = lwd.load(other, folder)
    assert (report.step, report.missing, report.unexpected, report.mismatched) == (2, [], [], {})
    assert differing(held(other), held(model)) == [] and torch.equal(torch.get_rng_state(), before)
    assert other.head.weight is other.emb.weight


def test_with_its_optimizer_it_trains_on_as_if_nothing_had_happened(
    trained: tuple[Path, Net, Any], tmp_path: Path
) -> None:
    folder, model, optimizer = trained
    other = net(1)
    mine = adamw(other)
    mine.param_groups[0]["lr"] = 7.0
    lwd.load(other, folder, optimizer=mine)
    assert mine.param_groups[0]["lr"] == 0.1 and differing(held(other, mine), held(model, optimizer)) == []
    again = net(2)
    same = adamw(again)
    copied = shutil.copytree(folder, tmp_path / "copy")
    with lwd.attach(again, same, dir=str(copied)) as ckpt:
        ckpt.restore()
        for step in ckpt.steps(3):
            update(again, same, step)
    update(other, mine, 2)
    assert differing(held(other, mine), held(again, same)) == []


def test_nothing_is_loaded_of_another_model(trained: tuple[Path, Net, Any]) -> None:
    other = net(1, width=6)
    before = held(other)
    with pytest.raises(MismatchError, match=r"param/emb.weight: the checkpoint has F32\[7, 5\], the model F32\[7, 6\]"):
        lwd.load(other, trained[0])
    assert differing(held(other), before) == []
    with pytest.raises(MismatchError, match="missing from the checkpoint: param/more"):
        bigger = net(1)
        bigger.more = nn.Parameter(torch.zeros(2))
        lwd.load(bigger, trained[0])
    with pytest.raises(MismatchError, match="unexpected in the checkpoint: param/mid.bias, param/mid.weight"):
        smaller = net(1)
        smaller.mid = nn.Identity()
        lwd.load(smaller, trained[0])
    with pytest.raises(NotFoundError, match="step 9"):
        lwd.load(net(1), trained[0], step=9)


def test_not_strict_takes_what_fits_and_tells_the_rest(trained: tuple[Path, Net, Any]) -> None:
    folder, model, optimizer = trained
    other = net(1)
    other.mid, other.more = nn.Linear(5, 6), nn.Linear(2, 2)
    other.norm = nn.Identity()
    before = held(other)
    mine = adamw(other)
    report = lwd.load(other, folder, optimizer=mine, strict=False)
    assert report.missing == ["param/more.weight", "param/more.bias"]
    assert set(report.mismatched) == {"param/mid.weight", "param/mid.bias"}
    assert "the checkpoint has F32[5], the model F32[6]" in report.mismatched["param/mid.bias"]
    assert {name for name in report.unexpected if name.startswith(("param", "buffer"))} == {
        "param/norm.weight", "param/norm.bias", "buffer/norm.running_mean", "buffer/norm.running_var",
        "buffer/norm.num_batches_tracked",
    }  # fmt: skip
    now = held(other)
    assert all(torch.equal(now[name], before[name]) for name in now if name.startswith(("mid", "more")))
    assert torch.equal(other.emb.weight, model.emb.weight)
    assert torch.equal(mine.state[other.emb.weight]["exp_avg"], optimizer.state[model.emb.weight]["exp_avg"])
    assert not mine.state[other.mid.weight]


@pytest.mark.parametrize("how", ["prefixes", "function"])
def test_renamed(trained: tuple[Path, Net, Any], how: str) -> None:
    folder, model, optimizer = trained

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(1)

    rename: Any = {"": "body."} if how == "prefixes" else lambda name: f"body.{name}"
    other = Outer()
    mine = adamw(other)
    lwd.load(other, folder, optimizer=mine, rename=rename)
    assert differing(held(other.body), held(model)) == []
    assert torch.equal(mine.state[other.body.mid.weight]["exp_avg"], optimizer.state[model.mid.weight]["exp_avg"])
    lone = nn.Linear(5, 5)
    lwd.load(lone, folder, rename={"": None, "mid.": ""})
    assert torch.equal(lone.weight, model.mid.weight)
    with pytest.raises(MismatchError, match="both become param/weight"):
        lwd.load(lone, folder, rename=lambda name: name.rpartition(".")[2])


def test_one_of_several_models(tmp_path: Path) -> None:
    models = {"net": net(0), "ema": net(3)}
    optimizers = {"net": adamw(models["net"])}
    with lwd.attach(models=models, optimizers=optimizers, dir=str(tmp_path)) as ckpt:
        for step in ckpt.steps(1):
            update(models["net"], optimizers["net"], step)
    for name, model in models.items():
        other = net(9)
        lwd.load(other, tmp_path, name=name)
        assert differing(held(other), held(model)) == []
    with pytest.raises(MismatchError, match="several models: name one of ema, net"):
        lwd.load(net(9), tmp_path)


def test_other_dtypes_are_rounded_to_if_that_is_asked_for(trained: tuple[Path, Net, Any]) -> None:
    folder, model, _ = trained
    half = net(1).bfloat16()
    with pytest.raises(MismatchError, match=r'cast="target"'):
        lwd.load(half, folder)
    lwd.load(half, folder, cast="target")
    assert torch.equal(half.mid.weight, model.mid.weight.bfloat16())
    wide = net(1).double()
    lwd.load(wide, folder)
    assert torch.equal(wide.mid.weight, model.mid.weight.double())


# -- the meta device --------------------------------------------------------------------------------------------------


def on_meta(**how: Any) -> Net:
    with torch.device("meta"):
        return Net(**how)


def test_a_model_on_the_meta_device_gets_all_it_needs_and_computes_the_same(trained: tuple[Path, Net, Any]) -> None:
    folder, model, _ = trained
    other = on_meta()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lwd.load(other, folder)
    assert other.head.weight is other.emb.weight and torch.equal(torch.get_rng_state(), before)
    assert not any(map(meta.is_meta, (*other.parameters(), *other.buffers())))
    model.eval(), other.eval()
    try:
        assert torch.equal(other(torch.arange(7)), model(torch.arange(7)))
    finally:
        model.train()


def test_what_a_module_initializes_once_only_is_kept(trained: tuple[Path, Net, Any]) -> None:
    other = on_meta()
    reset, calls = other.rotary.reset_parameters, []

    def once() -> None:
        if not calls:
            reset()
        calls.append(1)

    other.rotary.reset_parameters = once
    lwd.load(other, trained[0])
    assert len(calls) == 2 and torch.equal(other.rotary.places, torch.arange(5))
    assert torch.equal(other.rotary.angles, torch.arange(5) / 3)


@pytest.mark.parametrize("why", ["a buffer", "a parameter", "half of a buffer"])
def test_what_nothing_fills_is_named_and_the_model_is_as_it_was(trained: tuple[Path, Net, Any], why: str) -> None:
    other = on_meta()
    if why == "a buffer":
        other.rotary.register_buffer("mask", torch.empty(3, dtype=torch.bool, device="meta"), persistent=False)
    elif why == "a parameter":
        other.more = nn.Parameter(torch.empty(3, device="meta"))
    else:
        other.rotary.reset_parameters = lambda: other.rotary.places[:2].zero_()
    name = {"a buffer": "rotary.mask", "a parameter": "more", "half of a buffer": "rotary.angles, rotary.places"}[why]
    with pytest.raises(UnsupportedError, match=f"fills it: {name};"):
        lwd.load(other, trained[0], strict=why != "a parameter")
    assert all(map(meta.is_meta, (*other.parameters(), *other.buffers()))) and other.head.weight is other.emb.weight


def test_mutation_buffers_that_are_not_looked_at_are_found(
    trained: tuple[Path, Net, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta.Materialized, "initialize", lambda self, filled: None)
    with pytest.raises(pytest.fail.Exception):
        test_what_nothing_fills_is_named_and_the_model_is_as_it_was(trained, "a buffer")


def test_an_optimizer_of_parameters_on_the_meta_device_is_refused(trained: tuple[Path, Net, Any]) -> None:
    other = on_meta()
    with pytest.raises(UnsupportedError, match="then build the optimizer"):
        lwd.load(other, trained[0], optimizer=adamw(other))


# -- restore(model_only=True) -----------------------------------------------------------------------------------------


def test_a_training_begins_from_the_weights_and_is_a_lineage_of_its_own(tmp_path: Path) -> None:
    model = net(0)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with lwd.attach(model, optimizer, dir=str(tmp_path), keep_last=9, state={"scheduler": scheduler}) as ckpt:
        for step in ckpt.steps(3):
            update(model, optimizer, step)
            scheduler.step()
    wanted = held(model)
    other = net(1)
    mine = adamw(other)
    fresh = torch.optim.lr_scheduler.StepLR(mine, 1)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    with lwd.attach(other, mine, dir=str(tmp_path), keep_last=9, state={"scheduler": fresh}) as ckpt:
        assert ckpt.restore(model_only=True) == 0 == ckpt.completed
        assert differing(held(other), wanted) == [] and torch.equal(torch.get_rng_state(), before)
        assert not mine.state and mine.param_groups[0]["lr"] == 0.1 and fresh.last_epoch == 0
        for step in ckpt.steps(2):
            update(other, mine, step)
        with pytest.raises(BoundaryError, match="starts a new training, but this one is at step 2"):
            ckpt.restore(model_only=True)
    with lwd.open_checkpoint(tmp_path) as ckpt:
        assert ckpt.step == 2
    with lwd.open_checkpoint(tmp_path, step=3) as ckpt:
        assert torch.equal(ckpt["param/mid.weight"][...], wanted["mid.weight"])


def test_without_a_checkpoint_there_is_nothing_to_begin_from(tmp_path: Path) -> None:
    model = net(0)
    with lwd.attach(model, adamw(model), dir=str(tmp_path)) as ckpt:
        with pytest.raises(NotFoundError):
            ckpt.restore(model_only=True)
        assert ckpt.restore(model_only=True, on_missing="fresh") == 0


def test_damage_is_named(trained: tuple[Path, Net, Any], tmp_path: Path) -> None:
    model = net(0)
    optimizer = adamw(model)
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        for step in ckpt.steps(1):
            update(model, optimizer, step)
    [shard] = tmp_path.glob("step_*/rank_00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8 + 40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamageError, match="block 0"):
        lwd.load(net(1), tmp_path)
