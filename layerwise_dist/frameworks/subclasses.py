# SPDX-License-Identifier: Apache-2.0
"""Tensor subclasses that have no memory of their own but stand for other tensors: saved and restored as those.

torchao's quantized optimizer state is of that kind, and its NF4 parameters. `__tensor_flatten__` of such a tensor names
what is inside it and gives a context; `__tensor_unflatten__` makes the same tensor of both. Here the tensors inside get
names of their own (``exp_avg::codes``; one level more for each subclass inside a subclass), and all else a description
under ``exp_avg::``, which is a scalar of the optimizer's state to everybody else. A parameter is never rebuilt: its
description is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.contents import Contents
from layerwise_dist.frameworks.described import Standing
from layerwise_dist.frameworks.made_mapping import MadeMapping

MARK = "::"
_DESCRIBED = {"class", "inner", "context", "size", "stride", "nested"}


@functools.cache
def _flattens(kind: type) -> bool:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type  # private: not at our import

    return is_traceable_wrapper_subclass_type(kind) and not issubclass(kind, DTensor)


def stands_for_others(value: object) -> bool:
    """Whether it is a tensor without memory of its own that can tell what it stands for. DTensors are not meant."""
    kind: Any = type(value)
    return _flattens(kind)


def describe(tensor: Any, told: Callable[[Any], Any] = lambda context: context) -> Standing:
    """All that `_build` needs beside the tensors inside `tensor`, which stands for them.

    `told(context)` is what is said of each context.
    """
    names, context = tensor.__tensor_flatten__()
    kind = type(tensor)
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "inner": list(names),
        "context": told(context),
        "size": list(tensor.shape),
        "stride": list(tensor.stride()),
        "nested": {name: describe(inner, told) for name in names if stands_for_others(inner := getattr(tensor, name))},
    }


def describe_param(param: Any) -> Standing:
    """What must be alike for a restore to fill a parameter. It is not rebuilt, so its context need only be told."""
    return describe(param, _told)


def _told(context: Any) -> Any:
    """Without devices, which may be others in another process, and with the fields of dataclasses and named tuples."""
    if isinstance(context, torch.device):
        return "a device"
    if dataclasses.is_dataclass(context) and not isinstance(context, type):
        fields = {field.name: _told(getattr(context, field.name)) for field in dataclasses.fields(context)}
        return {"of": type(context).__qualname__, **fields}
    if isinstance(context, tuple) and hasattr(context, "_asdict"):
        return {"of": type(context).__qualname__, **{name: _told(each) for name, each in context._asdict().items()}}
    if type(context) in (list, tuple):
        return type(context)(map(_told, context))
    if type(context) is dict:
        return {name: _told(each) for name, each in context.items()}
    return context


def unlike(views: Sequence[Any], saved: Mapping[str, Any]) -> list[str]:
    """Which parameters that stand for others (`ParamView`s) are not of the kind that was saved."""
    return [
        f"parameter {view.fqn} is a {type(view.param).__name__} of another kind than the checkpoint's: "
        f"{_first_difference(describe_param(view.param), saved[view.fqn])}"
        for view in views
        if view.fqn in saved and not same(describe_param(view.param), saved[view.fqn])
    ]


def _first_difference(here: Any, there: Any) -> str:
    if not isinstance(there, dict):
        return f"{there!r} is there"
    name = next((name for name in here if name not in there or not same(here[name], there[name])), "class")
    return f"{name} is {here[name]!r} here and {there.get(name)!r} there"


def inside(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with memory in it, under their names."""
    for inner in tensor.__tensor_flatten__()[0]:
        value = getattr(tensor, inner)
        if stands_for_others(value):
            yield from inside(f"{name}{MARK}{inner}", value)
        else:
            yield f"{name}{MARK}{inner}", value


def is_description(name: str, value: object) -> bool:
    return name.endswith(MARK) and isinstance(value, dict) and value.keys() == _DESCRIBED


class OpenedState(MadeMapping):
    """A parameter's state as it is now, with the tensors inside in place of those that stand for them."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state

    def _now(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in self.state.items():
            if isinstance(name, str) and MARK in name:
                raise UnsupportedError(
                    f"the optimizer keeps state under {name!r} beside tensors that stand for others, whose parts have "
                    "such names"
                )
            if stands_for_others(value):
                found |= {f"{name}{MARK}": describe(value), **dict(inside(name, value))}
            else:
                found[name] = value
        return found

    def __getitem__(self, name: str) -> Any:
        outer, mark, inner = name.partition(MARK)
        if mark and not inner and stands_for_others(self.state.get(outer)):
            return describe(self.state[outer])
        if not mark and not stands_for_others(value := self.state[name]):
            return value
        return self._now()[name]


class Opener:
    """States by parameter, opened where that is needed: the same object for the same dict, since identities are
    compared.
    """

    def __init__(self) -> None:
        self._made: dict[int, OpenedState] = {}
        self._plain: Contents | None = None  # of states in which nothing stood for others

    def __call__(self, states: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        if self._plain is not None:
            others = self._plain.others(states)
            if others is not None and not any(stands_for_others(value) for _, value in others):
                return states
        held = Contents(states)
        if not any(map(_flattens, {*map(type, held.values)})):
            self._plain = held
            return states
        self._plain = None
        before, self._made = self._made, {}
        found: list[Mapping[str, Any]] = []
        for state in states:
            if any(map(stands_for_others, state.values())):
                flat = before.get(id(state))
                flat = flat if flat is not None and flat.state is state else OpenedState(state)
                self._made[id(state)] = flat
                found.append(flat)
            else:
                found.append(state)
        return found


def live_inner(get: Callable[[str], Any], name: str) -> Any:
    """What is there now under a flattened name, by `get` of unflattened ones; None if nothing with memory is."""
    value = get(name)
    if value is None and MARK in name:
        outer, *path = name.split(MARK)
        value = get(outer)
        for inner in path:
            if not stands_for_others(value) or inner not in value.__tensor_flatten__()[0]:
                return None
            value = getattr(value, inner)
    return None if stands_for_others(value) else value


def put_together(flat: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """The state that was flattened; of `live`, what is alike and has the very same tensors inside, stays."""
    made: dict[str, Any] = {}
    for name, value in flat.items():
        outer, mark, _ = name.partition(MARK)
        description = flat.get(f"{outer}{MARK}")
        if not mark or description is None or not is_description(f"{outer}{MARK}", description):
            made[name] = value
        elif outer not in made:
            made[outer] = _build(outer, description, flat, live.get(outer))
    return made


def _build(name: str, description: Mapping[str, Any], flat: Mapping[str, Any], live: Any) -> torch.Tensor:
    alike = stands_for_others(live) and same(describe(live), description)
    if alike and all(flat.get(path) is inner for path, inner in inside(name, live)):
        return live
    nested = description["nested"]
    inner = {
        each: _build(f"{name}{MARK}{each}", nested[each], flat, None) if each in nested else flat[f"{name}{MARK}{each}"]
        for each in description["inner"]
    }
    kind = _class_of(description)
    assert kind is not None  # see `unmakable`
    size, stride = torch.Size(description["size"]), tuple(description["stride"])
    return kind.__tensor_unflatten__(inner, description["context"], size, stride)


def unmakable(scalars: Mapping[str, Mapping[str, Any]], order: Mapping[str, Sequence[str]]) -> list[str]:
    """What of saved descriptions cannot be put together in this process. Nothing is imported for them."""
    found: dict[str, None] = {}
    for fqn, each in scalars.items():
        for name, value in each.items():
            if is_description(name, value):
                found |= dict.fromkeys(_problems(name.removesuffix(MARK), value, fqn, order.get(fqn, ())))
    return list(found)


def _problems(name: str, description: Any, fqn: str, there: Sequence[str]) -> Iterator[str]:
    if not _is_sound(description):
        yield f"the checkpoint's state {name} of {fqn} stands for other tensors, and does not say how"
        return
    if _class_of(description) is None:
        yield (
            f"the checkpoint's state has tensors of a class {description['class']}, which is not there: import it "
            "before restore()"
        )
        return
    for inner in description["inner"]:
        path = f"{name}{MARK}{inner}"
        if inner in description["nested"]:
            yield from _problems(path, description["nested"][inner], fqn, there)
        elif path not in there:
            yield f"the checkpoint's state {name} of {fqn} lacks its {inner}"


def _is_sound(description: Any) -> bool:
    return (
        isinstance(description, dict)
        and description.keys() == _DESCRIBED
        and isinstance(description["class"], str)
        and isinstance(description["nested"], dict)
        and isinstance(description["inner"], list)
        and all(isinstance(each, str) for each in description["inner"])
        and all(
            isinstance(sizes, list) and all(type(each) is int and each >= 0 for each in sizes)
            for sizes in (description["size"], description["stride"])
        )
    )


def _class_of(description: Mapping[str, Any]) -> Any:
    """The class, if its module is imported and it is one of these tensors; else None."""
    module, _, qualname = description["class"].partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, torch.Tensor) and _flattens(found) else None


def same(one: Any, other: Any) -> bool:
    """Equal, and of equal types all through."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
