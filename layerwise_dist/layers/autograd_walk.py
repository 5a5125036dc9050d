# SPDX-License-Identifier: Apache-2.0
"""In which order, and along which data, one backward of a loss would make gradients ready, without running it.

torch's engine takes, of the nodes whose inputs are complete, the one that was made last (`Node._sequence_nr`), and
accumulations into parameters before anything else. The walk does the same with a heap, so its order is the engine's.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError

# What stands between an operation and its parameter: another layout or dtype of the same numbers.
_OF_A_PARAMETER = frozenset(
    f"{name}Backward0"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand", "Clone",
        "ToCopy", "Alias",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """`order`: parameters' names, first ready first. `edges`: pairs of layers (earlier, later)."""

    order: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]


def walk(loss: torch.Tensor, names: Mapping[int, str], layer_of: Mapping[str, str]) -> Walk:
    """Walks the graph behind `loss` (any shape, with a grad_fn).

    Args:
        names: `id(parameter)` to its name; other leaves are passed by.
        layer_of: a parameter's name to its layer.

    Returns:
        The order of all named parameters that the loss reaches, and the edges: one from B to A when A's gradient is
        computed from what passed the last use of B in the backward, and no other layer's last use lies between. A
        layer that is used more than once is an edge's start only where its gradient becomes final, so there is no
        cycle.

    Raises:
        UnsupportedError: the loss has no graph.
    """
    if loss.grad_fn is None:
        raise UnsupportedError(
            "the loss has no autograd graph: it must come from a forward with gradients enabled, before its backward()"
        )
    ran = _run(loss.grad_fn)
    order, uses = [], _uses(ran, names)
    for node in ran:
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            order.append(name)
    last: dict[str, Any] = {}
    owners: dict[Any, list[str]] = {}
    for node in ran:
        for layer in dict.fromkeys(layer_of[name] for name in uses.get(node, ())):
            owners.setdefault(node, []).append(layer)
            last[layer] = node
    return Walk(tuple(order), tuple(_edges(ran, owners, last)))


def _run(start: Any) -> list[Any]:
    """Every node, in the engine's order."""
    waiting: dict[Any, int] = {start: 0}
    stack = [start]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                if child not in waiting:
                    waiting[child] = 0
                    stack.append(child)
                waiting[child] += 1
    ran: list[Any] = []
    pushed = 0
    heap: list[tuple[int, int, Any]] = [(0, 0, start)]
    while heap:
        node = heapq.heappop(heap)[2]
        ran.append(node)
        for child, _ in node.next_functions:
            if child is not None:
                waiting[child] -= 1
                if waiting[child] == 0:
                    pushed += 1
                    # AccumulateGrad nodes have the largest number there is, so they come first, in the order pushed.
                    heapq.heappush(heap, (-child._sequence_nr(), pushed, child))
    return ran


def _uses(ran: list[Any], names: Mapping[int, str]) -> dict[Any, list[str]]:
    """Which parameters each operation uses, their own transposes and casts looked through."""
    behind: dict[Any, str] = {}
    uses: dict[Any, list[str]] = {}
    for node in reversed(ran):  # children run after their parents
        if hasattr(node, "variable"):
            if id(node.variable) in names:
                behind[node] = names[id(node.variable)]
            continue
        found = [behind[child] for child, _ in node.next_functions if child in behind]
        if found and len(node.next_functions) == 1 and node.name() in _OF_A_PARAMETER:
            behind[node] = found[0]
        elif found:
            uses[node] = found
    return uses


def _edges(ran: list[Any], owners: Mapping[Any, list[str]], last: Mapping[str, Any]) -> list[tuple[str, str]]:
    came: dict[Any, set[str]] = {}
    edges: dict[tuple[str, str], None] = {}
    for node in ran:
        sources = came.pop(node, set())
        mine = owners.get(node, ())
        for layer in mine:
            edges.update(dict.fromkeys((source, layer) for source in sorted(sources) if source != layer))
        leaves = {layer for layer in mine if last[layer] is node} or sources
        for child, _ in node.next_functions:
            if child is not None:
                came.setdefault(child, set()).update(leaves)
    return list(edges)
