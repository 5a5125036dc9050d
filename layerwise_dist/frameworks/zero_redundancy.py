# SPDX-License-Identifier: Apache-2.0
"""ZeroRedundancyOptimizer: every rank has all parameters, but each parameter's state is on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.framework import Framework, ParamView
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer
from layerwise_dist.frameworks.unwrapping import unwrap


def is_zero_redundancy(optimizer: object) -> bool:
    """Told by the name: importing the class compiles scripts, takes long, and warns of deprecation."""
    return any(
        base.__name__ == "ZeroRedundancyOptimizer" and base.__module__.startswith("torch.distributed.optim.")
        for base in type(optimizer).__mro__
    )


class ZeroRedundancyAdapter(TorchOptimizer):
    """State is written and read by its owner, whole; parameters go as their wrapper has them go."""

    _opens = False
    whole_only = "it steps its own optimizer on each rank, then broadcasts all parameters"

    def __init__(self, framework: Framework, optimizer: Any) -> None:
        real, _ = unwrap(optimizer)
        if real._overlap_with_ddp:
            raise UnsupportedError(
                "ZeroRedundancyOptimizer with overlap_with_ddp=True updates in DDP's communication hook, where no "
                "step is visible; it works without that option"
            )
        super().__init__(framework, optimizer)
        self.kind = f"ZeroRedundancyOptimizer({type(real.optim).__qualname__})"
        self._nest.refuse_inside("ZeroRedundancyOptimizer")

    @property
    def _sharded(self) -> Any:
        """The ZeroRedundancyOptimizer: of a class that is not imported for its type."""
        return self._optimizer

    def _check(self, names: Mapping[int, str]) -> None:
        super()._check(names)
        owner = self._sharded._param_to_rank
        strays = [param for group in self._optimizer.param_groups for param in group["params"] if param not in owner]
        if strays:
            raise UnsupportedError(
                f"{names[id(strays[0])]} was put into a param group of ZeroRedundancyOptimizer, which assigned it "
                "to no rank and does not update it: use add_param_group(), or build the optimizer again"
            )

    @property
    def views(self) -> list[ParamView]:
        found = super().views  # a group may have been added since
        self._framework.keep_state_whole([view.fqn for view in found])
        return found

    @property
    def trained(self) -> list[ParamView]:
        return self.views  # every update sends all of them around

    @property
    def _keeper(self) -> torch.optim.Optimizer:
        return self._sharded.optim

    @property
    def state_views(self) -> list[ParamView]:
        owner = self._sharded._param_to_rank
        return [view for view in self.views if owner[view.param] == self._sharded.rank]
