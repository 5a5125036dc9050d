# SPDX-License-Identifier: Apache-2.0
"""DeepSpeedFramework: an engine's module as layers, and its fp32 masters as slices of the user's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.deepspeed.counters import Counters
from layerwise_dist.frameworks.deepspeed.flattening import global_shape, partition
from layerwise_dist.frameworks.deepspeed.support import find_units
from layerwise_dist.frameworks.flat import FlatFramework
from layerwise_dist.frameworks.framework import ParamView
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.frameworks.shares import Share, shares
from layerwise_dist.tensors.pieces import Piece, dtype_code
from layerwise_dist.tensors.slices import Slice, ranks_text


class DeepSpeedFramework(FlatFramework):
    """What is trained is saved as its master (kind ``master``), from which the engine's low-precision copy is derived;
    frozen parameters (kind ``param``) and buffers as they are.

    What ZeRO cuts is saved as it is cut: flat ranges of the user's tensor. What all ranks hold alike (stage 0, and
    frozen parameters below stage 3) is divided among them, as DDP's is. The names are those of the user's module.
    """

    name = "deepspeed"
    exclusive = True
    fixed = "A DeepSpeed engine trains what it was given: make one of the changed model, and attach() that"

    def __init__(self, engine: Any, rank: int, world_size: int, prefix: str = "") -> None:
        """Raises UnsupportedError for a mode that cannot be captured exactly."""
        self.engine = engine
        self.units = find_units(engine, rank, world_size)
        self.swapped = self.units.swapped
        super().__init__(engine.module, rank, world_size, prefix)
        trained = self.units.fragments()
        self._by_param = {id(view.param): view for view in self.params}
        unknown = len(trained.keys() - self._by_param.keys())
        if unknown:
            raise UnsupportedError(f"{unknown} parameters of DeepSpeed's optimizer are not the module's own")
        self.fragments = {view.fqn: trained[id(view.param)] for view in self.params if id(view.param) in trained}
        self._in_unit = [[self._by_param[id(p)] for p in grouping.params] for grouping in self.units.groupings()]
        self._numbers = sorted({fragment.unit for fragment in self.fragments.values()})
        self._untrained = [view.param for view in self.params if view.fqn not in self.fragments]
        self._shares = self._divide()
        self._all = tuple(range(world_size))  # which is its data-parallel group: `support.py` refuses any other
        self._among = ranks_text(self._all)
        self.counters = Counters(engine, self.units)
        for view in self.params:
            self.local(view.param)

    def _divide(self) -> dict[str, Share]:
        alike = [
            view
            for view in self.params
            if (self.units.replicated if view.fqn in self.fragments else not hasattr(view.param, "ds_tensor"))
        ]
        cut = shares([(view.param.numel(), view.param.element_size()) for view in alike], self.rank, self.world_size)
        return {view.fqn: share for view, share in zip(alike, cut, strict=True)}

    # -- which tensors ------------------------------------------------------------------------------------------

    def unit(self, number: int) -> torch.Tensor:
        return self.units.tensor(number)

    def views_in(self, number: int) -> Sequence[ParamView]:
        return self._in_unit[number]

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a parameter its master, or what this rank holds of a frozen one."""
        view = self._by_param.get(id(tensor))
        if view is None:
            return tensor.detach()
        if view.fqn in self.fragments:
            return self.fragment_of(view, self.units.tensor(self.fragments[view.fqn].unit))
        if hasattr(tensor, "ds_tensor"):
            return tensor.ds_tensor.detach().view(-1)[: partition(tensor, self.rank)[1]]
        return tensor.detach()

    def params_in_memory(self) -> Sequence[torch.Tensor]:
        # Where a parameter begins within its unit never changes.
        units = [self.units.tensor(number) for number in self._numbers]
        return units + [getattr(param, "ds_tensor", param) for param in self._untrained]

    def gradient_ready_params(self) -> list[nn.Parameter]:
        return []  # ZeRO's own hooks take gradients away as they come

    def frees_gradients(self, view: ParamView) -> bool:
        return True

    # -- which slices -------------------------------------------------------------------------------------------

    def sharers(self, view: ParamView) -> tuple[int, ...]:
        """All: a rank needs its part of what is divided, and what there is of a parameter that it holds nothing of."""
        return self._all

    def _replicas(self, view: ParamView, tensor: torch.Tensor) -> tuple[int, ...]:
        return self._all if view.fqn in self._shares and self._among else ()

    def need(self, view: ParamView, kind: str, tensor: torch.Tensor) -> Slice:
        fragment = self.fragments.get(view.fqn)
        shape, among = global_shape(view), self._among
        if tensor is view.param:
            local = self.local(tensor)
            kind = "param" if fragment is None else "master"
            code = dtype_code(local.dtype, f"{kind}/{view.fqn}")
            if view.fqn in self._shares:
                return Slice.whole(kind, view.fqn, code, shape, among)
            start, length = partition(tensor, self.rank) if fragment is None else (fragment.start, fragment.length)
            return Slice(kind, view.fqn, code, shape, start=start, length=length, among=among)
        code = dtype_code(tensor.dtype, f"{kind}/{view.fqn}")
        if tensor.dim() == 0:
            return Slice.whole(kind, view.fqn, code, (), among)
        if view.fqn in self._shares:
            return Slice.whole(kind, view.fqn, code, shape, among)
        assert fragment is not None, "state of a unit's shape is of a parameter in it"
        return Slice(kind, view.fqn, code, shape, start=fragment.start, length=fragment.length, among=among)

    def pieces(self, view: ParamView, kind: str, tensor: torch.Tensor, *, lease: bool) -> list[Piece]:
        wanted, local = self.need(view, kind, tensor), self.local(tensor)
        share = self._shares.get(view.fqn)
        if share is None:
            return [Piece(wanted, local, lease)] if wanted.numel else []
        if not self.alike(view, kind, tensor):
            return [Piece(replace(wanted, among=""), local, lease)]
        if local.dim() == 0 and tensor is not view.param:
            return [Piece(wanted, local, lease)] if share.first else []
        if share.start >= share.end:
            return []
        part = replace(wanted, offsets=None, lengths=None, start=share.start, length=share.end - share.start)
        dense = local.is_contiguous()
        return [Piece(part, local.reshape(-1)[share.start : share.end] if dense else local, lease and dense)]

    # -- what the engine has learnt -----------------------------------------------------------------------------

    def carry(self) -> Any:
        return self.counters.take()

    def part_of(self, carried: Any, parts: Parts) -> Any:
        if not parts.strict:
            self.units.gather()  # what the checkpoint lacks stays as it is now
        if parts.module_only:
            return {}
        left = [*([] if parts.optimizer else ["loss_scale"]), *([] if parts.scheduler else ["lr_scheduler"])]
        return {name: value for name, value in carried.items() if name not in left}

    def carry_on(self, carried: Any, step: int, parts: Parts, *, same_world: bool) -> Any:
        """`carried` may also be what this engine is given of another wrapper's checkpoint (`Counters.at`)."""
        if carried is not None and "counters" in carried:
            return carried
        return self.counters.at(step, carried or {}, scheduled=parts.scheduler and not parts.module_only)

    def take_up(self, carried: Any) -> None:
        self.counters.put(carried)
        self.units.before_load()
