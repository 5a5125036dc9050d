# SPDX-License-Identifier: Apache-2.0
"""An optimizer's own step on some of its parameters, with the kernels that it would use for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.private_names import require
from layerwise_dist.frameworks.zero_redundancy import ZeroRedundancyAdapter, is_zero_redundancy

# Those that keep everything they know about a parameter in its own state, and nothing that counts in the group.
_TORCH = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD", "SparseAdam",
)  # fmt: skip
_KNOWN = frozenset(
    {f"{kind.__module__}.{kind.__qualname__}" for kind in (getattr(torch.optim, name) for name in _TORCH)}
    | {"transformers.optimization.Adafactor"}
)


class SubsetStep:
    """Steps subsets of `optimizer`'s parameters; each parameter once makes one step of the optimizer, bit for bit.

    Raises:
        UnsupportedError: an optimizer that is not known to keep all its state by parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        if kind not in _KNOWN:
            why = (
                ZeroRedundancyAdapter.whole_only
                if is_zero_redundancy(optimizer)
                else "it evaluates a closure several times and its state spans all parameters"
                if isinstance(optimizer, torch.optim.LBFGS)
                else "it may keep state in its groups or across parameters"
            )
            raise UnsupportedError(
                f"{kind} cannot be stepped one layer at a time: {why}. What works: torch.optim's "
                f"{', '.join(_TORCH)}, and transformers' Adafactor"
            )
        require("updates layer by layer")
        self._optimizer = optimizer

    def pins(self, subset: Sequence[Sequence[nn.Parameter]]) -> list[dict[str, bool]]:
        """What each group must be told so that a part of it uses the kernels that the whole of it does.

        Args:
            subset: for each group, those of its parameters that have a gradient in this step.
        """
        return [self._pin(group, part) for group, part in zip(self._optimizer.param_groups, subset, strict=True)]

    def _pin(self, group: dict[str, Any], params: Sequence[nn.Parameter]) -> dict[str, bool]:
        # torch looks at the list only if neither was asked for; its Adafactor never does.
        if group.get("foreach", False) is not None or group.get("fused") is not None:
            return {}
        if isinstance(self._optimizer, torch.optim.Adafactor):
            return {}
        from torch.optim.optimizer import _default_to_fused_or_foreach  # private: not at our import

        foreach = _default_to_fused_or_foreach(list(params), group.get("differentiable", False), False)[1]
        if isinstance(self._optimizer, torch.optim.Adam) and isinstance(group["lr"], torch.Tensor):
            foreach = foreach and group["capturable"]
        return {"foreach": foreach}

    def step(self, subset: Sequence[Sequence[nn.Parameter]], pins: Sequence[dict[str, bool]]) -> None:
        """One step of `subset` (for each group, some of its parameters), without the optimizer's step hooks."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        optimizer.param_groups = [
            {**group, **pin, "params": list(part)}
            for group, pin, part in zip(groups, pins, subset, strict=True)
            if part
        ]
        try:
            # What is wrapped is the step without its hooks and with its own grad mode.
            step: Any = type(optimizer).step
            step.__wrapped__(optimizer)
        finally:
            optimizer.param_groups = groups
