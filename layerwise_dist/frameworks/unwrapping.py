# SPDX-License-Identifier: Apache-2.0
"""Optimizers that are only wrapped around another one (Accelerate's, PostLocalSGDOptimizer, those of mmengine): they
have not called `Optimizer.__init__()`, and the real one is at `.optimizer` or `.optim`. That one is attached. What its
wrappers do after its step, and what they keep themselves, is watched here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.elsewhere import Elsewhere

Optimizer = torch.optim.Optimizer

_PLACES = ("optimizer", "optim")
_THIN = ("accelerate.",)  # their step() calls the real one's or does nothing, and they keep nothing


def is_made(optimizer: object) -> bool:
    """Whether it is an optimizer that has called `Optimizer.__init__()`, so that it has hooks and state."""
    needed = {"state", "param_groups", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
    return isinstance(optimizer, Optimizer) and needed <= vars(optimizer).keys()


def unwrap(optimizer: Any) -> tuple[Any, list[Any]]:
    """The real optimizer, and what is around it, outermost first; itself, and nothing, if there is no real one inside,
    or if it is one itself.
    """
    around: list[Any] = []
    inner = optimizer
    while not is_made(inner):
        if not all(callable(getattr(inner, name, None)) for name in ("step", "zero_grad")):
            return optimizer, []  # a scheduler has an optimizer, too, and is none
        found = {id(each): each for each in (_inside(inner, place) for place in _PLACES) if each is not None}
        around.append(inner)
        if len(found) != 1 or any(id(inner) in found for inner in around):
            return optimizer, []
        (inner,) = found.values()
    return inner, around


def is_thin(wrapper: object) -> bool:
    return f"{type(wrapper).__module__}.".startswith(_THIN)


def scalers_of(around: Iterable[Any]) -> dict[str, torch.amp.GradScaler]:
    """Those that wrappers step by, under the names that people know them by."""
    return {
        f"{type(wrapper).__name__}.{name}": value
        for wrapper in around
        for name, value in getattr(wrapper, "__dict__", {}).items()
        if isinstance(value, torch.amp.GradScaler)
    }


def _inside(wrapper: Any, place: str) -> Any:
    found = getattr(wrapper, place, None)
    return found if hasattr(found, "param_groups") and callable(getattr(found, "step", None)) else None


class Around:
    """What the wrappers of one optimizer keep themselves, by their classes' names: what their `state_dict()` tells
    beyond the optimizer's own. Attributes that change and that it does not tell are refused, as an optimizer's are.
    """

    def __init__(self, wrappers: Sequence[Any], kin: Callable[[], Iterable[Optimizer]]) -> None:
        """`kin` are the optimizer and those inside it, whose state is captured anyway. Raises UnsupportedError."""
        self._parts: dict[str, Elsewhere] = {}
        for wrapper in wrappers:
            kind = type(wrapper).__qualname__
            if kind in self._parts:
                raise UnsupportedError(f"a {kind} around another {kind}: one of them is too many")
            self._parts[kind] = Elsewhere(kind, wrapper, kin, keyed=False)

    def remember(self) -> None:
        for part in self._parts.values():
            part.remember()

    def describe(self) -> dict[str, Any]:
        """Empty for wrappers that keep nothing, so that the checkpoint is the same without them."""
        found = {kind: part.describe() for kind, part in self._parts.items()}
        return {kind: each for kind, each in found.items() if each}

    def check(self, saved: Mapping[str, Any]) -> list[str]:
        problems = [
            f"the checkpoint's {saved['class']} was inside a {kind}, and it holds {[*each.get('told', {})]}; here "
            "there is none around it"
            for kind, each in saved.get("around", {}).items()
            if kind not in self._parts
        ]
        for kind, part in self._parts.items():
            problems += part.check(saved.get("around", {}).get(kind, {}))
        return problems

    def put(self, saved: Mapping[str, Any]) -> bool:
        """Whether a `load_state_dict()` was called, which loads the optimizer's state as well, and casts it."""
        there = saved.get("around", {})
        return any([part.put(there.get(kind, {})) for kind, part in self._parts.items()])

    def confirm(self, saved: Mapping[str, Any]) -> None:
        for kind, part in self._parts.items():
            part.confirm(saved.get("around", {}).get(kind, {}))


class Steps:
    """Calls of a wrapper's `step()`: what it changes before and after the optimizer's own belongs to the update.

    From the constructor until `detach`. Its `step` is replaced on the instance, since hooks are the class's.
    """

    def __init__(self, wrapper: Any, begins: Callable[[], None], ends: Callable[[bool], None]) -> None:
        """`ends(whole)` says whether it returned. Raises UnsupportedError."""
        self._wrapper, self._begins, self._ends = wrapper, begins, ends
        self._before = vars(wrapper).get("step") if hasattr(wrapper, "__dict__") else None
        plain, self._open = wrapper.step, True

        @functools.wraps(plain)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(plain, args, kwargs) if self._open else plain(*args, **kwargs)

        self._step = types.MethodType(step, wrapper)  # schedulers ask for its __func__
        try:
            wrapper.step = self._step
        except AttributeError as error:
            kind = type(wrapper).__name__
            raise UnsupportedError(
                f"{kind}: calls of its step() cannot be seen ({error}), so what it does after the optimizer's "
                f"own would be missed: attach the optimizer inside it, if {kind} does nothing there"
            ) from error

    def _run(self, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._begins()
        whole = False
        try:
            result = plain(*args, **kwargs)
            whole = True
        finally:
            if not whole:
                self._ends(False)
        self._ends(True)
        return result

    def detach(self) -> None:
        """Puts its `step` back, unless somebody has put another around it since; then it calls what it did before."""
        self._open = False
        if vars(self._wrapper).get("step") is self._step:
            if self._before is None:
                del self._wrapper.step
            else:
                self._wrapper.step = self._before
