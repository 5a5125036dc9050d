# SPDX-License-Identifier: Apache-2.0
"""A model on the meta device gets memory: its own shards of sharded parameters only, ties made again, and nothing in it
that neither the checkpoint nor the model's own initialization has filled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from layerwise_dist.errors import UnsupportedError, named
from layerwise_dist.frameworks.names import CleanNames, join
from layerwise_dist.frameworks.private_names import require

_LISTED = 8
_INITIALIZERS = ("reset_parameters", "init_weights")
_MARK = "_is_hf_initialized"


def is_meta(tensor: torch.Tensor) -> bool:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).is_meta


class Materialized:
    """A model whose tensors on the meta device have got memory, with anything in it. `undo` puts them back."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """`device` is that of what is no DTensor; a DTensor lies where its mesh does."""
        require("load() into a model on the meta device")
        self._model = model
        self._ties = _ties(model)
        names = CleanNames(model).of_module
        # By place: the module and its own name for the tensor; values are the tensor's name in the model.
        self._places: dict[tuple[nn.Module, str], str] = {}
        for module in model.modules():
            for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and is_meta(tensor):
                    self._places[module, own] = join(names[id(module)], own)
        self._move(lambda tensor: _empty(tensor, device) if is_meta(tensor) else tensor)

    def undo(self) -> None:
        """What was on the meta device is there again."""
        there = {id(_at(module, own)) for module, own in self._places}
        self._move(lambda tensor: torch.empty_like(tensor, device="meta") if id(tensor) in there else tensor)

    def _move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._model._apply(move)  # as `to_empty()` calls it; FSDP2 hears of it
        for (first, name), *others in self._ties:
            for module, own in others:
                module._parameters[own] = first._parameters[name]

    def initialize(self, filled: Collection[str]) -> None:
        """What the checkpoint does not fill (`filled` are names in the model of parameters and persistent buffers) is
        filled by the `reset_parameters()` or `init_weights()` of its module, or of the nearest module around that.

        Raises UnsupportedError, by name, for what is not. Random numbers of the CPU are as before.
        """
        full = {id(_at(*place)) for place, name in self._places.items() if name in filled and not _hidden(*place)}
        left = {place: name for place, name in self._places.items() if id(_at(*place)) not in full}
        left = {place: name for place, name in left.items() if _at(*place).numel()}
        if not left:
            return
        above = _parents(self._model)
        calls = [*dict.fromkeys(filter(None, (_initializer(module, above) for module, _ in left)))]
        ours = {id(_at(*place)) for place in self._places}
        others = {id(each): each for module, _ in calls for each in (*module.parameters(), *module.buffers())}
        kept = [(each, each.detach().clone()) for key, each in others.items() if key not in ours]
        filled_ones = [_at(*place) for place in self._places if place not in left]
        # An element that no call writes is in both rounds what it was filled with; one that is written, in one at most.
        # Some initialize a module once only: what the first round wrote counts where the second wrote nothing.
        before: dict[tuple[nn.Module, str], torch.Tensor] = {}
        names = []
        for pattern in (0, 1):
            for place in left:
                _fill(_at(*place), pattern)
            with torch.random.fork_rng(devices=[]), torch.no_grad(), _passed_by(filled_ones):
                for call in calls:
                    getattr(*call)()
            if not pattern:
                before = {place: _local(_at(*place)).clone() for place in left}
        with torch.no_grad():
            for place, name in left.items():
                now, first = _local(_at(*place)), before[place]
                if now.shape != first.shape or now.dtype != first.dtype:
                    continue  # made anew
                left_twice = now == _pattern(now, 1)
                if ((first == _pattern(first, 0)) & left_twice).any():
                    names.append(name)
                now.copy_(torch.where(left_twice, first, now))
            for tensor, value in kept:  # what was never on the meta device
                tensor.copy_(value)
        if names:
            raise UnsupportedError(
                "on the meta device, and neither the checkpoint nor a reset_parameters() or init_weights() of a module "
                f"around it fills it: {named(names, _LISTED)}; give it one, or build the model with memory"
            )


def _at(module: nn.Module, own: str) -> torch.Tensor:
    param = module._parameters.get(own)
    found = param if param is not None else module._buffers.get(own)
    assert found is not None, "it was there"
    return found


def _hidden(module: nn.Module, own: str) -> bool:
    """Whether it is a buffer that no checkpoint has."""
    return own in module._non_persistent_buffers_set


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places of each parameter that has several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                found.setdefault(id(param), []).append((module, name))
    return [places for places in found.values() if len(places) > 1]


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=tensor.device_mesh.device_type)
    return torch.empty_like(tensor, device=device)


def _parents(model: nn.Module) -> dict[int, nn.Module]:
    return {id(child): module for module in model.modules() for child in module.children()}


def _initializer(module: nn.Module, above: dict[int, nn.Module]) -> tuple[nn.Module, str] | None:
    for each in _upward(module, above):
        for name in _INITIALIZERS:
            if callable(getattr(each, name, None)):
                return each, name
    return None


def _upward(module: nn.Module, above: dict[int, nn.Module]) -> Iterator[nn.Module]:
    here: nn.Module | None = module
    while here is not None:
        yield here
        here = above.get(id(here))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def _pattern(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """One of two values that an initialization hardly makes; of a bool there are no others."""
    if tensor.dtype == torch.bool:
        return torch.tensor(bool(number), dtype=torch.bool, device="cpu")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return torch.tensor((-0.0380859375, -0.0537109375)[number], dtype=torch.float32, device="cpu").to(tensor.dtype)
    return torch.tensor((91, 77)[number], dtype=torch.int64, device="cpu").to(tensor.dtype)


def _fill(tensor: torch.Tensor, pattern: int) -> None:
    with torch.no_grad():
        _local(tensor).fill_(_pattern(tensor, pattern))


@contextmanager
def _passed_by(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """transformers leaves tensors with this mark alone: they are filled from the checkpoint anyway."""
    marked = {id(tensor): tensor for tensor in tensors if not hasattr(tensor, _MARK)}.values()
    for tensor in marked:
        setattr(tensor, _MARK, True)
    try:
        yield
    finally:
        for tensor in marked:
            delattr(tensor, _MARK)
