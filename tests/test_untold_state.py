# SPDX-License-Identifier: Apache-2.0
"""State of an optimizer that cannot be saved, or not be put back, is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.odd_optimizers import Decaying, Inner, InState, Make, Titan, Told, Untold, differs, everything, job, of, train
from torch import nn

import layerwise_dist as lwd
from layerwise_dist import errors

torch.set_num_threads(1)


def failure(folder: Path, make: Make) -> str:
    """Of the first checkpoint of an attached training."""
    model, optimizer = job(make)
    with pytest.raises(errors.UnsupportedError) as caught, lwd.attach(model, optimizer, dir=str(folder)) as ckpt:
        train(ckpt, model, optimizer, 1)
    assert not list(folder.glob("step_*/manifest.json"))
    return str(caught.value)


def untold(start: Any, change: Callable[[Any], Any]) -> Make:
    return of(type("Untold", (Untold,), {"start": start, "change": staticmethod(change)}))


class Wrapped(torch.Tensor):
    pass


def appended(values: list[Any]) -> list[Any]:
    values.append(1)
    return values


UNTOLD: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "int": (0, lambda k: k + 1), "float": (0.5, lambda k: k / 2), "bool": (False, lambda k: not k),
    "str": ("warm", lambda k: "hot"), "None": (None, lambda k: 1), "a list": (list, appended),
    "a dict": (dict, lambda k: k.update(n=k.get("n", 0) + 1) or k),
    "a tensor": (lambda: torch.zeros(3), torch.Tensor.exp_),
    "another tensor": (lambda: torch.zeros(3), lambda k: k + 1),
    "a large tensor": (lambda: torch.zeros(5000), lambda k: k.add_(1)),
    "a tensor in a list": (lambda: [torch.zeros(3)], lambda k: [k[0].add_(1)]),
    "a subclass of Tensor": (lambda: torch.zeros(3).as_subclass(Wrapped), lambda k: k.add_(1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNTOLD)
def test_an_attribute_that_changes_and_is_told_nowhere_is_refused_at_the_first_checkpoint(
    tmp_path: Path, kind: str
) -> None:
    found = failure(tmp_path, untold(*UNTOLD[kind]))
    assert "Untold keeps state in its attribute 'k', which changed" in found and "load_state_dict()" in found


def test_hyper_parameters_outside_the_groups_that_change_are_refused(tmp_path: Path) -> None:
    class Defaults(Decaying):
        def count(self) -> float:
            self.defaults["lr"] *= 0.5
            return 1.0

    class Partly(Told):  # `k` is told, `j` is not
        j = 1.0

        def count(self) -> float:
            self.j /= 2
            return super().count()

    assert "Defaults keeps state in its attribute 'defaults'" in failure(tmp_path / "1", of(Defaults))
    assert "Partly keeps state in its attribute 'j'" in failure(tmp_path / "2", of(Partly))


def test_what_does_not_change_or_is_captured_anyway_is_no_state(tmp_path: Path) -> None:
    class Quiet(torch.optim.AdamW):
        """Lists of what is captured, what stays, a flag that is back at the boundary, a function, a scheduler's own."""

        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr=lr)
            self.flat, self.views = self.param_groups[0]["params"], [p.data for p in self.param_groups[0]["params"]]
            self.moments: list[torch.Tensor] = [torch.zeros(0) for _ in self.flat]
            self.inside, self.limit, self.scale = False, {"norm": 1.5}, torch.tensor(2.0)
            self.log = print

        def step(self, closure: Any = None) -> None:
            self.inside = True
            super().step()
            self.scale.fill_(2.0)
            self.inside = False

    model, optimizer = job(of(Quiet))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with lwd.attach(
        model, optimizer, dir=str(tmp_path), state={"schedule": schedule}, commit={"on_failure": "raise"}
    ) as ckpt:
        for total in (1, 2, 3):
            train(ckpt, model, optimizer, total)
            ckpt.wait(total)
            schedule.step()


def test_what_is_told_and_not_taken_back_is_saved_only_while_it_stays_as_it_is(tmp_path: Path) -> None:
    class Version(InState):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "version": 3, "more": [self.state.get("unused")]}

    class NotTaken(Told):
        load_state_dict = torch.optim.Optimizer.load_state_dict  # type: ignore[assignment]

    class Forgetful(Told):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            torch.optim.Optimizer.load_state_dict(self, state_dict)

    assert not differs(tmp_path / "version", of(Version))
    found = failure(tmp_path / "not taken", of(NotTaken))
    assert "what its state_dict() returns (['k']) changes" in found and "accepts none of it" in found
    model, optimizer = job(of(Forgetful))
    with lwd.attach(model, optimizer, dir=str(tmp_path / "forgetful")) as ckpt:
        train(ckpt, model, optimizer, 2)
    model, optimizer = job(of(Forgetful))
    with lwd.attach(model, optimizer, dir=str(tmp_path / "forgetful")) as ckpt:
        with pytest.raises(errors.UnsupportedError, match=r"does not return \['k'\] as given"):
            ckpt.restore()
        with pytest.raises(errors.DamageError, match="did not finish"):
            train(ckpt, model, optimizer, 1)


def refused(folder: Path, make: Make) -> str:
    """At attach(). The directory is free afterwards, and the model as it was."""
    model, optimizer = job(make)
    with pytest.raises(errors.UnsupportedError) as caught:
        lwd.attach(model, optimizer, dir=str(folder))
    assert not model._forward_pre_hooks
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    lwd.attach(model, other, dir=str(folder)).close()
    return str(caught.value)


class Averager:
    def average_parameters(self, params: Any) -> None:
        pass


class Bare(torch.optim.Optimizer):
    """Has called nothing, and has what it wraps in another object."""

    def __init__(self) -> None:
        self.k = 0


def test_wrappers_that_are_no_whole_optimizers_are_refused_and_leave_nothing_locked(tmp_path: Path) -> None:
    def hidden(model: nn.Module) -> torch.optim.Optimizer:
        wrapper = Bare()
        wrapper.inner = of(torch.optim.SGD, lr=0.1)(model)  # type: ignore[attr-defined]
        return wrapper

    assert "attach the optimizer inside it (optimizer.inner)" in refused(tmp_path, hidden)
    assert "Bare did not call torch.optim.Optimizer.__init__()" in refused(tmp_path, lambda model: Bare())


def test_optimizers_inside_that_cannot_be_captured_are_refused(tmp_path: Path) -> None:
    def foreign(model: nn.Module) -> torch.optim.Optimizer:
        outer = torch.optim.SGD(model.parameters(), lr=0.1)
        outer.slow = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
        return outer

    def bare(model: nn.Module) -> torch.optim.Optimizer:
        outer = torch.optim.SGD(model.parameters(), lr=0.1)
        outer.slow = {"x": [Bare()]}
        return outer

    def late(model: nn.Module) -> torch.optim.Optimizer:
        outer = of(Inner)(model)
        outer.register_step_post_hook(lambda self, *_: setattr(self, "other", torch.optim.SGD(self.inner.param_groups)))
        return outer

    def one_dict(model: nn.Module) -> torch.optim.Optimizer:
        outer = of(Inner)(model)
        outer.state.update({param: outer.inner.state[param] for param in model.parameters()})
        return outer

    def ambiguous(model: nn.Module) -> torch.optim.Optimizer:
        outer = of(Inner)(model)
        outer.state[next(model.parameters())]["inner.momentum_buffer"] = torch.zeros(1)
        return outer

    found = refused(tmp_path / "1", foreign)
    assert "SGD's slow (SGD): parameter 0 of group 0 (shape [3]) is in none of SGD's own groups" in found
    assert "slow['x'][0] (Bare) has no state or groups" in refused(tmp_path / "2", bare)
    assert "has other optimizers inside it (['inner', 'other']) than at attach()" in failure(tmp_path / "3", late)
    assert "one dict of two optimizers" in refused(tmp_path / "4", one_dict)
    assert "'inner.momentum_buffer', which cannot be told from" in refused(tmp_path / "5", ambiguous)


def test_a_state_dict_that_makes_state_is_refused_and_undone(tmp_path: Path) -> None:
    model, _ = job(of(InState))
    titan = Titan(model.parameters(), model)
    with pytest.raises(errors.UnsupportedError, match=r"state_dict\(\) makes state where there was none"):
        lwd.attach(model, titan, dir=str(tmp_path))
    assert not titan.parts[0].state
    with lwd.attach(model, optimizers={"a": titan.parts[0], "b": titan.parts[1]}, dir=str(tmp_path)) as ckpt:
        train(ckpt, model, titan, 2)
        ckpt.wait(2)


def test_errors_of_an_optimizer_s_own_code_are_named(tmp_path: Path) -> None:
    class NoStateDict(InState):
        def state_dict(self) -> dict[str, Any]:
            raise NotImplementedError("call distributed_state_dict()")

    class NotLoaded(Told):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.k = state_dict["misspelled"]

    class Clock(Told):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "at": torch.rand(1)}

    assert "returns ['k', 'at'], with other values at each call" in refused(tmp_path / "0", of(Clock))
    found = refused(tmp_path / "1", of(NoStateDict))
    assert "state_dict() fails: NotImplementedError: call distributed_state_dict()" in found
    model, optimizer = job(of(NotLoaded))
    with lwd.attach(model, optimizer, dir=str(tmp_path / "2")) as ckpt:
        train(ckpt, model, optimizer, 2)
        ckpt.wait(2)
        with pytest.raises(errors.UnsupportedError, match=r"load_state_dict\(\) fails: KeyError: 'misspelled'"):
            ckpt.restore()


def test_keys_and_values_that_another_process_cannot_use_are_refused(tmp_path: Path) -> None:
    def keyed(key: Any, value: Any = 1) -> Make:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.state[key] = value
            return optimizer

        return make

    assert "SGD keeps state under 3, which is neither" in refused(tmp_path / "1", keyed(3))
    assert "state of a tensor (shape [2]) in none of its groups" in refused(tmp_path / "2", keyed(torch.zeros(2)))
    with pytest.raises(errors.StateError, match=r"optimizer\['state'\]\['k'\].*object is an object"):
        model, optimizer = job(keyed("k", object()))
        lwd.attach(model, optimizer, dir=str(tmp_path / "3"))
    model, optimizer = job(keyed("unused"))
    optimizer.state[model[0].weight] = torch.zeros(1)  # type: ignore[index, assignment]
    with pytest.raises(errors.UnsupportedError, match="the state of a parameter is not a dict"):
        lwd.attach(model, optimizer, dir=str(tmp_path / "4"))


def test_a_checkpoint_of_an_optimizer_that_keeps_its_state_elsewhere_fits_no_other(tmp_path: Path) -> None:
    def named(kind: type, **options: Any) -> Make:
        return of(type("Same", (kind,), {}), **options)

    def mismatch(saved: Make, restored: Make) -> str:
        root = str(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        model, optimizer = job(saved)
        with lwd.attach(model, optimizer, dir=root) as ckpt:
            train(ckpt, model, optimizer, 1)
        model, optimizer = job(restored, 1)
        before = everything(model, optimizer)
        with lwd.attach(model, optimizer, dir=root) as ckpt, pytest.raises(errors.MismatchError) as caught:
            ckpt.restore()
        assert everything(model, optimizer) == before
        return str(caught.value)

    plain, told, inside = named(InState), named(Told), named(Inner)
    assert "the checkpoint holds ['k'], which Same's load_state_dict() does not accept" in mismatch(told, plain)
    assert "Same's state_dict() returns ['k'], which the checkpoint lacks" in mismatch(plain, told)
    assert "Same has optimizers inside it (['inner']), this one has others (none)" in mismatch(inside, plain)
    assert "Same has optimizers inside it (none), this one has others (['inner'])" in mismatch(plain, inside)
    assert "shares its state or groups" in mismatch(inside, named(Inner, shared="state"))
    assert "shares its state or groups" in mismatch(named(Inner, shared="groups"), inside)
