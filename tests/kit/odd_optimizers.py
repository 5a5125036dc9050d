# SPDX-License-Identifier: Apache-2.0
"""Optimizers that keep state elsewhere than under `state[parameter]`, as people write them; and trainings with one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import layerwise_dist as lwd
from layerwise_dist.storage import typed_json

Make = Callable[[nn.Module], torch.optim.Optimizer]


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
    """Optimizers of parts of the model, in a list, after one `step()`; torchtitan's, but for its state_dict()."""

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
