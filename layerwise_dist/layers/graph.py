# SPDX-License-Identifier: Apache-2.0
"""Stage 1: which layers a model has, and in which order their gradients become ready.

A layer is what one module owns directly: its own parameters, not its children's. Its gradient is ready when the last of
its parameters' is. docs/rooms/layers.md says how to use it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from layerwise_dist.errors import BoundaryError, UnsupportedError
from layerwise_dist.frameworks.framework import Framework, ParamView
from layerwise_dist.layers.autograd_walk import Walk, walk
from layerwise_dist.layers.gradients import Arrivals
from layerwise_dist.layers.wrapper_gradients import watch

if TYPE_CHECKING:
    import networkx

ROOT = "(root)"  # the layer of parameters that the model itself owns; no module's name has parentheses

Source = Literal["observed", "autograd", "modules"]


@dataclass(frozen=True)
class LayerInfo:
    """One layer. Shapes, counts and sizes are of the whole parameters, also where this rank holds a shard of them.

    Attributes:
        name: the module's name without wrappers' parts; `(root)` for the model itself.
        parameters: names of its parameters, each tensor once, in the module's order.
        numel: elements in all of them.
        nbytes: their size in bytes.
        dtypes: their dtypes, such as ``("torch.float32",)``, sorted.
        aliases: for each tied parameter, the other names of the same tensor, in this layer or another.
        trainable: whether any of them requires a gradient.
    """

    name: str
    parameters: tuple[str, ...]
    numel: int
    nbytes: int
    dtypes: tuple[str, ...]
    aliases: dict[str, tuple[str, ...]]
    trainable: bool


class Observation:
    """What `DependencyGraphBuilder.observe()` returns: watches from `with` to its end.

    Attributes:
        fires: how often each trainable parameter's gradient was accumulated; 0 for one that was not reached.
    """

    def __init__(self, builder: DependencyGraphBuilder) -> None:
        self._builder = builder
        self._arrivals: Arrivals | None = None
        self.fires: dict[str, int] = {}

    def __enter__(self) -> Observation:
        if self._arrivals is not None:
            raise BoundaryError("this observation is already running: one `with` at a time")
        params = {view.fqn: view.param for view in self._builder.views if view.param.requires_grad}
        self._arrivals = watch(self._builder.model, params)
        self.fires = self._arrivals.fires
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        arrivals, self._arrivals = self._arrivals, None
        assert arrivals is not None, "__enter__() comes first"
        order = arrivals.order
        arrivals.remove()
        if kind is not None:
            return
        if not order:
            raise BoundaryError("no gradient arrived while observe() was on: run one whole iteration inside the `with`")
        self._builder.record(order, self.fires)


class DependencyGraphBuilder:
    """Layers of `model` as nodes of a directed graph, in the order in which their gradients become ready.

    The order comes from the best source so far, and `source` says which:

    1. ``observed``: what `observe()` saw in a real backward;
    2. ``autograd``: the graph behind a loss, given to `build_dependency_graph`;
    3. ``modules``: the reversed order in which modules were registered. A guess, wrong where a layer is registered
       elsewhere than it is used (tied embeddings, for one).

    Names are those of the model without DDP, FSDP, `torch.compile` and activation checkpointing around it.
    Frozen layers are nodes, and not in the order. Trainable layers that the source did not see come last.

    Attributes:
        model: as it was given.
        views: every parameter once, with its clean name, its layer and its aliases.
        layer_info: `LayerInfo` by the layer's name, in the model's order.
        layer_of: a parameter's name to its layer's.
        fires: how often each parameter's gradient was accumulated in the observation, by name; empty before it.

    Raises:
        UnsupportedError: a parameter on the meta device, or two with one name once wrappers' parts are removed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.views: Sequence[ParamView] = Framework(model, 0, 1).params
        self.layer_info = _layers(self.views)
        self.fires: dict[str, int] = {}
        self.layer_of = {view.fqn: view.layer or ROOT for view in self.views}
        self._seen: list[str] | None = None
        self._walk: Walk | None = None

    @property
    def source(self) -> Source:
        """Where the order comes from."""
        if self._seen is not None:
            return "observed"
        return "modules" if self._walk is None else "autograd"

    def observe(self) -> Observation:
        """Watches one iteration: ``with builder.observe(): loss.backward()``.

        Several backwards inside count as one iteration: what counts is each gradient's last arrival. Under DDP
        gradients are seen before they are reduced, under FSDP2 after the reduction. Leaving the `with` raises
        BoundaryError if no gradient arrived; an exception inside it leaves the builder as it was.
        """
        return Observation(self)

    def build_dependency_graph(self, loss: torch.Tensor | None = None) -> networkx.DiGraph[str]:
        """The graph; with `loss` (before its backward) the order and the edges are read off its autograd graph first.

        Nodes carry `position` (in the update order; None for frozen layers) and `info` (LayerInfo). Edges go from the
        layer that is ready earlier. With a walked loss they are data: A's gradient is computed from what went through
        B's last use, with no other layer in between, so a shortcut shows as a second edge. Otherwise they are a chain.
        `graph.graph["source"]` and `graph.graph["edges"]` ("data" or "chain") say so.

        Raises:
            UnsupportedError: the loss has no graph, or reaches no parameter of this model (FSDP2, reentrant
                checkpointing around all of it): use `observe()`.
        """
        import networkx  # a tenth of a second of each start, of jobs that do not ask for a graph

        if loss is not None:
            names = {id(view.param): view.fqn for view in self.views}
            found = walk(loss, names, self.layer_of)
            if not found.order:
                raise UnsupportedError(
                    "the loss reaches no parameter of this model; FSDP2 and reentrant activation checkpointing hide "
                    "them from the autograd graph: use `with builder.observe():` around one iteration instead"
                )
            self._walk = found
        order = self.get_update_order()
        position = {layer: index for index, layer in enumerate(order)}
        edges = "chain" if self._walk is None else "data"
        graph: networkx.DiGraph[str] = networkx.DiGraph(source=self.source, edges=edges)
        for layer in [*order, *(name for name in self.layer_info if name not in position)]:
            graph.add_node(layer, position=position.get(layer), info=self.layer_info[layer])
        graph.add_edges_from(zip(order, order[1:], strict=False) if self._walk is None else self._walk.edges)
        return graph

    @property
    def gradient_order(self) -> list[str]:
        """Parameters by name, in the order in which their gradients arrive; only those that the source saw."""
        if self._seen is not None:
            return list(self._seen)
        return list(self._walk.order) if self._walk is not None else []

    def get_update_order(self) -> list[str]:
        """Trainable layers, first ready first: ``['fc', 'layer2.conv2', 'layer2.conv1', ...]``."""
        trainable = [name for name, info in self.layer_info.items() if info.trainable]
        last = dict.fromkeys(self.layer_of[fqn] for fqn in reversed(self.gradient_order))
        return [*reversed(last), *(layer for layer in reversed(trainable) if layer not in last)]

    def group_parameters_by_layer(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter, each in exactly one layer: layers in the update order, frozen ones last."""
        order = self.get_update_order()
        groups: dict[str, list[nn.Parameter]] = {layer: [] for layer in dict.fromkeys([*order, *self.layer_info])}
        for view in self.views:
            groups[self.layer_of[view.fqn]].append(view.param)
        return groups

    def visualize_graph(self, path: str | os.PathLike[str]) -> None:
        """Draws the graph into `path`: .png, .svg or .pdf. Layers stand in the update order, top to bottom.

        Raises:
            ConfigError: another suffix.
            UnsupportedError: matplotlib is not installed (``pip install 'layerwise_dist[viz]'``).
        """
        from layerwise_dist.layers.picture import draw

        draw(self.build_dependency_graph(), path)

    def record(self, order: Sequence[str], fires: Mapping[str, int]) -> None:
        """Takes an observation made by someone else: parameters' names by last arrival, and how often each arrived."""
        self._seen, self.fires = list(order), dict(fires)


def _layers(views: Sequence[ParamView]) -> dict[str, LayerInfo]:
    groups: dict[str, list[ParamView]] = {}
    for view in views:
        groups.setdefault(view.layer or ROOT, []).append(view)
    return {
        name: LayerInfo(
            name,
            tuple(view.fqn for view in group),
            sum(view.param.numel() for view in group),
            sum(view.param.numel() * view.param.element_size() for view in group),
            tuple(sorted({str(view.param.dtype) for view in group})),
            {view.fqn: view.aliases for view in group if view.aliases},
            any(view.param.requires_grad for view in group),
        )
        for name, group in groups.items()
    }
