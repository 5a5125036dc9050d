# SPDX-License-Identifier: Apache-2.0
"""What the variables of a training script hold: objects with a state that no checkpoint has, found by name.

The functions that are under way when the training's forward begins are looked through, those of the user's own files;
in them what is reached by attributes of the user's own classes, and by dicts and lists.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from layerwise_dist.rehearsal import digests

_DEEP, _MANY = 3, 2000
# Whose objects are followed by what attaches them, or are none of a script's.
_FOREIGN = ("layerwise_dist", "deepspeed", "accelerate", "lightning", "pytorch_lightning", "transformers")
VALUE, LOADER = "value", "loader"
_NO_STATE = (str, bytes, type, ModuleType, FrameType, FunctionType, MethodType, BuiltinFunctionType)


class Known:
    """What a checkpoint has: tensors of the model, parameters that an attached optimizer trains, objects in `state`."""

    def __init__(self, tensors: Iterable[int], trained: Iterable[int], objects: Iterable[int]) -> None:
        """All by identity."""
        self.tensors, self.trained, self.objects = frozenset(tensors), frozenset(trained), frozenset(objects)


def look(frame: FrameType | None, known: Known) -> dict[str, dict[str, Any]]:
    """By name of the variable: what kind of thing it is, its class, and a hash of its state; of numbers their text, of
    a loader no hash. Texts are left out: some are secret.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    modules: set[int] = set()
    while frame is not None:
        code = frame.f_code
        if _users_own(code.co_filename):
            where = os.path.basename(code.co_filename)
            within = code.co_name.isidentifier()
            if within:
                _look_at(_locals(frame), f" in {code.co_name}(), {where}", known, found, seen)
            if id(frame.f_globals) not in modules:
                modules.add(id(frame.f_globals))
                _look_at(list(frame.f_globals.items()), f" in {where}", known, found, seen)
        frame = frame.f_back
    return found


def _locals(frame: FrameType) -> list[tuple[str, Any]]:
    """Those of a function. Before Python 3.13 the frame keeps what it gave: an iterator that is over would live on."""
    names = frame.f_locals
    found = list(names.items())
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.gettrace() is None:
        names.clear()
    return found


@functools.cache
def _users_own(file: str) -> bool:
    if file.startswith("<"):
        return file in ("<string>", "<stdin>")
    path = os.path.realpath(file)
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    libraries |= {os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__)}
    below = any(path.startswith(os.path.realpath(each) + os.sep) for each in libraries if each)
    return not below and not {"site-packages", "dist-packages"} & set(path.split(os.sep))


def _look_at(
    items: Any, where: str, known: Known, found: dict[str, dict[str, Any]], seen: set[int], path: str = "",
    depth: int = _DEEP,
) -> None:  # fmt: skip
    for name, value in items:
        if len(found) >= _MANY:
            return
        if isinstance(name, str) and name.startswith("__"):
            continue
        at = f"{path}.{name}" if path else str(name)
        if isinstance(value, bool | int | float):
            found.setdefault(at + where, {"kind": VALUE, "text": repr(value)[:60]})
            continue
        if value is None or isinstance(value, _NO_STATE) or id(value) in seen or _foreign(value):
            continue
        told = None if id(value) in known.objects else _told(value, known)
        if told is not None:
            seen.add(id(value))
            found.setdefault(at + where, told)
        if depth and (inner := _inner(value)):
            seen.add(id(value))
            _look_at(inner, where, known, found, seen, at, depth - 1)


def _foreign(value: Any) -> bool:
    return type(value).__module__.split(".")[0] in _FOREIGN


def _inner(value: Any) -> list[tuple[Any, Any]]:
    """What a thing of the user's own holds."""
    if isinstance(value, dict):
        return [(key, each) for key, each in list(value.items())[:100] if isinstance(key, str | int)]
    if isinstance(value, list | tuple):
        return list(enumerate(value[:100]))
    if isinstance(value, nn.Module | torch.Tensor):
        return []
    module = sys.modules.get(type(value).__module__)
    file = getattr(module, "__file__", None)
    own = type(value).__module__ == "__main__" or (file is not None and _users_own(file))
    return list(vars(value).items()) if own and hasattr(value, "__dict__") else []


def _told(value: Any, known: Known) -> dict[str, Any] | None:
    for kinds, name, state in _KINDS:
        if isinstance(value, kinds):
            return _entry(name, value, functools.partial(state, value, known))
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return _entry("object", value, value.state_dict)
    return None


def _entry(kind: str, value: Any, state: Callable[[], Any]) -> dict[str, Any] | None:
    told = {"kind": kind, "class": type(value).__qualname__}
    if kind == LOADER:
        return told
    try:
        found = digests.of(state())
    except Exception:  # of the object's own code; such an object tells nothing
        return None
    return None if found is None else {**told, "hash": found}


def _model(model: nn.Module, known: Known) -> Any:
    """Of its tensors those that are not attached, and of what it keeps beside them nothing."""
    named: Iterator[tuple[str, torch.Tensor]] = iter([*model.named_parameters(), *model.named_buffers()])
    return {name: tensor for name, tensor in named if id(tensor) not in known.tensors}


def _optimizer(optimizer: torch.optim.Optimizer, known: Known) -> Any:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if all(id(param) in known.trained for param in params):
        return {}  # it is the one that is attached, or a wrapper around that
    groups = [{name: each for name, each in group.items() if name != "params"} for group in optimizer.param_groups]
    return {"groups": groups, "state": [dict(optimizer.state.get(param, {})) for param in params]}


# Of an LR scheduler: what it says of the last step, and warns by. No learning rate is computed from it, and schedules
# that are put back by their `last_epoch` alone, as torchtitan's, come without it.
_REPORTED = frozenset({"_last_lr", "_step_count", "_get_lr_called_within_step", "_is_initial"})


def _schedule(state: Any) -> Any:
    """Also of schedulers within schedulers."""
    if isinstance(state, dict):
        return {name: _schedule(each) for name, each in state.items() if name not in _REPORTED}
    return [_schedule(each) for each in state] if isinstance(state, list | tuple) else state


_KINDS: tuple[tuple[Any, str, Callable[[Any, Known], Any]], ...] = (
    (digests.GENERATORS, "generator", lambda value, known: digests.state_of(value)),
    (nn.Module, "model", _model),
    (torch.optim.Optimizer, "optimizer", _optimizer),
    (LRScheduler, "schedule", lambda value, known: _schedule(value.state_dict())),
    (DataLoader, LOADER, lambda value, known: None),
)


def beside_tensors(root: nn.Module) -> dict[str, str]:
    """What modules of the user's own classes keep in attributes that are neither parameters, buffers nor modules."""
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        if type(module).__module__.split(".")[0] in ("torch", *_FOREIGN):
            continue
        for attribute, value in vars(module).items():
            if attribute in _OF_A_MODULE or len(found) >= _MANY:
                continue
            if (told := digests.of(value)) is not None:
                found[f"{name}.{attribute}".lstrip(".")] = told
    return found


_OF_A_MODULE = frozenset(vars(nn.Module()))
