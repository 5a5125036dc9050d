# SPDX-License-Identifier: Apache-2.0
"""What this process's open engines are attached to. No two share anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from layerwise_dist.frameworks import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.overlaps import overlaps


class _Param(NamedTuple):
    fqn: str
    memory: torch.Tensor
    trained: bool


class Holdings:
    """Of one engine: the models that it hooks, the parameters that it saves and those that it trains, optimizers and
    loaders. Asked for when they are compared, since parameters come and go.
    """

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, loaders: Mapping[str, DataLoader[Any]]
    ) -> None:
        self._framework, self._optimizer, self._loaders = framework, optimizer, dict(loaders)

    def common(self, other: Holdings) -> str:
        """What both have, in words; empty if there is nothing.

        Each would save what the other fences, and count the other's iterations; a parameter that one trains changes
        while the other reads it.
        """
        return (
            self._common_model(other)
            or self._common_optimizer(other)
            or self._common_loader(other)
            or self._common_param(other)
        )

    def _common_model(self, other: Holdings) -> str:
        mine = {id(module) for root in self._framework.roots for module in root.modules()}
        for module in (module for root in other._framework.roots for module in root.modules()):
            if id(module) in mine:
                return f"this model, or a part of it ({type(module).__name__}),"
        return ""

    def _common_optimizer(self, other: Holdings) -> str:
        mine = {id(each) for each in self._optimizer.optimizers}
        found = next((each for each in other._optimizer.optimizers if id(each) in mine), None)
        return "" if found is None else f"this optimizer ({type(found).__name__})"

    def _common_loader(self, other: Holdings) -> str:
        theirs = {id(loader): name for name, loader in other._loaders.items()}
        for name, loader in self._loaders.items():
            if id(loader) in theirs:
                return f"the loader state[{name!r}], there as {theirs[id(loader)]!r},"
        return ""

    def _common_param(self, other: Holdings) -> str:
        """Memory, not objects: `a.data = b.data` makes two parameters of one."""
        mine, theirs = self._params(), other._params()
        both = [*mine, *theirs]
        for pair in overlaps([each.memory for each in both]):
            one, two = sorted(pair)
            if one < len(mine) <= two and (both[one].trained or both[two].trained):
                return f"the memory of parameter {both[one].fqn}, there of {both[two].fqn}, which is trained and"
        return ""

    def _params(self) -> list[_Param]:
        framework = self._framework
        if framework.swapped:
            return []  # in memory during updates only; such engines have models of their own
        trained = {id(view.param) for view in self._optimizer.trained}
        return [_Param(v.fqn, framework.local(v.param), id(v.param) in trained) for v in framework.params]
