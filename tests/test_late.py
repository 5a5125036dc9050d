# SPDX-License-Identifier: Apache-2.0
"""State that comes, goes or moves between a capture's beginning and the boundary costs no checkpoint."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.chain import attach, equal, slow, tensors
from kit.crash import in_ranks, settings
from torch import Tensor, nn

import layerwise_dist as lwd
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture.lease import Capture
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly, hooks
from layerwise_dist.engine.attempts import Attempts
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.errors import DamageError

WIDTH, STEPS = 96, 10  # a layer has 36 KiB, and 108 KiB with AdamW's state


class Experts(nn.Module):
    """(batch, WIDTH) to (batch, WIDTH), through the experts that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, used: range) -> Tensor:
        x = self.first(x)
        return self.last(x + sum(self.experts[number](x) for number in used))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def renew(state: dict[str, Any]) -> None:
    """Another tensor, with other values."""
    state["exp_avg"] = state["exp_avg"] * 0.5


class Renewing(torch.optim.AdamW):
    """Puts another tensor into its state within the updates that `when` tells of."""

    def __init__(self, params: Any, when: Callable[[int], bool]) -> None:
        super().__init__(params, lr=0.01)
        self._when, self._param = when, self.param_groups[0]["params"][0]

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        if self._when(int(self.state[self._param]["step"])):
            renew(self.state[self._param])
        return done


def nothing(model: Experts, optimizer: torch.optim.Optimizer, step: int) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """`used`: the experts of each step; `after`: what the script does between update and boundary."""

    used: Callable[[int], range] = lambda step: range(1)
    after: Callable[[Experts, torch.optim.Optimizer, int], None] = nothing
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam
    quiet: int = 6  # the step from which on nothing comes, goes or moves


def _pop(model: Experts, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step == 4:
        del optimizer.state[model.experts[0].weight]


def _add(model: Experts, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step == 4:
        optimizer.state[model.experts[0].weight]["ema"] = model.experts[0].weight.detach().clone()


def _move(model: Experts, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step >= 4:
        renew(optimizer.state[model.first.weight])


def _momentum(model: Experts, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["momentum"] = 0.9 if step >= 3 else 0.0


CASES = {
    "one layer comes late": Case(lambda step: range(2 if step >= 4 else 1)),
    "one layer after the other": Case(lambda step: range(max(1, min(4, step - 2))), quiet=7),
    "a layer is used in some steps": Case(lambda step: range(2 if step % 3 == 2 else 1)),
    "state goes, and comes again": Case(after=_pop),
    "a tensor of state is added": Case(after=_add),
    "a tensor of state moves in every step": Case(after=_move, quiet=STEPS),
    "an update moves a tensor of state, now and then": Case(
        optimizer=lambda model: Renewing(model.parameters(), lambda step: step in (5, 8)), quiet=STEPS
    ),
    "every update moves a tensor of state": Case(
        optimizer=lambda model: Renewing(model.parameters(), lambda step: True), quiet=STEPS
    ),
    "all layers get their state late": Case(after=_momentum, optimizer=sgd),
}

UPDATES = [name for name in CASES if "update" in name]
MOVES = [name for name in CASES if "moves" in name]


def trained(case: Case, steps: Any, model: Experts, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    held = {}
    for step in steps:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        model(x, case.used(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        case.after(model, optimizer, step)
        held[step + 1] = tensors(model, optimizer)
    return held


def check(root: Path, case: Case, at: dict[int, dict[str, Tensor]]) -> None:
    """Every step is committed, and comes back as what training held at its boundary."""
    found = [int(path.parent.name[5:15]) for path in root.glob("step_*/manifest.json")]
    assert sorted(found) == sorted(at)
    model = Experts()
    optimizer = case.optimizer(model)
    with attach(model, optimizer, root) as ckpt:
        for step in sorted(found, reverse=True):
            assert ckpt.restore(step) == step
            assert equal(tensors(model, optimizer), at[step]), f"step {step}"


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose capture began before their update was over."""
    steps: list[int] = []
    real = Attempts.open

    def opened(attempts: Attempts, step: int, found: Any = None, **options: Any) -> Any:
        steps.extend([step] if found is not None else [])
        return real(attempts, step, found, **options)

    monkeypatch.setattr(Attempts, "open", opened)
    return steps


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in CASES if name not in UPDATES for mode in ("pipelined_step", "in_backward")),
        *((name, mode) for name in ("state goes, and comes again", *MOVES) for mode in ("whole", "whole, staged")),
    ],
)
def test_state_that_comes_goes_or_moves_costs_no_checkpoint(
    tmp_path: Path, early: list[int], name: str, mode: str
) -> None:
    case = CASES[name]
    capture = "stage" if mode in ("pipelined_step", "whole, staged") else "lease"
    model = Experts()
    optimizer = case.optimizer(model)
    mode = mode.partition(",")[0]
    options = {"update": mode, "capture": capture, "max_in_flight": 3, "commit": {"on_failure": "raise"}}
    with attach(model, optimizer, tmp_path, slow(0.0005), **options) as ckpt:
        at = trained(case, ckpt.steps(STEPS), model, optimizer)
    plain = Experts()
    assert equal(at[STEPS], trained(case, range(STEPS), plain, case.optimizer(plain))[STEPS])
    check(tmp_path, case, at)
    if mode != "whole":
        assert set(range(case.quiet + 2, STEPS + 1)) <= set(early), "captured early again"


def test_a_second_update_may_bring_state(tmp_path: Path) -> None:
    """In one iteration: the first update's capture knows nothing of what the second one makes."""
    for mode in ("whole", "pipelined_step"):
        model = Experts()
        optimizer = adam(model)
        held = {}
        with attach(model, optimizer, tmp_path / mode, update=mode, commit={"on_failure": "raise"}) as ckpt:
            for step in ckpt.steps(5):
                for number in (1, 2 + (step >= 3)):
                    model(torch.ones(2, WIDTH), range(number)).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                held[step + 1] = tensors(model, optimizer)
        check(tmp_path / mode, Case(), held)


def test_where_every_update_moves_something_captures_begin_after_it(tmp_path: Path, early: list[int]) -> None:
    """Else each would be done twice."""
    model = Experts()
    optimizer = adam(model)
    model.first.weight.register_post_accumulate_grad_hook(lambda _: _move(model, optimizer, ckpt.completed))
    again: list[int] = []
    with attach(model, optimizer, tmp_path, update="in_backward") as ckpt:
        attempts = workings_of(ckpt).attempts
        real = attempts.again
        attempts.again = lambda capture: (again.append(capture.step), real(capture))[1]
        at = trained(Case(), ckpt.steps(STEPS), model, optimizer)
    assert again == [5] and max(early) == 5
    check(tmp_path, Case(), at)


@pytest.mark.parametrize("update", ["whole", "pipelined_step"])
def test_where_nothing_moves_a_checkpoint_looks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str
) -> None:
    """At its boundary, whether it began after its update or within it."""
    looks: list[bool] = []
    real = Surveyor.look

    def look(surveyor: Surveyor, *args: Any, sealing: bool = False) -> Any:
        looks.append(sealing)
        return real(surveyor, *args, sealing=sealing)

    model = Experts()
    optimizer = adam(model)
    with attach(model, optimizer, tmp_path, update=update) as ckpt:
        trained(Case(), ckpt.steps(STEPS // 2), model, optimizer)
        monkeypatch.setattr(Surveyor, "look", look)
        trained(Case(), ckpt.steps(STEPS), model, optimizer)
    assert looks == [True] * (STEPS - STEPS // 2)


def test_one_rank_may_have_a_late_layer_of_its_own(tmp_path: Path) -> None:
    cases = [CASES["one layer after the other"], Case()]

    def body(transport: LocalTransport) -> dict[int, dict[str, Tensor]]:
        model = Experts()
        optimizer = adam(model)
        config = settings(str(tmp_path), update="pipelined_step", keep_last=99, commit={"on_failure": "raise"})
        with assembly.assemble(model, optimizer, config, transport, PosixEnv()) as ckpt:
            return trained(cases[transport.rank], ckpt.steps(STEPS), model, optimizer)

    def again(transport: LocalTransport) -> None:
        model = Experts()
        optimizer = adam(model)
        with assembly.assemble(model, optimizer, settings(str(tmp_path)), transport, PosixEnv()) as ckpt:
            for step in range(STEPS, 0, -1):
                assert ckpt.restore(step) == step
                assert equal(tensors(model, optimizer), at[transport.rank][step]), f"step {step}"

    at = in_ranks(body)
    in_ranks(again)


def test_in_monitor_mode_too(tmp_path: Path) -> None:
    case = CASES["one layer after the other"]
    model = Experts()
    optimizer = case.optimizer(model)
    options = {"update": "pipelined_step", "mode": "monitor", "keep_last": 99, "commit": {"on_failure": "raise"}}
    with lwd.attach(model, optimizer, dir=str(tmp_path), **options) as ckpt:
        at = trained(case, ckpt.steps(STEPS), model, optimizer)
    check(tmp_path, case, at)


@pytest.mark.parametrize("operation", ["unlink", "create"])
def test_what_fails_when_a_capture_is_done_again_ends_that_attempt_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    case = CASES["one layer comes late"]
    model = Experts()
    optimizer = case.optimizer(model)
    env = testing.FaultEnv(PosixEnv())
    real = Capture.leave
    fail = {"operation": operation, "path_pattern": "*rank_*", "errno": errno.EIO}
    monkeypatch.setattr(Capture, "leave", lambda capture: (env.fail(**fail), real(capture)))
    with attach(model, optimizer, tmp_path, env, update="pipelined_step", max_in_flight=3) as ckpt:
        at = trained(case, ckpt.steps(STEPS), model, optimizer)
    assert env.injected == 1
    del at[5]
    check(tmp_path, case, at)


def test_what_lies_where_it_did_is_looked_for_once_a_checkpoint(tmp_path: Path) -> None:
    """Twice in a row all was in its place: the next capture begins with what is known, and only its boundary looks."""
    model = Experts()
    optimizer = Renewing(model.parameters(), lambda step: step == 6)
    opening: list[int] = []
    with attach(model, optimizer, tmp_path) as ckpt:
        surveyor = workings_of(ckpt).surveyor
        real = surveyor.look

        def look(*args: Any, sealing: bool = False) -> Any:
            opening.extend([] if sealing else [ckpt.completed + 1])
            return real(*args, sealing=sealing)

        surveyor.look = look
        trained(Case(), ckpt.steps(STEPS), model, optimizer)
    assert opening == [1, 2, 7]


def looks_in_a_backward(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often it is asked there whether a checkpoint can be judged, of a model with 99 parameters."""
    model = nn.ParameterList(torch.ones(2) for _ in range(99))
    with attach(model, torch.optim.SGD(model.parameters(), 0.1), root) as ckpt:
        captures, made = workings_of(ckpt).captures, []
        loss = torch.stack([param.sum() for param in model]).sum()
        with monkeypatch.context() as patch:
            patch.setattr(captures, "unsettled", ["a checkpoint"])
            patch.setattr(captures, "settle", lambda: made.append(1))
            loss.backward()
        model.zero_grad()
    return len(made)


def test_a_backward_of_many_gradients_looks_a_few_times_whether_a_checkpoint_can_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 16 <= looks_in_a_backward(tmp_path, monkeypatch) <= 32


@pytest.mark.parametrize("looks", [1, 1000])
def test_mutation_a_look_at_one_gradient_or_at_each_is_found(
    tmp_path: Path, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_LOOKS", looks)
    with pytest.raises(AssertionError):
        test_a_backward_of_many_gradients_looks_a_few_times_whether_a_checkpoint_can_be_judged(tmp_path, monkeypatch)


def test_mutation_a_boundary_that_trusts_what_is_known_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attempts, "look", lambda attempts, sealing=False: attempts._expected())
    monkeypatch.setattr(Attempts, "_expected", lambda attempts: attempts._surveyor.known(attempts._copying) or (
        attempts._surveyor.look(attempts._copying)
    ))  # fmt: skip
    case = CASES["an update moves a tensor of state, now and then"]
    model = Experts()
    optimizer = case.optimizer(model)
    with attach(model, optimizer, tmp_path) as ckpt:
        at = trained(case, ckpt.steps(STEPS), model, optimizer)
    with pytest.raises(AssertionError, match="step"):
        check(tmp_path, case, at)


def test_mutation_a_staged_tensor_in_the_place_of_another_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address is not in the key, since the layout does not depend on it."""
    monkeypatch.setattr(
        Capture, "fits", lambda capture, survey: survey is capture.survey or survey.key == capture.survey.key
    )
    case = CASES["a tensor of state moves in every step"]
    model = Experts()
    optimizer = case.optimizer(model)
    with attach(model, optimizer, tmp_path, capture="stage") as ckpt:
        at = trained(case, ckpt.steps(STEPS), model, optimizer)
    with pytest.raises(AssertionError, match="step"):
        check(tmp_path, case, at)


def test_mutation_a_late_layer_in_the_old_layout_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capture, "fits", lambda capture, survey: True)
    case = CASES["one layer comes late"]
    model = Experts()
    optimizer = case.optimizer(model)
    with attach(model, optimizer, tmp_path, update="pipelined_step") as ckpt:
        at = trained(case, ckpt.steps(STEPS), model, optimizer)
    with pytest.raises((AssertionError, DamageError)):  # the sealed state speaks of what no shard has
        check(tmp_path, case, at)
