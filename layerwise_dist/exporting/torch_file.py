# SPDX-License-Identifier: Apache-2.0
"""One file of `torch.save`: ``{"model": state_dict, "optimizer": state_dict}``, which `torch.load(weights_only=True)`
reads. It is made in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layerwise_dist.exporting.contents import Contents, OptimizerContents
from layerwise_dist.exporting.output import flush, not_what_was_written
from layerwise_dist.reading.tensor import LazyTensor
from layerwise_dist.tensors.values import alike


def write(path: Path, contents: Contents, *, advance: Callable[[int], None]) -> None:
    """Verified: it is read back and compared."""
    model: dict[str, torch.Tensor] = {}
    for weight in contents.weights:
        value = weight.whole()
        model |= dict.fromkeys((weight.key, *weight.tied), value)
        advance(weight.nbytes)
    # Parameters in the order in which the optimizer numbers them, as in a state_dict() of torch's own: whoever has this
    # file alone can tell which number is whose.
    groups = (group for each in contents.optimizers.values() for group in each.groups)
    order = {fqn: at for at, fqn in enumerate(fqn for group in groups for fqn in group["params"])}
    ordered = sorted(model.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    made: dict[str, Any] = {"model": dict(ordered)}
    found = {name: _state_dict(each, advance) for name, each in contents.optimizers.items()}
    if found:
        made["optimizer"] = next(iter(found.values())) if len(found) == 1 else found
    torch.save(made, path)
    flush(path)
    back = torch.load(path, mmap=True, weights_only=True)
    for key in made:
        if not alike(made[key], back[key]):
            raise not_what_was_written(path, key)


def _state_dict(optimizer: OptimizerContents, advance: Callable[[int], None]) -> dict[str, Any]:
    """As `torch.optim.Optimizer.state_dict` has it: parameters by number, in the order of groups."""
    numbers: dict[str, int] = {}
    groups = []
    for group in optimizer.groups:
        for fqn in group["params"]:
            numbers.setdefault(fqn, len(numbers))
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append({**rest, "params": [numbers[fqn] for fqn in group["params"]]})
    state: dict[int, dict[str, Any]] = {}
    for fqn, kinds in optimizer.state.items():
        state[numbers[fqn]] = {kind: _value(value, advance) for kind, value in kinds.items()}
    return {"state": state, "param_groups": groups}


def _value(value: Any, advance: Callable[[int], None]) -> Any:
    if not isinstance(value, LazyTensor):
        return value
    advance(value.nbytes)
    return value[...]
