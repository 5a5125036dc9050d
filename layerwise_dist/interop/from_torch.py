# SPDX-License-Identifier: Apache-2.0
"""Imports files of `torch.save`: a model's `state_dict()`, alone or with an optimizer's and more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.interop.gathered_state import Found, Imported, guess_optimizer

MODEL = ("model", "module", "model_state_dict", "state_dict")
OPTIMIZER = ("optimizer", "optim", "optimizer_state_dict")
STEP = ("step", "global_step", "global_steps", "iteration")


def read(
    source: str, value: Any, *, buffers: Sequence[str], optimizer: str | None, names: Sequence[str] | None
) -> Imported:
    """`value` is what was saved. `optimizer`: its class; `names`: those of the parameters in the order of the
    optimizer's, where the file does not say. Raises UnsupportedError.
    """
    if not isinstance(value, Mapping):
        raise UnsupportedError(f"{source}: holds a {type(value).__name__}, not a state_dict()")
    found = Imported(source)
    model = next((key for key in MODEL if isinstance(value.get(key), Mapping)), None)
    state = value if model is None else value[model]
    if not state or not all(isinstance(key, str) for key in state) or not _has_tensors(state):
        raise UnsupportedError(
            f"{source}: neither it nor a member called {', '.join(MODEL)} is a state_dict() of a model"
        )
    shared: dict[Any, str] = {}
    for fqn, each in state.items():
        if isinstance(each, torch.Tensor) and each.numel():
            memory = each.untyped_storage().data_ptr(), each.storage_offset(), each.shape, each.stride(), each.dtype
            first = shared.setdefault(memory, fqn)
            if first != fqn:
                found.aliases.setdefault(first, []).append(fqn)
                continue
        found.add_model(fqn, each, buffers)
    if model is None:
        return found
    held = next((key for key in OPTIMIZER if isinstance(value.get(key), Mapping)), None)
    if held is not None:
        _optimizer(found, value[held], optimizer, names)
    for key, each in value.items():
        if key not in (model, held):
            found.add_object(str(key), each)
    step = next((value[key] for key in STEP if type(value.get(key)) is int and value[key] >= 0), None)
    found.step = step if step is not None else _steps(found)
    return found


def _has_tensors(state: Mapping[str, Any]) -> bool:
    return any(isinstance(each, (torch.Tensor, Found)) for each in state.values())


def _steps(found: Imported) -> int:
    """As the optimizer has counted, if it has for all alike."""
    counted = {
        int(each.read().item()) for name, each in found.tensors.items() if name.startswith("step/") and not each.shape
    }  # fmt: skip
    counted |= {int(state["step"]) for state in found.scalars.values() if type(state.get("step")) in (int, float)}
    return counted.pop() if len(counted) == 1 else 0


def _optimizer(found: Imported, value: Mapping[str, Any], kind: str | None, names: Sequence[str] | None) -> None:
    groups, state = value.get("param_groups"), value.get("state")
    if (
        not isinstance(groups, list)
        or not isinstance(state, Mapping)
        or not all(isinstance(each, Mapping) and isinstance(each.get("params"), list) for each in groups)
    ):
        raise UnsupportedError(f"{found.source}: its optimizer is not the state_dict() of one of torch's")
    known = _by_name(found, groups, state, names)
    found.groups = [
        {**{key: each for key, each in group.items() if key != "param_names"},
         "params": [known[number] for number in group["params"]]}
        for group in groups
    ]  # fmt: skip
    for number, each in state.items():
        if number not in known:
            raise UnsupportedError(
                f"{found.source}: the optimizer has state of {number!r}, which is in none of its groups"
            )
        if not isinstance(each, Mapping):
            raise UnsupportedError(
                f"{found.source}: the optimizer's state of {known[number]} is a {type(each).__name__}"
            )
        found.add_state(known[number], {str(kind): value for kind, value in each.items()})
    found.optimizer = kind or guess_optimizer(found.groups, found.order.values(), found.source)
    found.tie()
    more = [key for key in value if key not in ("state", "param_groups")]
    if more:
        found.notes.append(f"members of the optimizer that torch's own do not have: {', '.join(map(str, more))}")


def _by_name(
    found: Imported, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], names: Sequence[str] | None
) -> dict[Any, str]:
    """Names of parameters by what the optimizer calls them: numbers, or names already."""
    numbers = [number for group in groups for number in group["params"]]
    if not all(type(number) in (int, str) for number in numbers):
        raise UnsupportedError(f"{found.source}: the optimizer calls its parameters neither by numbers nor by names")
    if len(set(numbers)) != len(numbers):
        raise UnsupportedError(f"{found.source}: the optimizer has a parameter twice")
    params = [name.partition("/")[2] for name in found.tensors if name.startswith("param/")]
    if all(isinstance(number, str) for number in numbers):
        given = [str(number) for number in numbers]
    elif all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        given = [name for group in groups for name in group["param_names"]]
    elif names is not None:
        given = list(names)
    elif len(groups) == 1:
        shapes = [found.tensors[f"param/{name}"].shape for name in params]
        if params == sorted(params) and len(set(shapes)) < len(shapes):
            raise UnsupportedError(
                f"{found.source}: its optimizer numbers its parameters, and the model's names are in alphabetical "
                "order, which may not be its order: give --names FILE, a name a line, in the optimizer's order"
            )
        given = params
        found.notes.append(
            "the file does not name the optimizer's parameters: assuming all of the model's, in its order"
        )
    else:
        raise UnsupportedError(
            f"{found.source}: its optimizer has {len(groups)} groups of numbered parameters, and the file does not say "
            "which is which: give --names FILE, a name a line, in the order of the optimizer's groups"
        )
    if len(given) != len(numbers):
        raise UnsupportedError(
            f"{found.source}: the optimizer has {len(numbers)} parameters, and {len(given)} names are known: give "
            "--names FILE, a name a line, in the order of the optimizer's groups; and --buffer PATTERN for what is "
            "not a parameter"
        )
    if unknown := sorted(set(given) - set(params)):
        raise UnsupportedError(
            f"{found.source}: {', '.join(unknown[:4])} of the optimizer: the model has no such parameter"
        )
    for number, name in zip(numbers, given, strict=True):
        shape = found.tensors[f"param/{name}"].shape
        for kind, each in state.get(number, {}).items():
            tensor = isinstance(each, (torch.Tensor, Found)) and len(each.shape)
            if tensor and tuple(each.shape) != shape and kind.startswith("exp_"):
                raise UnsupportedError(
                    f"{found.source}: {kind} of the optimizer's parameter {number} is {list(each.shape)}, and {name}, "
                    f"which it would be of, {list(shape)}: give --names FILE"
                )
    return dict(zip(numbers, given, strict=True))
