"""What there is to capture now: every tensor of model and optimizer that this rank writes, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.pieces import Layer, Piece, dtype_code
from layerwise_dist.slices import Slice
from layerwise_dist.storage.shard import PACK_BELOW, Source

# Extent of everything that is copied at the boundary. No module's name can clash: it has no layer's place in the tree.
BOUNDARY_LAYER = "(boundary)"


@dataclass(frozen=True, slots=True)
class Survey:
    """`leased` layers are read in place from the update on; `copied` pieces are copied at the boundary.

    `scalars` is the optimizer's state that is no tensor, by parameter and name. `key` changes exactly when a new layout
    is needed: a tensor came, went, moved, or changed its shape or dtype. `stamp` tells the same of the very objects,
    cheaply; `held` keeps them alive, so that no other object can take their identity.
    """

    leased: tuple[Layer, ...]
    copied: tuple[Piece, ...]
    scalars: dict[str, dict[str, Any]]
    key: tuple[Any, ...]
    stamp: tuple[Any, ...]
    held: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        pieces = [piece for layer in self.leased for piece in layer.pieces] + list(self.copied)
        return sum(piece.slice.nbytes for piece in pieces)

    def sources(self, memory_align: int) -> list[tuple[str, list[Source]]]:
        """What the shard's layout is made of: the leased layers, then the extent of the copies."""
        layers = [
            (layer.name, [Source(p.slice, p.tensor.data_ptr() % memory_align, p.wrapped) for p in layer.pieces])
            for layer in self.leased
        ]
        return [*layers, (BOUNDARY_LAYER, [Source(piece.slice, 0, piece.wrapped) for piece in self.copied])]


def check_optimizer(framework: Framework, optimizer: object) -> None:
    """Raises UnsupportedError unless `optimizer` is a torch optimizer of this model's own parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedError(f"attach() needs a torch.optim.Optimizer, not {type(optimizer).__name__}")
    known = {id(view.param) for view in framework.params}
    for number, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if id(param) not in known:
                raise UnsupportedError(
                    f"{type(optimizer).__name__}: parameter {position} of group {number} (shape {list(param.shape)}) is not one "
                    "of the model's. Build the optimizer after the model was wrapped, moved and materialised"
                )
    if not any(group["params"] for group in optimizer.param_groups):
        raise UnsupportedError(f"{type(optimizer).__name__} has no parameters")


def survey(
    framework: Framework,
    optimizer: torch.optim.Optimizer,
    copying: frozenset[str],
    previous: Survey | None = None,
) -> Survey:
    """Looks at the live tensors. `copying` holds names (`<kind>/<fqn>`) that the audit found unsafe to lease.

    With `previous`, its pieces serve again as long as all tensors are the same objects at the same addresses.
    """
    stamp, held, scalars = _look(framework, optimizer, copying)
    if previous is not None and previous.stamp == stamp:
        return replace(previous, scalars=scalars)
    updated = {id(param) for group in optimizer.param_groups for param in group["params"]}
    layers: dict[str, list[Piece]] = {}
    copied: list[Piece] = []

    def add(view: ParamView, kind: str, tensor: torch.Tensor, may_lease: bool) -> None:
        for piece in framework.pieces(view, kind, tensor, lease=may_lease):
            if piece.lease and piece.dense and piece.slice.name not in copying and not piece.tensor.is_inference():
                layers.setdefault(view.layer, []).append(piece)
            else:
                copied.append(piece)

    for view in framework.params:
        add(view, "param", view.param, id(view.param) in updated)
        state = optimizer.state.get(view.param)
        for name, value in (state or {}).items():
            if _is_dense(value):
                if not isinstance(name, str) or "/" in name or name in ("param", "buffer", "state"):
                    raise UnsupportedError(
                        f"{type(optimizer).__name__} keeps state under {name!r}, which cannot name a tensor in the file"
                    )
                add(view, name, value, True)
    if not framework.shared_buffers or framework.rank == 0:
        for fqn, buffer in framework.buffers():
            local = framework.local(buffer)
            part = Slice.whole("buffer", fqn, dtype_code(buffer.dtype, f"buffer/{fqn}"), tuple(local.shape))
            copied.append(Piece(part, local, lease=False))
    leased = tuple(Layer(name, tuple(_packed(pieces))) for name, pieces in layers.items())
    key = tuple(
        (piece.slice, piece.tensor.data_ptr() if piece.lease else 0) for layer in leased for piece in layer.pieces
    ) + tuple(piece.slice for piece in copied)
    return Survey(leased, tuple(copied), scalars, key, stamp, held)


def _look(
    framework: Framework, optimizer: torch.optim.Optimizer, copying: frozenset[str]
) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...], dict[str, dict[str, Any]]]:
    """The stamp, what it is of, and the optimizer's state that is no tensor."""
    stamp: list[Any] = [copying]
    held: list[torch.Tensor] = []
    scalars: dict[str, dict[str, Any]] = {}

    def see(tensor: torch.Tensor) -> None:
        held.append(tensor)
        stamp.append(id(tensor))
        stamp.append(framework.address(tensor))

    for view in framework.params:
        see(view.param)
        for name, value in optimizer.state.get(view.param, {}).items():
            stamp.append(name)
            if _is_dense(value):
                see(value)
            else:
                scalars.setdefault(view.fqn, {})[name] = value
    for fqn, buffer in framework.buffers():
        stamp.append(fqn)
        see(buffer)
    return tuple(stamp), tuple(held), scalars


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _packed(pieces: list[Piece]) -> list[Piece]:
    """Small tensors first and together: they pass through one bounce block instead of breaking up the large ones."""
    return sorted(pieces, key=lambda piece: piece.slice.nbytes >= PACK_BELOW)


def gradient_names(framework: Framework) -> list[str]:
    """Parameters that have a gradient, be it zeros: AdamW decays those and leaves parameters with None alone."""
    return [view.fqn for view in framework.params if view.param.grad is not None]


def set_gradients(framework: Framework, names: list[str]) -> None:
    """Zeros where there was a gradient, None elsewhere. The values of a boundary's gradients are never used again."""
    present = set(names)
    for view in framework.params:
        if view.fqn not in present:
            view.param.grad = None
        elif view.param.grad is None:
            view.param.grad = torch.zeros_like(view.param)
        else:
            view.param.grad.detach_().zero_()


def hyper_parameters(framework: Framework, optimizer: torch.optim.Optimizer) -> list[Mapping[str, Any]]:
    """Each param group with names in place of parameters."""
    names = {id(view.param): view.fqn for view in framework.params}
    return [
        {key: [names[id(p)] for p in value] if key == "params" else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]
