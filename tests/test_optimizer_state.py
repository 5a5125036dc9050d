"""State that an optimizer keeps elsewhere than under `state[parameter]`: it comes back to the bit, or is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
import torch
from kit.runners import Warm
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import layerwise_dist as lwd
from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.capture.survey import Surveyor
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.frameworks import elsewhere, nested
from layerwise_dist.storage import typed_json

torch.set_num_threads(1)

Make = Callable[[nn.Module], torch.optim.Optimizer]


# -- optimizers, as they are written in the wild -----------------------------------------------------------------------


class Decaying(torch.optim.Optimizer):
    """SGD whose step falls with a count; where that is kept is the subclasses' affair."""

    def __init__(self, params: Any, lr: float = 0.1, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})

    def count(self) -> float:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        count = self.count()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] / (1 + count))


class InState(Decaying):
    """MADGRAD's way; an int, made in the first step."""

    def count(self) -> float:
        self.state["k"] = self.state.get("k", 0) + 1  # type: ignore[index]
        return self.state["k"]


class TensorInState(Decaying):
    """A tensor, made at once, whose contents change; and a nested value whose keys are no strings."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.state["k"] = torch.tensor([0])  # type: ignore[index]
        self.alias = self.state["k"]

    def count(self) -> float:
        self.alias += 1
        seen = self.state.setdefault("seen", {(1, 2): [torch.zeros(3)], "inf": float("-inf")})  # type: ignore[arg-type]
        seen[(1, 2)][0] += self.state["k"]
        return float(seen[(1, 2)][0].sum())


class Told(Decaying):
    """An attribute that `state_dict()` tells and `load_state_dict()` takes."""

    k = 0

    def count(self) -> float:
        self.k += 1
        return self.k

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "k": self.k}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.k = state_dict["k"]


class Schedule:
    """Counts, in an object that nobody sees into."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.mean = torch.zeros(3, dtype=torch.float64)

    def step(self) -> float:
        self.seen.append(len(self.seen))
        self.mean = self.mean * 0.9 + len(self.seen)
        return float(self.mean.sum())


class ToldObject(Decaying):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.schedule = Schedule()

    def count(self) -> float:
        return self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "schedule": vars(self.schedule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        vars(self.schedule).update(state_dict["schedule"])


class Untold(Decaying):
    """An attribute that nobody tells; `start` is its first value, `change` makes the next one of it."""

    start: Any = 0
    change: Callable[[Any], Any] = staticmethod(lambda k: k + 1)

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.k = type(self).start() if callable(type(self).start) else type(self).start

    def count(self) -> float:
        self.k = type(self).change(self.k)
        return 1.0


class Hooked(Untold):
    """Told by hooks, as for a class of somebody else's."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.register_state_dict_post_hook(lambda self, found: found.update(k=self.k))
        self.register_load_state_dict_pre_hook(lambda self, given: setattr(self, "k", given.pop("k")))

    def count(self) -> float:
        self.k += 1
        return self.k


class Inner(torch.optim.Optimizer):
    """Its step is another optimizer's. `shared`: what the two have in common."""

    def __init__(self, params: Any, lr: float = 0.1, shared: str = "") -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.inner = torch.optim.SGD(params, lr=0.05, momentum=0.9)
        if "state" in shared:
            self.state = self.inner.state
        if "groups" in shared:
            self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for group in self.inner.param_groups:
            group["lr"] *= 0.9
        for group in self.param_groups:
            for param in group["params"]:
                mine = self.state[param].setdefault("slow", torch.zeros_like(param))
                mine.mul_(0.5).add_(param)
                param.add_(mine, alpha=0.01)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict()}


class Container(torch.optim.Optimizer):
    """Optimizers of parts of the model, in a list, behind one `step()`; torchtitan's, but for its state_dict()."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__(params, {})
        kinds: list[Any] = [torch.optim.AdamW, Told]
        self.parts = [kind(params[number::2], lr=lr) for number, kind in enumerate(kinds)]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}


class Titan(Container):
    """torch.distributed.checkpoint makes missing state by a step."""

    def __init__(self, params: Any, model: nn.Module) -> None:
        super().__init__(params)
        self.model = [model]

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model[0], self.parts[0])


class Sam(torch.optim.Optimizer):
    """Climbs, evaluates again, and comes back for the update of the optimizer inside."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"rho": 0.05, "lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].setdefault("old", torch.empty_like(param)).copy_(param)
                param.add_(param.grad, alpha=group["rho"])
                param.grad = None
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for param in group["params"]:
                param.copy_(self.state[param]["old"])
        self.base_optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """As timm has it: it makes its own hooks, has no state of its own, and its step() is not wrapped by torch."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        hooks = ("step_pre", "step_post", "state_dict_pre", "state_dict_post")
        for name in hooks:
            setattr(self, f"_optimizer_{name}_hooks", {})
        self.state, self._base = defaultdict(dict), base
        self.param_groups, self.defaults = base.param_groups, base.defaults
        for group in base.param_groups:
            group["lookahead_step"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._base.step()
        for group in self.param_groups:
            group["lookahead_step"] += 1
            for param in group["params"]:
                slow = self._base.state[param].setdefault("slow", param.clone())
                if group["lookahead_step"] % 2 == 0:
                    param.copy_(slow.add_(param - slow, alpha=0.5))

    def state_dict(self) -> dict[str, Any]:
        return self._base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base.load_state_dict(state_dict)
        self.param_groups = self._base.param_groups


class OwnLookahead(Lookahead):
    """As pytorch_optimizer has it: slow weights are its own state, told under the parameters' identities."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._base.step()
        for group in self.param_groups:
            for param in group["params"]:
                slow = self.state[param].setdefault("slow", param.clone())
                param.copy_(slow.add_(param - slow, alpha=0.5))

    def state_dict(self) -> dict[str, Any]:
        slow = {id(key): value for key, value in self.state.items()}
        return {"lookahead": slow, "base": self._base.state_dict()}


# -- what is saved comes back to the bit -------------------------------------------------------------------------------


def job(make: Make, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    return model, make(model)


def train(ckpt: Any, model: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> None:
    for step in ckpt.steps(total):
        optimizer.zero_grad()
        inputs = torch.linspace(-1, step + 1, 6, dtype=model[0].weight.dtype).reshape(2, 3)  # type: ignore[index]

        def backward(inputs: torch.Tensor = inputs) -> None:
            model(inputs).square().mean().backward()

        backward()
        optimizer.step(backward) if isinstance(optimizer, Sam) else optimizer.step()


# What torch's load_state_dict() adds to (a default), and what is no data.
_NOT_COMPARED = {"defaults", "model"} | {name for name in vars(torch.optim.SGD([torch.zeros(1)])) if "hooks" in name}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[bytes, bytes]:
    """All of both, of attributes and of optimizers inside, to the bit."""
    number = {id(param): str(n) for n, param in enumerate(model.parameters())}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.optim.Optimizer | Schedule):
            return {name: plain(each) for name, each in vars(value).items() if name not in _NOT_COMPARED}
        if id(value) in number:
            return number[id(value)]
        if isinstance(value, dict):
            items = [[repr(plain(key)), plain(each)] for key, each in value.items()]
            return {"items": sorted(items, key=lambda item: item[0])}
        return list(map(plain, value)) if isinstance(value, list | tuple) else value

    return typed_json.dumps([[param.detach() for param in model.parameters()], plain(optimizer)])


def differs(folder: Path, make: Make, dtype: torch.dtype = torch.float32, **options: Any) -> bool:
    """Whether a run that was cut at step 3, and resumed with new objects, is another than the one that was not."""

    def run(root: str, total: int, seed: int) -> tuple[bytes, bytes]:
        model, optimizer = job(make, seed, dtype)
        with lwd.attach(model, optimizer, dir=str(folder / root), commit={"on_failure": "raise"}, **options) as ckpt:
            ckpt.restore()
            train(ckpt, model, optimizer, total)
            ckpt.wait(total)
        return everything(model, optimizer)

    whole = run("whole", 6, 0)
    run("cut", 3, 0)
    return run("cut", 6, 1) != whole


def lookahead(kind: type[Lookahead]) -> Make:
    return lambda model: kind(torch.optim.AdamW(model.parameters(), lr=0.1))


def of(kind: Any, **options: Any) -> Make:
    return lambda model: kind(model.parameters(), **options)


SAVED: dict[str, Make] = {
    "a string key": of(InState), "a tensor under a string key": of(TensorInState), "told": of(Told),
    "an object that is told": of(ToldObject), "told by hooks": of(Hooked), "inside": of(Inner),
    "inside, one state": of(Inner, shared="state"), "inside, the same groups": of(Inner, shared="groups"),
    "inside, state and groups": of(Inner, shared="state groups"), "a list": of(Container),
    "inside the inside": lambda model: OwnLookahead(Inner(model.parameters())), "SAM": of(Sam),
    "Lookahead": lookahead(Lookahead), "Lookahead with state": lookahead(OwnLookahead),
}  # fmt: skip


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


# -- the comparison can fail -------------------------------------------------------------------------------------------


def _none(self: Any, *args: Any) -> dict[str, Any]:
    return {}


def _nothing(self: Any, saved: Any) -> bool:
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


# -- what cannot be saved is refused -----------------------------------------------------------------------------------


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
    assert "what its state_dict() tells (['k']) changes" in found and "takes none of it back" in found
    model, optimizer = job(of(Forgetful))
    with lwd.attach(model, optimizer, dir=str(tmp_path / "forgetful")) as ckpt:
        train(ckpt, model, optimizer, 2)
    model, optimizer = job(of(Forgetful))
    with lwd.attach(model, optimizer, dir=str(tmp_path / "forgetful")) as ckpt:
        with pytest.raises(errors.UnsupportedError, match=r"does not tell \['k'\] as it was given"):
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
    assert "Bare has not called torch.optim.Optimizer.__init__()" in refused(tmp_path, lambda model: Bare())


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

    assert "tells ['k', 'at'], and other values at each call" in refused(tmp_path / "0", of(Clock))
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
    with pytest.raises(errors.UnsupportedError, match="the state of a parameter is no dict"):
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
    assert "the checkpoint holds ['k'], which Same's load_state_dict() does not take" in mismatch(told, plain)
    assert "Same's state_dict() tells ['k'], which the checkpoint does not hold" in mismatch(plain, told)
    assert "Same has optimizers inside it (['inner']), this one has others (none)" in mismatch(inside, plain)
    assert "Same has optimizers inside it (none), this one has others (['inner'])" in mismatch(plain, inside)
    assert "shares its state or groups" in mismatch(inside, named(Inner, shared="state"))
    assert "shares its state or groups" in mismatch(named(Inner, shared="groups"), inside)


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
    env = testing.FaultEnv(PosixEnv())
    env.delay("write", "*rank_*", 0.01)
    model = nn.Linear(128, 256)
    optimizer = Sam(model.parameters())
    config = load_config(
        None, dir=str(root), pool_mb=8, fence_timeout_s=5, writer={"queue_depth": 1, "block_kb": 64, "backend": "posix"}
    )
    ckpt = assembly.assemble(model, optimizer, config, LocalTransport(LocalHub(1), 0), env)
    with ckpt:
        for _ in ckpt.steps(6):  # the first ones are written before their boundary is over, since all is audited

            def backward() -> None:
                model(torch.ones(2, 128)).square().mean().backward()

            backward()
            optimizer.step(backward)
            optimizer.zero_grad()
    return int(ckpt.stats()["checkpoints_aborted"])


def test_what_an_optimizer_changes_before_its_closure_is_fenced(tmp_path: Path) -> None:
    assert _lost_on_a_slow_disk(tmp_path) == 0


def test_mutation_a_fence_only_behind_the_closure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
