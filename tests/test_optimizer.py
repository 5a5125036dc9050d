# SPDX-License-Identifier: Apache-2.0
"""One layer at a time is the whole step, bit for bit, or an error that says why not."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit.drawing import drawn
from kit.models import Hollow, Reused, Sometimes
from kit.runners import Warm
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint

from layerwise_dist import DependencyGraphBuilder, LayerwiseOptimizer
from layerwise_dist.errors import BoundaryError, ConfigError, UnsupportedError
from layerwise_dist.frameworks.subset_step import SubsetStep
from layerwise_dist.layers.gradients import Arrivals
from layerwise_dist.layers.optimizer import _Stepping

STEPS = 4
MODES = ("pipelined_step", "in_backward")
PLAIN = {
    "ASGD": {}, "Adadelta": {}, "Adafactor": {}, "Adagrad": {}, "Adam": {"amsgrad": True}, "AdamW": {}, "Adamax": {},
    "NAdam": {}, "RAdam": {}, "RMSprop": {"momentum": 0.5}, "Rprop": {}, "SGD": {"momentum": 0.9, "nesterov": True},
}  # fmt: skip
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")


def _kernels(name: str) -> list[dict[str, Any]]:
    return [{}, {"foreach": True}, {"foreach": False}, *([{"fused": True}] if name in FUSED else [])]


CASES = [(name, kernel) for name in PLAIN for kernel in _kernels(name)]


def build(name: str = "AdamW", options: dict[str, Any] | None = None, matrices: bool = False) -> tuple[Any, Any]:
    """The model of tests/kit/models.py, in two groups that cut through its layers; the same at each call."""
    torch.manual_seed(5)
    model = Reused()
    kind = getattr(torch.optim, name)
    params = [param for param in model.parameters() if param.ndim == 2 or not matrices]
    matrix = [param for param in params if param.ndim == 2]
    vector = [param for param in params if param.ndim < 2]
    groups = [{"params": matrix}] + ([{"params": vector, "lr": 0.02, "weight_decay": 0.0}] if vector else [])
    return model, kind(groups, lr=0.01, weight_decay=0.1, **(options or {}))


def build_rprop(options: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(5)
    model = Reused()
    return model, torch.optim.Rprop(model.parameters(), lr=0.01, **options)


def made(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    options = {**PLAIN.get(name, {}), **options}
    return build_rprop(options) if name == "Rprop" else build(name, options, matrices=name == "Muon")


def batch(step: int) -> Tensor:
    return torch.randint(16, (2, 4), generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int) -> Tensor:
    loss = model(batch(step)).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, steps: int = STEPS, before_step: Callable[[], None] | None = None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        if before_step is not None:
            before_step()
        optimizer.step()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8)


def same(one: tuple[nn.Module, Any], two: tuple[nn.Module, Any], *, ordered: bool = True) -> bool:
    """Parameters, gradients and optimizer state, bit for bit; with `ordered` also the order of the state."""
    for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True):
        if not torch.equal(bits(a), bits(b)) or (a.grad is None) != (b.grad is None):
            return False
        if a.grad is not None and not torch.equal(bits(a.grad), bits(b.grad)):
            return False
    first, second = one[1].state_dict(), two[1].state_dict()
    order = list if ordered else sorted
    if order(first["state"]) != order(second["state"]) or first["param_groups"] != second["param_groups"]:
        return False
    return all(
        list(state) == list(second["state"][key])
        and all(
            torch.equal(bits(value), bits(second["state"][key][name]))
            if isinstance(value, Tensor)
            else value == second["state"][key][name]
            for name, value in state.items()
        )
        for key, state in first["state"].items()
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kernel"), [*CASES, ("Muon", {})], ids=str)
def test_layer_by_layer_is_the_whole_step_bit_for_bit(name: str, kernel: dict[str, Any], mode: str) -> None:
    plain, layered = made(name, kernel), made(name, kernel)
    updated: list[str] = []
    wrapped = LayerwiseOptimizer(layered[1], layered[0], mode=mode, after_layer=lambda layer, _: updated.append(layer))
    train(*plain)
    train(layered[0], wrapped)
    assert same(plain, layered)
    assert len(updated) == STEPS * len(set(updated)) > STEPS


def test_a_tensor_as_learning_rate_is_exact() -> None:
    plain, layered = made("Adam", {}), made("Adam", {})
    for _, optimizer in (plain, layered):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    LayerwiseOptimizer(layered[1], layered[0])
    train(*plain)
    train(*layered)
    assert same(plain, layered)


@pytest.mark.parametrize("mode", MODES)
def test_the_original_s_own_step_is_layered_too_and_detach_ends_it(mode: str) -> None:
    plain, layered = made("AdamW", {}), made("AdamW", {})
    calls: list[str] = []
    wrapped = LayerwiseOptimizer(layered[1], layered[0], mode=mode, after_layer=lambda layer, _: calls.append(layer))
    train(*plain)
    train(*layered)
    assert calls and same(plain, layered)
    wrapped.detach()
    calls.clear()
    train(*plain)
    train(*layered)
    assert not calls and same(plain, layered)
    assert not layered[1]._optimizer_step_pre_hooks and not layered[1]._optimizer_step_post_hooks
    assert all(not param._post_accumulate_grad_hooks for param in layered[0].parameters())


@pytest.mark.parametrize("mode", MODES)
def test_each_layer_is_announced_right_before_and_reported_right_after_its_update(mode: str) -> None:
    model, optimizer = made("AdamW", {})
    before: dict[str, list[Tensor]] = {}
    events: list[tuple[str, str, int]] = []
    builder = DependencyGraphBuilder(model)
    groups = builder.group_parameters_by_layer()
    untouched = {"frozen", "unused"}

    def announce(layer: str, step: int) -> None:
        events.append(("before", layer, step))
        before[layer] = [bits(param) for param in groups[layer]]

    def report(layer: str, step: int) -> None:
        events.append(("after", layer, step))
        changed = [not torch.equal(bits(p), old) for p, old in zip(groups[layer], before[layer], strict=True)]
        assert all(changed) or (layer in untouched and not any(changed))

    wrapped = LayerwiseOptimizer(optimizer, model, mode=mode, graph=builder, before_layer=announce, after_layer=report)
    train(model, wrapped, 1)  # the observation: whole
    assert [kind for kind, _, _ in events] == ["before"] * len(groups) + ["after"] * len(groups)
    order = builder.get_update_order()
    for step in (2, 3):
        events.clear()
        train(model, wrapped, 1)
        assert [event for pair in zip(events[::2], events[1::2], strict=True) for event in pair] == events
        assert all(
            a[1:] == b[1:] and (a[0], b[0]) == ("before", "after")
            for a, b in zip(events[::2], events[1::2], strict=True)
        )
        assert {at for _, _, at in events} == {step}
        layers = [layer for kind, layer, _ in events if kind == "before"]
        assert [layer for layer in layers if layer not in untouched] == [x for x in order if x not in untouched]
        assert set(layers) == set(groups)


def test_in_backward_updates_a_layer_before_the_backward_is_over() -> None:
    model, optimizer = made("SGD", {})
    first, last = model.head, model.block[0]
    seen: dict[str, bool] = {}
    LayerwiseOptimizer(optimizer, model, mode="in_backward")
    train(model, optimizer, 1)
    optimizer.zero_grad()
    was = bits(model.scale), bits(first.weight)
    first.weight.register_hook(lambda grad: seen.update(scale=not torch.equal(bits(model.scale), was[0])))
    backward(model, 1)
    assert seen == {"scale": True} and last.weight.grad is not None
    updated = bits(first.weight)
    assert not torch.equal(updated, was[1])
    optimizer.step()
    assert torch.equal(bits(first.weight), updated)


@pytest.mark.parametrize("mode", MODES)
def test_an_inactive_iteration_runs_the_original_step_and_calls_nothing(mode: str) -> None:
    plain, layered = made("AdamW", {}), made("AdamW", {})
    calls: list[int] = []
    asked: list[bool] = []

    def active() -> bool:
        asked.append(len(asked) % 2 == 1)
        return asked[-1]

    LayerwiseOptimizer(
        layered[1], layered[0], mode=mode, active=active, before_layer=lambda _, step: calls.append(step)
    )
    train(*plain, steps=6)
    train(*layered, steps=6)
    assert same(plain, layered) and set(calls) == {2, 4, 6} and len(asked) == 6


@pytest.mark.parametrize("kind", ["onecycle", "plateau"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on", ["base", "layerwise"])
def test_schedulers_work_on_either_optimizer(kind: str, mode: str, on: str) -> None:
    runs = made("AdamW", {}), made("AdamW", {})
    for index, (model, optimizer) in enumerate(runs):
        used = optimizer
        if index:
            wrapped = LayerwiseOptimizer(optimizer, model, mode=mode)
            used = wrapped if on == "layerwise" else optimizer
        scheduler = (
            OneCycleLR(used, 0.1, 20) if kind == "onecycle" else ReduceLROnPlateau(used, patience=0, threshold=9)
        )
        for step in range(6):
            used.zero_grad()
            loss = backward(model, step)
            used.step()
            scheduler.step(*([] if kind == "onecycle" else [loss]))
    assert same(*runs)
    assert runs[0][1].param_groups[0]["lr"] != 0.01


@pytest.mark.parametrize("kernel", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("on", ["base", "layerwise"])
def test_a_grad_scaler_works_on_either_optimizer_also_when_it_skips(kernel: dict[str, Any], on: str) -> None:
    runs = made("AdamW", kernel), made("AdamW", kernel)
    scales = []
    for index, (model, optimizer) in enumerate(runs):
        wrapped = LayerwiseOptimizer(optimizer, model) if index else optimizer
        used = wrapped if on == "layerwise" else optimizer
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(6):
            used.zero_grad()
            scaler.scale(model(batch(step)).square().mean()).backward()
            if step == 3:
                model.middle.weight.grad[0, 0] = torch.inf
            scaler.step(used)
            scaler.update()
        scales.append(scaler.get_scale())
    assert same(*runs) and scales[0] == scales[1] != 1024.0


def test_clipping_and_accumulation_are_exact_in_pipelined_step() -> None:
    runs = made("AdamW", {}), made("AdamW", {})
    for index, (model, optimizer) in enumerate(runs):
        if index:
            LayerwiseOptimizer(optimizer, model)
        for step in range(STEPS):
            optimizer.zero_grad()
            for micro in range(3):
                backward(model, 3 * step + micro)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert same(*runs)


@pytest.mark.parametrize("registered", ["before", "after"])
def test_clipping_in_a_step_hook_is_exact_wherever_the_hook_stands(registered: str) -> None:
    runs = made("SGD", {}), made("SGD", {})
    for index, (model, optimizer) in enumerate(runs):
        if index and registered == "after":
            LayerwiseOptimizer(optimizer, model)
            train(model, optimizer)
        elif not index and registered == "after":
            train(model, optimizer)
        optimizer.register_step_pre_hook(
            lambda *_, model=model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01) and None
        )
        if index and registered == "before":
            LayerwiseOptimizer(optimizer, model)
        train(model, optimizer)
    assert same(*runs)


@pytest.mark.parametrize("mode", MODES)
def test_step_hooks_after_the_update_see_the_gradients(mode: str) -> None:
    model, optimizer = made("SGD", {})
    seen: list[bool] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(model.middle.weight.grad is not None))
    LayerwiseOptimizer(optimizer, model, mode=mode)
    train(model, optimizer)
    assert seen == [True] * STEPS


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_without_reentrance_is_exact(mode: str) -> None:
    runs = made("AdamW", {}), made("AdamW", {})
    for index, (model, optimizer) in enumerate(runs):
        model.block.forward = lambda x, run=model.block.forward: checkpoint(run, x, use_reentrant=False)
        if index:
            LayerwiseOptimizer(optimizer, model, mode=mode)
        train(model, optimizer)
    assert same(*runs)


def _hollow(mode: str | None, kernel: dict[str, Any], to_none: bool) -> tuple[Any, Any]:
    torch.manual_seed(5)
    model = Hollow()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **kernel)
    if mode is not None:
        LayerwiseOptimizer(optimizer, model, mode=mode)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=to_none)
        backward(model, step)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("mode", MODES)
def test_parameters_without_elements_are_waited_for_as_any_other(mode: str) -> None:
    """They have state (a count of steps), so they are stepped when plain training steps them."""
    for kernel in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        for to_none in (True, False):
            layered = _hollow(mode, kernel, to_none)
            assert same(_hollow(None, kernel, to_none), layered), (kernel, to_none)
            assert all(layered[1].state[p]["step"] == STEPS for p in layered[0].parameters() if p.requires_grad)


def test_mutation_a_layer_that_does_not_wait_for_its_empty_parameter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    expects = Arrivals.expects
    monkeypatch.setattr(Arrivals, "expects", lambda self, fqn: expects(self, fqn) and self._params[fqn].numel() > 0)
    assert not same(_hollow(None, {}, True), _hollow("in_backward", {}, True))


def test_mutation_an_empty_gradient_that_counts_for_others_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = _Stepping._begin

    def miscounted(self: _Stepping) -> None:
        begin(self)
        self._missing.get("middle", set()).intersection_update({"middle.first"})

    monkeypatch.setattr(_Stepping, "_begin", miscounted)
    assert not same(_hollow(None, {}, True), _hollow("in_backward", {}, True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [0, 1])
def test_parameters_that_only_some_iterations_use_are_exact(mode: str, first: int) -> None:
    """Whatever the observed iteration used."""
    for to_none in (True, False):
        runs = []
        for layered in (False, True):
            torch.manual_seed(5)
            model = Sometimes()
            model.calls = first
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            if layered:
                LayerwiseOptimizer(optimizer, model, mode=mode)
            for step in range(6):
                optimizer.zero_grad(set_to_none=to_none)
                model(torch.full((2, 8), float(step))).square().sum().backward()
                optimizer.step()
            runs.append((model, optimizer))
        assert same(*runs, ordered=False), to_none


@pytest.mark.parametrize("mode", MODES)
def test_state_dicts_go_both_ways(mode: str) -> None:
    plain, layered = made("AdamW", {}), made("AdamW", {})
    wrapped = LayerwiseOptimizer(layered[1], layered[0], mode=mode)
    train(*plain)
    wrapped.load_state_dict(copy.deepcopy(plain[1].state_dict()))
    layered[0].load_state_dict(plain[0].state_dict())
    train(*plain)
    train(layered[0], wrapped)
    assert same(plain, layered) and wrapped.state is layered[1].state


@pytest.mark.parametrize("mode", MODES)
def test_a_group_that_comes_later_is_updated_too(mode: str) -> None:
    runs = []
    for index in range(2):
        torch.manual_seed(5)
        model = Reused()
        late = list(model.middle.parameters())
        early = [param for param in model.parameters() if not any(param is each for each in late)]
        optimizer = torch.optim.AdamW(early, lr=0.01)
        if index:
            LayerwiseOptimizer(optimizer, model, mode=mode)
        train(model, optimizer)
        optimizer.add_param_group({"params": late, "lr": 0.03})
        train(model, optimizer)
        runs.append((model, optimizer))
    assert same(*runs)


class _Foreign(torch.optim.AdamW):
    pass


def test_optimizers_that_cannot_be_stepped_by_layers_are_refused_by_name() -> None:
    model = Reused()
    with pytest.raises(UnsupportedError, match="LBFGS.*closure several times"):
        LayerwiseOptimizer(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(UnsupportedError, match="_Foreign.*may keep state"):
        LayerwiseOptimizer(_Foreign(model.parameters()), model)
    with pytest.raises(UnsupportedError, match="is not a parameter of the model"):
        LayerwiseOptimizer(torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="pipelined_step, in_backward"):
        LayerwiseOptimizer(optimizer, model, mode="whole")
    LayerwiseOptimizer(optimizer, model)
    with pytest.raises(ConfigError, match="already"):
        LayerwiseOptimizer(optimizer, model)


@pytest.mark.parametrize("mode", MODES)
def test_a_closure_is_refused_where_layers_are_stepped_and_runs_where_not(mode: str) -> None:
    model, optimizer = made("SGD", {})
    wrapped = LayerwiseOptimizer(optimizer, model, mode=mode)
    with pytest.raises(UnsupportedError, match="closure"):
        wrapped.step(lambda: backward(model, 0))
    wrapped.detach()
    wrapped = LayerwiseOptimizer(optimizer, model, mode=mode, active=lambda: False)
    assert wrapped.step(lambda: backward(model, 0)) > 0


def _accumulate(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    backward(model, 1)
    optimizer.step()


def _clip(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)  # changes nothing: refused all the same
    optimizer.step()


def _scale(model: nn.Module, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batch(0)).square().mean()).backward()
    scaler.step(optimizer)


def _reentrant(model: nn.Module, optimizer: Any) -> None:
    run = model.block.forward
    model.block.forward = lambda x: checkpoint(run, x, use_reentrant=True)
    backward(model, 0)
    model.block.forward = run
    optimizer.step()


def _zero(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    optimizer.zero_grad()
    optimizer.step()


def _no_step(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()


MISUSES = [_accumulate, _clip, _scale, _reentrant, _zero, _no_step]


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("kernel", [{"fused": False}, {"fused": True}], ids=str)
def test_in_backward_refuses_what_is_not_exact_before_anything_is_updated(
    misuse: Callable[..., None], kernel: dict[str, Any]
) -> None:
    model, optimizer = made("AdamW", kernel)
    LayerwiseOptimizer(optimizer, model, mode="in_backward")
    was = [bits(param) for param in model.parameters()]
    with pytest.raises(UnsupportedError, match="pipelined_step"):
        misuse(model, optimizer)
    assert all(torch.equal(bits(param), old) for param, old in zip(model.parameters(), was, strict=True))


@pytest.mark.parametrize(
    ("misuse", "kernel"),
    # A scaler's unscale leaves no trace where nothing fused asks for its scale; only the observation looks at numbers.
    [(misuse, {"fused": fused}) for misuse in MISUSES for fused in (False, True) if fused or misuse is not _scale],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_in_backward_says_so_when_an_iteration_turns_out_inexact_later(
    misuse: Callable[..., None], kernel: dict[str, Any]
) -> None:
    model, optimizer = made("AdamW", kernel)
    LayerwiseOptimizer(optimizer, model, mode="in_backward")
    train(model, optimizer)
    optimizer.zero_grad()
    with pytest.raises((BoundaryError, UnsupportedError), match="pipelined_step"):
        misuse(model, optimizer)


@pytest.mark.parametrize("kernel", [{"foreach": False}, {"fused": True}], ids=str)
def test_a_backward_that_needs_old_values_of_an_updated_layer_is_an_error_of_torch(kernel: dict[str, Any]) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) @ self.two.weight.detach())

    model = Detached()
    optimizer = torch.optim.AdamW(model.parameters(), **kernel)
    LayerwiseOptimizer(optimizer, model, mode="in_backward")
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.ones(2, 4)).sum().backward()


def test_in_backward_refuses_sparse_gradients_and_pipelined_step_takes_them() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Embedding(8, 4, sparse=True), nn.Embedding(8, 4, sparse=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.one(tokens) * self.two(tokens)

    runs = []
    for mode in (None, *MODES):
        torch.manual_seed(5)
        model = Bag()
        optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.1)
        if mode is not None:
            LayerwiseOptimizer(optimizer, model, mode=mode)
        if mode == "in_backward":
            with pytest.raises(UnsupportedError, match="sparse"):
                train_sparse(model, optimizer)
        else:
            train_sparse(model, optimizer)
            runs.append([bits(param) for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def train_sparse(model: nn.Module, optimizer: Any) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step) % 8).sum().backward()
        optimizer.step()


def test_transformers_adafactor_is_exact() -> None:
    transformers = pytest.importorskip("transformers")
    runs = []
    for index in range(2):
        torch.manual_seed(5)
        model = Reused()
        optimizer = transformers.optimization.Adafactor(model.parameters())
        if index:
            LayerwiseOptimizer(optimizer, model)
        train(model, optimizer)
        runs.append((model, optimizer))
    assert same(*runs)


# What the comparison must catch


def _differs(layered: tuple[nn.Module, Any], mode: str = "pipelined_step") -> bool:
    plain = made(type(layered[1]).__name__, {})
    train(*plain)
    LayerwiseOptimizer(layered[1], layered[0], mode=mode)
    train(*layered)
    return not same(plain, layered)


@pytest.mark.parametrize("mode", MODES)
def test_mutation_a_layer_that_is_left_out_is_caught(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made("AdamW", {})
    step = SubsetStep.step

    def forget(self: SubsetStep, subset: Any, pins: Any) -> None:
        if not any(param is model.middle.weight for part in subset for param in part):
            step(self, subset, pins)

    monkeypatch.setattr(SubsetStep, "step", forget)
    assert _differs((model, optimizer), mode)


def test_mutation_a_layer_that_is_stepped_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SubsetStep.step
    monkeypatch.setattr(SubsetStep, "step", lambda self, *args: (step(self, *args), step(self, *args)))
    assert _differs(made("AdamW", {}))


def test_mutation_other_kernels_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SubsetStep, "_pin", lambda self, group, params: {"foreach": False, "fused": True})
    assert _differs(made("Adam", {})), "AdamW's kernels give the same bits on some processors"


def test_kernels_are_decided_from_all_parameters_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on an accelerator, where foreach is the default.
    module = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(module, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])

    class Odd(nn.Parameter):
        """Of a class that torch's foreach kernels are not used for."""

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = Odd(torch.zeros(3))
    optimizer = torch.optim.AdamW(model.parameters())
    step = SubsetStep(optimizer)
    assert step.pins([list(model.parameters())]) == [{"foreach": False}]
    assert step.pins([list(model[0].parameters())]) == [{"foreach": True}]
    kernels: list[Any] = []
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_multi_tensor_adam", lambda *_, **__: kernels.append("foreach"))
    monkeypatch.setattr(adam, "_single_tensor_adam", lambda *_, **__: kernels.append("single"))
    LayerwiseOptimizer(optimizer, model)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert kernels[:3] == ["single"] * 3  # whole, then two layers; what is left for the step itself has no parameters
    assert optimizer.param_groups[0]["foreach"] is None


def test_a_first_step_that_is_layered_makes_the_state_in_another_order_and_the_same_parameters() -> None:
    model, optimizer = made("AdamW", {})
    graph = DependencyGraphBuilder(model)
    with graph.observe():
        backward(model, 0)
    optimizer.zero_grad()
    plain = made("AdamW", {})
    train(*plain)
    LayerwiseOptimizer(optimizer, model, graph=graph)  # observed already: its first step is layered
    train(model, optimizer)
    assert [id(p) for p in optimizer.state] != [
        id(p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None
    ]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(plain[0].parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("ranks", "wrappers", "cases", "drawn_cases", "refusals"),
    [
        # A third rank changes in which order numbers are added.
        (
            3, ("ddp", "ddp-views", "ddp-hook", "ddp-hollow", "mutations"), 27, 15,
            (
                "register_comm_hook(model, state, hook)", "find_unused_parameters", "static_graph", "DDP inside",
                "is sparse",
            ),
        ),
        (2, ("fsdp2", "fsdp1", "fsdp1-flat", "fsdp1-hollow"), 26, 11, ("use_orig_params=True",)),
        (4, ("hsdp", "tp"), 15, 6, ()),
    ],
    ids=["ddp", "fsdp", "meshes"],
)  # fmt: skip
def test_layers_are_exact_under_wrappers_and_in_backward_is_refused_where_it_is_not(
    warm: Warm, ranks: int, wrappers: tuple[str, ...], cases: int, drawn_cases: int, refusals: tuple[str, ...],
    long: bool,
) -> None:  # fmt: skip
    """Each mode and feature of a wrapper with a kernel that is drawn, so that each kernel has its turn; with all of
    them under --long.
    """
    seed = "all" if long else drawn(range(1000), f"kernels on {ranks} ranks")
    print(f"kernels: {seed}")
    finished = warm.run("layers.py", ranks, seed, *wrappers, timeout=120)
    assert finished.lines("differs ") == []
    assert len(finished.lines("exact ")) == ranks * (cases if long else drawn_cases)
    assert finished.lines("accepted") == []
    refused = "\n".join(finished.lines("refused "))
    wrappers = tuple(name for name in wrappers if name != "mutations")
    assert refused.count(f"a job of {ranks} ranks") == ranks * len(wrappers)  # the model without its wrapper
    assert finished.lines("unseen") == []
    clipped = len({"ddp", "fsdp2", "fsdp1"}.intersection(wrappers))
    assert refused.count("between its arrival and step()") == ranks * clipped
    for why in refusals:
        assert refused.count(why) >= ranks, why
