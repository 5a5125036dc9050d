# SPDX-License-Identifier: Apache-2.0
"""LayeredOptimizer: a torch optimizer that reports its updates layer by layer, as `update` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import UpdateEvents
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer, found_inf
from layerwise_dist.frameworks.unwrapping import is_thin
from layerwise_dist.layers.exact import Mode, check_layered
from layerwise_dist.layers.graph import ROOT
from layerwise_dist.layers.optimizer import LayerwiseOptimizer


class LayeredOptimizer(TorchOptimizer):
    """An update goes by layers where the engine wants it to: a step that is saved, or that would otherwise wait for the
    disk. All others are the optimizer's own, as is one with a closure or one that a GradScaler skips.
    """

    def __init__(self, framework: Framework, optimizer: object, mode: Mode) -> None:
        """Raises UnsupportedError for an optimizer or wrapper that `mode` is not exact with."""
        self._mode: Mode = mode
        self._layerwise: LayerwiseOptimizer | None = None
        super().__init__(framework, optimizer)
        if thick := next((each for each in self._around if not is_thin(each)), None):
            raise UnsupportedError(
                f"update = {mode!r}: {type(thick).__name__} may change parameters after its optimizer's step, when "
                "layers are captured already; use update = 'whole'"
            )
        check_layered(self._optimizer, framework.root, mode, framework.params)
        self._by_layers: bool | None = None  # this update; None before it began
        self._order: tuple[Any, list[str]] = (None, [])

    @property
    def layer_order(self) -> Sequence[str]:
        """As it was observed in the first iteration."""
        graph = self._layerwise.graph if self._layerwise is not None else None
        if graph is None or graph.source != "observed":
            return ()
        if self._order[0] is not graph.fires:
            self._order = graph.fires, [_layer(name) for name in graph.get_update_order()]
        return self._order[1]

    def _check(self, names: Mapping[int, str]) -> None:
        super()._check(names)
        known = {id(view.param): view.fqn for view in self._layerwise.graph.views} if self._layerwise else names
        held = [id(param) for group in self._optimizer.param_groups for param in group["params"]]
        if strays := [names[each] for each in held if known.get(each) != names[each]]:
            raise UnsupportedError(
                f"update = {self._mode!r}: {strays[0]} came after attach(), and is not in the order of layers: use "
                "update = 'whole', or close() and attach() again"
            )

    def watch(self, events: UpdateEvents) -> None:
        super().watch(events)
        # After this adapter's own hooks, since the layered update is done in the last of them.
        self._layerwise = LayerwiseOptimizer(
            self._optimizer, self._framework.root, mode=self._mode, active=self._active,
            before_layer=lambda layer, _: events.overwriting([_layer(layer)]),
            after_layer=lambda layer, _: events.updated([_layer(layer)]),
        )  # fmt: skip

    def detach(self) -> None:
        if self._layerwise is not None:
            self._layerwise.detach()
            self._layerwise = None
        super().detach()

    def _active(self) -> bool:
        """Asked at an iteration's first gradient (in_backward), or in its step, after `_before`."""
        if self._by_layers is None:
            self._by_layers = self._events.wants_layers()
            if self._by_layers:
                self._events.update_starting()
        return self._by_layers

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None or found_inf(optimizer):
            self._by_layers = self._by_layers or False
        if not self._active():
            return super()._before(optimizer, args, kwargs)
        return None

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._by_layers = None
        super()._after(optimizer, args, kwargs)


def _layer(name: str) -> str:
    """The frameworks' name of a layer; theirs of the model's own parameters is empty."""
    return "" if name == ROOT else name
