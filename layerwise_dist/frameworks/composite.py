# SPDX-License-Identifier: Apache-2.0
"""Several models and optimizers as one: a Framework made of frameworks, an OptimizerAdapter made of adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.framework import Framework, ParamView, same_objects
from layerwise_dist.frameworks.nested import NO_STATE
from layerwise_dist.frameworks.optimizers import OptimizerAdapter, UpdateEvents
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.tensors.pieces import Piece
from layerwise_dist.tensors.slices import Slice

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_names(what: str, named: object) -> None:
    """Raises UnsupportedError unless `named` maps names to something, each of them fit to begin a tensor's name."""
    if not isinstance(named, Mapping):
        raise UnsupportedError(f"{what} must be a dict by name, not {type(named).__name__}")
    if not named:
        raise UnsupportedError(f"{what} is empty")
    for name in named:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UnsupportedError(f"{what}: {name!r} is not a valid name: letters, digits, '_' and '-' are allowed")


def framework_of(name: str) -> dict[str, str]:
    """Of several models' `Framework.name`, the name of each one's framework by the model's name; empty of one's."""
    return dict(each.split(":", 1) for each in name.split(",")) if ":" in name else {}


class CompositeFramework(Framework):
    """Models by name; every name in it begins with the model's, which the parts have as their prefix.

    A parameter of several models is saved once, under the name that the first of them has for it; the others are its
    aliases.
    """

    def __init__(self, parts: Mapping[str, Framework]) -> None:
        """Raises UnsupportedError where a wrapper has its parameters for itself, and another model holds one too."""
        some = next(iter(parts.values()))
        self.rank, self.world_size = some.rank, some.world_size
        self.parts = dict(parts)
        self.name = ",".join(f"{name}:{part.name}" for name, part in sorted(self.parts.items()))
        self.swapped = any(part.swapped for part in self.parts.values())
        self.whole = all(part.whole for part in self.parts.values())
        self._holder: dict[int, Framework]  # by the parameter's id; the views keep it alive
        self._merged: list[list[ParamView]] = []
        self.follow()
        self._buffers: tuple[list[list[tuple[str, torch.Tensor]]], list[tuple[str, torch.Tensor]]] = [], []

    def follow(self) -> None:
        for part in self.parts.values():
            part.follow()
        lists = [part.params for part in self.parts.values()]
        if not same_objects(lists, self._merged):
            self.params = self._merge()
            self._merged = lists

    def _merge(self) -> list[ParamView]:
        views: dict[int, ParamView] = {}
        holder = self._holder = {}
        for part in self.parts.values():
            for view in part.params:
                key = id(view.param)
                known = views.get(key)
                if known is None:
                    views[key], holder[key] = view, part
                elif part.exclusive or holder[key].exclusive:
                    raise UnsupportedError(
                        f"parameter {known.fqn} is also {view.fqn}: under {holder[key].name} and {part.name} a "
                        "parameter can belong to one model only"
                    )
                else:
                    views[key] = replace(known, aliases=(*known.aliases, view.fqn, *view.aliases))
        return list(views.values())

    def _part(self, view: ParamView) -> Framework:
        return self.parts[view.fqn.partition(".")[0]]

    @property
    def roots(self) -> list[nn.Module]:
        return [root for part in self.parts.values() for root in part.roots]

    def sharers(self, view: ParamView) -> tuple[int, ...]:
        return self._part(view).sharers(view)

    def alike(self, view: ParamView, kind: str, tensor: torch.Tensor) -> tuple[int, ...]:
        return self._part(view).alike(view, kind, tensor)

    def keep_state_whole(self, fqns: Collection[str]) -> None:
        for part in self.parts.values():
            part.keep_state_whole(fqns)

    def keep_unlike(self, fqns: Collection[str]) -> None:
        for part in self.parts.values():
            part.keep_unlike(fqns)

    def write_apart(self) -> None:
        for part in self.parts.values():
            part.write_apart()

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        holder = self._holder.get(id(tensor))
        return holder.local(tensor) if holder is not None else self._any_local(tensor)

    def _any_local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of what is no parameter: the same with all wrappers, which tell DTensors by their class."""
        part = next((part for part in self.parts.values() if part.is_wrapped(tensor)), None)
        return part.local(tensor) if part is not None else tensor.detach()

    def in_memory(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        for part in self.parts.values():
            tensors = part.in_memory(tensors)
        return tensors

    def params_in_memory(self) -> Sequence[torch.Tensor]:
        tensors = [tensor for part in self.parts.values() for tensor in part.params_in_memory()]
        return list({id(tensor): tensor for tensor in tensors}.values())  # a model may share them with another

    @property
    def standing(self) -> Sequence[ParamView]:
        found = [view for part in self.parts.values() for view in part.standing]
        known = {id(view.param): view for view in self.params} if found else {}
        return list({id(view.param): known[id(view.param)] for view in found}.values())

    def param_parts(self, view: ParamView) -> list[tuple[Slice, torch.Tensor]]:
        return self._part(view).param_parts(view)

    def names(self) -> dict[int, str]:
        return {key: name for part in reversed(self.parts.values()) for key, name in part.names().items()}

    def gradient_ready_params(self) -> list[nn.Parameter]:
        params = [param for part in self.parts.values() for param in part.gradient_ready_params()]
        return list({id(param): param for param in params}.values())

    def forward_modules(self) -> list[nn.Module]:
        return [module for part in self.parts.values() for module in part.forward_modules()]

    def need(self, view: ParamView, kind: str, tensor: torch.Tensor) -> Slice:
        return self._part(view).need(view, kind, tensor)

    def pieces(self, view: ParamView, kind: str, tensor: torch.Tensor, *, lease: bool) -> list[Piece]:
        return self._part(view).pieces(view, kind, tensor, lease=lease)

    def is_wrapped(self, tensor: torch.Tensor) -> bool:
        return any(part.is_wrapped(tensor) for part in self.parts.values())

    def keeps_state(self, view: ParamView) -> bool:
        return self._part(view).keeps_state(view)

    def cut_buffers(self) -> list[str]:
        return [fqn for part in self.parts.values() for fqn in part.cut_buffers()]

    def new_state(self, view: ParamView, entry: Slice, dtype: torch.dtype, wrapped: bool) -> torch.Tensor:
        return self._part(view).new_state(view, entry, dtype, wrapped)

    def state_shape(self, view: ParamView, entry: Slice) -> tuple[int, ...]:
        return self._part(view).state_shape(view, entry)

    def with_gradient(self) -> list[str]:
        found = {fqn for part in self.parts.values() for fqn in part.with_gradient()}
        return [view.fqn for view in self.params if view.fqn in found]

    def frees_gradients(self, view: ParamView) -> bool:
        return self._part(view).frees_gradients(view)

    def put_gradient(self, view: ParamView, present: bool) -> None:
        self._part(view).put_gradient(view, present)

    def carry(self) -> Any:
        return {name: part.carry() for name, part in self.parts.items()}

    def part_of(self, carried: Any, parts: Parts) -> Any:
        return {name: part.part_of(carried[name], parts) for name, part in self.parts.items()}

    def check_forward(self) -> None:
        for part in self.parts.values():
            part.check_forward()

    def take_up(self, carried: Any) -> None:
        for name, part in self.parts.items():
            part.take_up(carried[name])

    def detach(self) -> None:
        for part in self.parts.values():
            part.detach()

    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        """The very same list while no part's is another one."""
        lists = [part.buffers() for part in self.parts.values()]
        known, merged = self._buffers
        if not same_objects(lists, known):
            merged = [each for buffers in lists for each in buffers]
            self._buffers = lists, merged
        return merged

    def buffer_slices(self) -> list[tuple[Slice, torch.Tensor]]:
        return [each for part in self.parts.values() for each in part.buffer_slices()]

    def written_buffers(self) -> list[tuple[Slice, torch.Tensor]]:
        return [each for part in self.parts.values() for each in part.written_buffers()]

    def extra_states(self) -> list[tuple[str, nn.Module]]:
        return [each for part in self.parts.values() for each in part.extra_states()]


class CompositeOptimizer(OptimizerAdapter):
    """Optimizers by name. Each updates when it likes; a parameter belongs to one of them.

    How often each has updated is saved with it.
    """

    def __init__(self, framework: Framework, members: Mapping[str, OptimizerAdapter]) -> None:
        """Raises UnsupportedError for a parameter that two of them update."""
        self._framework, self._members = framework, dict(members)
        self.several = len(self._members) > 1
        self.kind = ", ".join(f"{name}: {member.kind}" for name, member in self._members.items())
        self.updates = dict.fromkeys(self._members, 0)
        self._owner: dict[str, OptimizerAdapter] = {}
        self._check_owners()

    def _check_owners(self) -> None:
        owners: dict[str, str] = {}
        for name, member in self._members.items():
            for view in member.views:
                if view.fqn in owners:
                    raise UnsupportedError(
                        f"parameter {view.fqn} is updated by optimizers {owners[view.fqn]} and {name}"
                    )
                owners[view.fqn] = name
        self._owner = {fqn: self._members[name] for fqn, name in owners.items()}

    @property
    def views(self) -> list[ParamView]:
        self._check_owners()
        return [view for view in self._framework.params if view.fqn in self._owner]

    @property
    def trained(self) -> list[ParamView]:
        self._check_owners()
        held = {view.fqn for member in self._members.values() for view in member.trained}
        return [view for view in self._framework.params if view.fqn in held]

    @property
    def layer_order(self) -> Sequence[str]:
        return list(dict.fromkeys(layer for member in self._members.values() for layer in member.layer_order))

    @property
    def state_views(self) -> list[ParamView]:
        self._check_owners()
        held = {view.fqn for member in self._members.values() for view in member.state_views}
        return [view for view in self._framework.params if view.fqn in held]

    @property
    def mid_window(self) -> bool:
        return any(member.mid_window for member in self._members.values())

    @property
    def optimizers(self) -> Sequence[object]:
        return [each for member in self._members.values() for each in member.optimizers]

    @property
    def scalers(self) -> Mapping[str, torch.amp.GradScaler]:
        return {
            f"{name}: {what}": each for name, member in self._members.items() for what, each in member.scalers.items()
        }

    def gather(self) -> None:
        for member in self._members.values():
            member.gather()

    def states(self, views: Sequence[ParamView]) -> list[Mapping[str, Any]]:
        each = [member.states(views) for member in self._members.values()]
        return [next(filter(None, found), NO_STATE) for found in zip(*each, strict=True)]

    def describe(self) -> dict[str, Any]:
        members = self._members.items()
        return {"optimizers": {name: {**member.describe(), "updates": self.updates[name]} for name, member in members}}

    # -- restore ------------------------------------------------------------------------------------------------

    def check(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> list[str]:
        there = saved.get("optimizers", {})
        if there.keys() != self._members.keys():
            kept, here = sorted(there) or "without names", sorted(self._members)
            return [f"the checkpoint holds optimizers {kept}, this job has {here}"]
        return [
            f"{name}: {problem}" for name, each in self._members.items() for problem in each.check(there[name], lacking)
        ]

    def place(self, view: ParamView, entry: Slice, wrapped: bool) -> torch.Tensor:
        return self._owner[view.fqn].place(view, entry, wrapped)

    def joined(self) -> list[list[str]]:
        return [names for member in self._members.values() for names in member.joined()]

    def adopt(
        self, states: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any],
        lacking: Collection[str] = (),
    ) -> None:  # fmt: skip
        for name, member in self._members.items():
            mine = saved["optimizers"][name]
            member.adopt(states, {**saved, **mine}, lacking)
            self.updates[name] = mine["updates"]

    def keep(self, saved: Mapping[str, Any], lacking: Collection[str] = ()) -> None:
        for name, member in self._members.items():
            member.keep({**saved, **saved["optimizers"].get(name, {"groups": []})}, lacking)

    # -- updates ------------------------------------------------------------------------------------------------

    def watch(self, events: UpdateEvents) -> None:
        for name, member in self._members.items():
            member.watch(_Counted(events, self.updates, name, member))

    def detach(self) -> None:
        for member in self._members.values():
            member.detach()


class _Counted:
    """`UpdateEvents` of one of several optimizers, passed on."""

    def __init__(self, events: UpdateEvents, updates: dict[str, int], name: str, member: OptimizerAdapter) -> None:
        self._updates, self._name, self._member = updates, name, member
        self._starting, self.overwriting = events.update_starting, events.overwriting
        self.wants_layers, self.updated, self.wanted = events.wants_layers, events.updated, events.wanted
        self._done, self._closure = events.update_done, events.before_closure

    def update_starting(self, *, in_closure: bool = False, layers: Collection[str] | None = None) -> None:
        """Only its own layers: what is leased of the others' stays leased."""
        self._starting(in_closure=in_closure, layers=self._member.layers)

    def before_closure(self, layers: Collection[str] | None = None) -> None:
        self._closure(self._member.layers)

    def update_done(self, *, applied: bool) -> None:
        self._updates[self._name] += applied
        self._done(applied=applied)
