"""What there is to capture now: every tensor of model and optimizer that this rank writes, layer by layer."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from layerwise_dist.errors import ConfigError, UnsupportedError
from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.pieces import Layer, Piece, dtype_code
from layerwise_dist.slices import Slice
from layerwise_dist.storage.shard import PACK_BELOW, Source

# Extent of everything that is copied at the boundary. No module's name can clash: it has no layer's place in the tree.
BOUNDARY_LAYER = "(boundary)"


@dataclass(frozen=True)
class Survey:
    """`layers` are captured from the update on, by lease or by staging; `copied` pieces are copied at the boundary.

    `key` changes exactly when a new layout is needed: a tensor came, went, moved, or changed its shape or dtype.
    `order` names each parameter's state in the optimizer's order, `scalars` (fqn, name, the state's dict) what of it is
    no tensor. `extra_states` are the modules with `get_extra_state()`. The lists run over all pieces of all layers:
    computed once, used at every checkpoint.
    """

    layers: tuple[Layer, ...]
    copied: tuple[Piece, ...]
    order: dict[str, list[str]]
    scalars: tuple[tuple[str, str, Mapping[str, Any]], ...]
    extra_states: list[tuple[str, torch.nn.Module]]
    key: tuple[Any, ...]

    @cached_property
    def pieces(self) -> list[Piece]:
        return [piece for layer in self.layers for piece in layer.pieces]

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        return [piece.tensor for piece in self.pieces]

    @cached_property
    def extents(self) -> list[int]:
        """Of each piece, the number of its layer."""
        return [number for number, layer in enumerate(self.layers) for _ in layer.pieces]

    @cached_property
    def leased(self) -> list[bool]:
        """Of each piece, whether it is read in place."""
        return [not layer.staged for layer in self.layers for _ in layer.pieces]

    @cached_property
    def gathered(self) -> list[int]:
        """Numbers of the layers that are written out of one buffer: the staged ones, and what the boundary copies."""
        return [number for number, layer in enumerate(self.layers) if layer.staged] + [len(self.layers)]

    @cached_property
    def leased_runs(self) -> list[tuple[int, int]]:
        """Leased layers that follow one another, as (first, count)."""
        runs: list[tuple[int, int]] = []
        for number, layer in enumerate(self.layers):
            if not layer.staged:
                if runs and sum(runs[-1]) == number:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((number, 1))
        return runs

    @cached_property
    def nbytes(self) -> int:
        return sum(piece.slice.nbytes for piece in [*self.pieces, *self.copied])

    @cached_property
    def staged_bytes(self) -> int:
        return sum(piece.slice.nbytes for layer in self.layers if layer.staged for piece in layer.pieces)

    def sources(self, memory_align: int) -> list[tuple[str, list[Source]]]:
        """What the shard's layout is made of: the layers, then the extent of what is copied at the boundary."""
        layers = [
            (
                layer.name,
                [
                    Source(p.slice, 0 if layer.staged else p.tensor.data_ptr() % memory_align, p.wrapped)
                    for p in layer.pieces
                ],
            )
            for layer in self.layers
        ]
        return [*layers, (BOUNDARY_LAYER, [Source(piece.slice, 0, piece.wrapped) for piece in self.copied])]

    def live_scalars(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state that is no tensor, as it is now, by parameter and name."""
        found: dict[str, dict[str, Any]] = {}
        for fqn, name, state in self.scalars:
            found.setdefault(fqn, {})[name] = state[name]
        return found


@dataclass(frozen=True, slots=True)
class _Glance:
    """The very objects that a survey was made of. `values` keeps them alive, so that no other takes their identity.

    `dense` are those of the values that are tensors with an address.
    """

    copying: frozenset[str]
    states: list[Mapping[str, Any]]
    names: list[str]
    sizes: list[int]
    values: list[Any]
    dense: list[torch.Tensor]
    buffers: list[tuple[str, torch.Tensor]]
    addresses: list[int]


class Surveyor:
    """Looks at the live tensors of one rank at every checkpoint; makes a new `Survey` only when one of them moved."""

    def __init__(self, framework: Framework, optimizer: OptimizerAdapter, capture: str = "auto") -> None:
        """`capture` is the configuration's: "auto" (lease host memory, stage device memory), "lease" or "stage"."""
        self._framework, self._optimizer, self._capture = framework, optimizer, capture
        self._params = [view.param for view in framework.params]
        self._last: tuple[_Glance, Survey] | None = None

    def look(self, copying: frozenset[str] = frozenset()) -> Survey:
        """`copying` holds names (`<kind>/<fqn>`) that the audit found unsafe to lease. Raises UnsupportedError."""
        glance = self._glance(copying)
        if self._last is None or not _same(self._last[0], glance):
            self._last = glance, self._survey(copying, glance.states)
        return self._last[1]

    def _glance(self, copying: frozenset[str]) -> _Glance:
        states = self._optimizer.states(self._framework.params)
        values = [value for state in states for value in state.values()]
        last = self._last[0] if self._last is not None else None
        dense = last.dense if last is not None and _identical(values, last.values) else [*filter(_is_dense, values)]
        buffers = self._framework.buffers()
        names = [name for state in states for name in state]
        addresses = self._framework.addresses([*self._params, *dense, *(buffer for _, buffer in buffers)])
        return _Glance(copying, states, names, [*map(len, states)], values, dense, buffers, addresses)

    def _survey(self, copying: frozenset[str], states: list[Mapping[str, Any]]) -> Survey:
        layers: dict[str, list[Piece]] = {}
        copied: list[Piece] = []
        order: dict[str, list[str]] = {}
        scalars: list[tuple[str, str, Mapping[str, Any]]] = []
        updated = {id(view.param) for view in self._optimizer.views}

        def add(view: ParamView, kind: str, tensor: torch.Tensor, may_lease: bool) -> None:
            for piece in self._framework.pieces(view, kind, tensor, lease=may_lease):
                if piece.lease and self._in_layer(piece, copying):
                    layers.setdefault(view.layer, []).append(piece)
                else:
                    copied.append(piece)

        for view, state in zip(self._framework.params, states, strict=True):
            add(view, "param", view.param, id(view.param) in updated)
            if state:
                order[view.fqn] = list(state)
            for name, value in state.items():
                if _is_dense(value):
                    self._check_name(name)
                    add(view, name, value, True)
                else:
                    scalars.append((view.fqn, name, state))
        if not self._framework.shared_buffers or self._framework.rank == 0:
            for fqn, buffer in self._framework.buffers():
                local = self._framework.local(buffer)
                part = Slice.whole("buffer", fqn, dtype_code(buffer.dtype, f"buffer/{fqn}"), tuple(local.shape))
                copied.append(Piece(part, local, lease=False))
        made = tuple(self._layer(name, pieces) for name, pieces in layers.items())
        key = tuple(
            (piece.slice, layer.staged, 0 if layer.staged else piece.tensor.data_ptr())
            for layer in made
            for piece in layer.pieces
        ) + tuple(piece.slice for piece in copied)
        return Survey(made, tuple(copied), order, tuple(scalars), self._framework.extra_states(), key)

    def _in_layer(self, piece: Piece, copying: frozenset[str]) -> bool:
        if not piece.on_host and self._capture == "lease":
            raise ConfigError(
                f"capture = 'lease': {piece.slice.name} is on {piece.tensor.device}, and only host memory can be read "
                "in place; use 'auto' or 'stage'"
            )
        return piece.dense and piece.slice.name not in copying and not piece.tensor.is_inference()

    def _layer(self, name: str, pieces: list[Piece]) -> Layer:
        """Small tensors first and together: they pass through one bounce block and do not break up the large ones."""
        pieces.sort(key=lambda piece: piece.slice.nbytes >= PACK_BELOW)
        staged = self._capture == "stage" or not all(piece.on_host for piece in pieces)
        return Layer(name, tuple(pieces), staged)

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or "/" in name or name in ("param", "master", "buffer", "state"):
            raise UnsupportedError(
                f"{self._optimizer.kind} keeps state under {name!r}, which cannot name a tensor in the file"
            )


def _same(one: _Glance, other: _Glance) -> bool:
    """Whether all tensors are the same objects in the same places. State that is no tensor may have another value."""
    return (
        one.addresses == other.addresses
        and one.names == other.names
        and one.sizes == other.sizes
        and one.copying == other.copying
        and one.buffers is other.buffers
        and (
            one.dense is other.dense  # as `_glance` has it when all values are the same objects
            or all(
                was is now or not (_is_dense(was) or _is_dense(now))
                for was, now in zip(one.values, other.values, strict=True)
            )
        )
        and _identical(one.states, other.states)
    )


def _identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided
