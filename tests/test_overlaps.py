# SPDX-License-Identifier: Apache-2.0
"""Memory, not identity, decides what is one tensor: what shares it is saved consistently, or refused by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.chain import attach
from torch import Tensor, nn

from layerwise_dist import LayerwiseOptimizer, errors
from layerwise_dist.capture.audit import Audit
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.overlaps import LayersApart, overlaps
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer

pytestmark = pytest.mark.quick

MODES = ("pipelined_step", "in_backward")


def test_tensors_overlap_exactly_where_they_have_bytes_in_common() -> None:
    flat = torch.zeros(64)
    matrix = flat[:32].view(4, 8)
    assert overlaps([flat[:8], flat[8:16], flat[16:]]) == []
    assert overlaps([flat[:8], flat[8:16], flat[4:12]]) == [(0, 2), (2, 1)]
    assert overlaps([matrix[:, :4], matrix[:, 4:]]) == [], "columns lie between each other's rows"
    assert overlaps([matrix[:, :5], matrix[:, 4:]]) == [(0, 1)]
    assert overlaps([matrix.t(), matrix[1]]) == [(0, 1)]
    assert overlaps([flat[:1].expand(9), flat[:2], flat[1:2]]) == [(0, 1), (1, 2)]
    assert overlaps([flat.view(torch.int64)[::2], flat[2::4], flat[1::4]]) == [(0, 2)], "of other dtypes"
    assert overlaps([torch.empty(0), torch.empty(0), flat[3:3], flat]) == []
    freed = torch.zeros(8)
    view = freed[2:]
    freed.untyped_storage().resize_(0)
    assert overlaps([freed, view]) == []
    wide = torch.empty(20_000, 2_000)
    assert overlaps([wide[:, :900], wide[:, 1000:]]) == [(0, 1)], "what is not told apart counts as one memory"


# -- layered updates ---------------------------------------------------------------------------------------------------


ROWS, WIDTH = 256, 128
WHOLE = ROWS * WIDTH


class Pair(nn.Module):
    """(batch,) int64 below ROWS to (batch, ROWS). Its two weights are the layers `tokens` and `head`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tokens(tokens))


def tie(model: Pair) -> None:
    model.head.weight.data = model.tokens.weight.data


def cut(model: Pair, first: slice, second: slice) -> None:
    flat = torch.linspace(-1, 1, 2 * WHOLE)
    model.tokens.weight.data = flat[first].view(ROWS, WIDTH)
    model.head.weight.data = flat[second].view(ROWS, WIDTH)


SHARING: dict[str, Callable[[Pair], None]] = {
    "all of it": tie,
    "a part of it": lambda model: cut(model, slice(WHOLE), slice(WHOLE // 2, WHOLE // 2 + WHOLE)),
}


def flat(model: Pair) -> None:
    """Views of one storage, and nothing in common."""
    cut(model, slice(WHOLE), slice(WHOLE, 2 * WHOLE))


def interleaved(model: Pair) -> None:
    columns = torch.linspace(-1, 1, 2 * WHOLE).view(ROWS, 2 * WIDTH)
    model.tokens.weight.data, model.head.weight.data = columns[:, :WIDTH], columns[:, WIDTH:]


def trained(model: Pair, optimizer: Any, steps: range | Any, between: Callable[[int], None] = lambda step: None) -> Any:
    held = {}
    for step in steps:
        between(step)
        model(torch.arange(step, step + 8) % ROWS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        held[step + 1] = contents(model, optimizer)
    return held


def contents(model: nn.Module, optimizer: Any) -> list[Tensor]:
    state = [value for param in model.parameters() for value in optimizer.state.get(param, {}).values()]
    return [tensor.detach().clone() for tensor in (*model.state_dict().values(), *state)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING)
def test_layers_that_share_memory_are_refused_by_name_for_updates_by_layers(
    tmp_path: Path, share: Callable[[Pair], None]
) -> None:
    model = Pair()
    share(model)
    for mode in MODES:
        with pytest.raises(errors.UnsupportedError, match=r"tokens.weight and head.weight share memory.*'whole'"):
            LayerwiseOptimizer(adam(model), model, mode=mode)
        with pytest.raises(errors.UnsupportedError, match=r"tokens.weight and head.weight share memory"):
            attach(model, adam(model), tmp_path / mode, update=mode)
        assert not (tmp_path / mode).exists(), "before anything is made"


@pytest.mark.parametrize("apart", [flat, interleaved])
@pytest.mark.parametrize("mode", MODES)
def test_views_of_one_storage_that_have_nothing_in_common_are_layers_as_any_other(
    tmp_path: Path, mode: str, apart: Callable[[Pair], None]
) -> None:
    plain, model = Pair(), Pair()
    apart(plain), apart(model)
    at = trained(plain, adam(plain), range(6))
    optimizer = adam(model)
    with attach(model, optimizer, tmp_path, update=mode) as ckpt:
        assert equal(trained(model, optimizer, ckpt.steps(6))[6], at[6])
        leased = {piece.slice.name for piece in workings_of(ckpt).captures.sealed[-1].survey.pieces}
        assert ("param/head.weight" in leased) == (apart is flat)
    restored(tmp_path, apart, at)


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_come_to_share_memory_later_are_refused_before_they_are_updated(tmp_path: Path, mode: str) -> None:
    model = Pair()
    optimizer = adam(model)
    ckpt = attach(model, optimizer, tmp_path, update=mode)
    steps = ckpt.steps(9)
    at = trained(model, optimizer, (next(steps) for _ in range(3)))
    next(steps)
    tie(model)
    model(torch.arange(8)).square().mean().backward()
    was = contents(model, optimizer)
    with pytest.raises(errors.UnsupportedError, match=r"tokens.weight and head.weight share memory"):
        optimizer.step()
    assert equal(contents(model, optimizer), was)
    workings_of(ckpt).closing.end(orderly=False)
    restored(tmp_path, lambda model: None, at, least=3)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_of_one_layer_may_share_memory(mode: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.ones(4, WIDTH))
            self.out = Pair()
            self.two.data = self.one.data[2:6]

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(tokens) @ self.out.head.weight @ self.one @ self.two.t()

    for kernel in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        runs = []
        for layered in (False, True):
            model = Layer()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **kernel)
            if layered:
                LayerwiseOptimizer(optimizer, model, mode=mode)
            runs.append(trained(model, optimizer, range(4))[4])
        assert equal(*runs), kernel


def test_mutation_without_the_look_at_memory_training_by_layers_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayersApart, "check", lambda self, groups: None)
    for mode in MODES:
        runs = []
        for layered in (False, True):
            model = Pair()
            tie(model)
            optimizer = adam(model)
            if layered:
                LayerwiseOptimizer(optimizer, model, mode=mode)
            runs.append(trained(model, optimizer, range(6))[6])
        assert not equal(*runs)


# -- what is saved -----------------------------------------------------------------------------------------------------


def restored(root: Path, share: Callable[[Pair], None], at: dict[int, list[Tensor]], least: int = 4) -> None:
    """Every commit comes back as what training held at its boundary."""
    found = sorted(int(path.parent.name[5:15]) for path in root.glob("step_*/manifest.json"))
    assert len(found) >= least
    for step in reversed(found):
        model = Pair()
        share(model)
        optimizer = adam(model)
        with attach(model, optimizer, root) as ckpt:
            assert ckpt.restore(step) == step
        assert equal(contents(model, optimizer), at[step]), f"step {step}"


def clamped(root: Path, share: Callable[[Pair], None]) -> dict[int, list[Tensor]]:
    """Weights are changed through one parameter between update and boundary; the other one's counter does not rise."""
    model = Pair()
    share(model)
    optimizer = adam(model)
    held = {}
    with attach(model, optimizer, root, max_in_flight=4) as ckpt:
        for step in ckpt.steps(8):
            model(torch.arange(step, step + 8) % ROWS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.02)  # what is read in place is written by now
            with torch.no_grad():
                (model.tokens if step % 2 else model.head).weight.mul_(0.9)
            held[step + 1] = contents(model, optimizer)
        ckpt.wait(8)
        assert ckpt.stats()["checkpoints_aborted"] == 0
    return held


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING)
def test_parameters_that_share_memory_are_saved_as_they_are_at_the_boundary(
    tmp_path: Path, share: Callable[[Pair], None]
) -> None:
    restored(tmp_path, share, clamped(tmp_path, share), least=8)


@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("mutated", [False, True])
def test_a_checkpoint_of_two_tensors_is_refused_where_they_share_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: Callable[[Pair], None], mutated: bool
) -> None:
    """Without the look at what it says of both, the one that is filled last would win."""
    if mutated:
        monkeypatch.setattr("layerwise_dist.restore.loader.contradictions", lambda *_: [])
    model = Pair()
    optimizer = adam(model)
    with attach(model, optimizer, tmp_path) as ckpt:
        at = trained(model, optimizer, ckpt.steps(2))[2]
    model = Pair()
    share(model)
    optimizer = adam(model)
    was = contents(model, optimizer)
    with attach(model, optimizer, tmp_path) as ckpt:
        if mutated:
            assert ckpt.restore() == 2 and not equal(contents(model, optimizer), at)
            return
        says = "param/(tokens|head).weight and param/(tokens|head).weight share memory here, but differ"
        with pytest.raises(errors.MismatchError, match=says):
            ckpt.restore()
    assert equal(contents(model, optimizer), was), "nothing was loaded"


def test_mutation_reading_shared_memory_in_place_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surveyor, "_shared", lambda self, states: set())
    for look in ("changed", "changed_by_now"):
        monkeypatch.setattr(Audit, look, lambda *_, **__: set())  # as where it looks at other bytes
    with pytest.raises((AssertionError, errors.MismatchError)):
        restored(tmp_path, tie, clamped(tmp_path, tie), least=8)


def test_what_shares_memory_with_something_trained_is_not_frozen() -> None:
    model = nn.ModuleDict({name: nn.Linear(1024, 512, bias=False) for name in ("trained", "tied", "frozen")})
    model["tied"].weight.data = model["trained"].weight.data
    model["tied"].requires_grad_(False), model["frozen"].requires_grad_(False)
    framework = Framework(model, 0, 1)
    survey = Surveyor(framework, TorchOptimizer(framework, adam(model))).look()
    assert [piece.slice.name for piece in survey.frozen] == ["param/frozen.weight"]
    assert {piece.slice.name for piece in survey.copied} == {"param/trained.weight", "param/tied.weight"}
    model.register_buffer("alias", model["frozen"].weight.data)
    assert not Surveyor(framework, TorchOptimizer(framework, adam(model))).look().frozen


@pytest.mark.parametrize("bit", [torch.conj, torch._neg_view], ids=["conj", "neg"])
def test_two_views_of_one_memory_agree_by_their_values(tmp_path: Path, bit: Callable[[torch.Tensor], Any]) -> None:
    """Their bytes in the file differ, since it holds values."""

    class Twice(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("plain", torch.tensor([1 + 2j, 3 + 4j]) * scale)
            self.register_buffer("seen", bit(self.plain))

    def job(scale: float) -> tuple[Any, Any]:
        model = Twice(scale)
        return model, adam(model.fc)

    model, optimizer = job(1.0)
    with attach(model, optimizer, tmp_path) as ckpt:
        for _ in ckpt.steps(2):
            model.fc(torch.ones(2)).sum().backward()
            optimizer.step()
    model, optimizer = job(7.0)
    with attach(model, optimizer, tmp_path) as ckpt:
        assert ckpt.restore() == 2
    assert model.plain.tolist() == [1 + 2j, 3 + 4j] and torch.equal(model.seen, bit(model.plain))
