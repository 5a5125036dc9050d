# SPDX-License-Identifier: Apache-2.0
"""FSDP1 (`FullyShardedDataParallel`): each rank has a flat range of its units, which begins and ends within rows.

With `use_orig_params=True` the optimizer holds the user's parameters, whose data are one-dimensional views of the
range; otherwise it holds the flat parameters. Both are saved as flat ranges of the user's parameters, under their
names.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.flat import FlatFramework, FlatState, Fragment
from layerwise_dist.frameworks.framework import ParamView, changes, put_gradient
from layerwise_dist.frameworks.names import CleanNames, check_unique, join
from layerwise_dist.frameworks.torch_optimizer import TorchOptimizer
from layerwise_dist.tensors.pieces import dtype_code
from layerwise_dist.tensors.slices import Slice, ranks_text


class FSDP1Framework(FlatFramework):
    """Every rank writes its own range of every unit, be it that ranks hold the same (NO_SHARD, HYBRID_SHARD).

    Parameters that FSDP was told to ignore are each rank's own.
    """

    name = "fsdp1"
    exclusive = True
    fixed = "FSDP1 trains what it was given: wrap the changed model, and attach() that"

    def __init__(self, root: nn.Module, rank: int, world_size: int, prefix: str = "") -> None:
        """Raises UnsupportedError for CPU offload, tensor parallelism, and parameters that are not row-major."""
        super().__init__(root, rank, world_size, prefix)
        self.fragments = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._among: dict[str, str] = {}  # the ranks that FSDP cuts it over
        self._units: list[torch.Tensor] = []
        self._sizes: list[int] = []  # of those that FSDP cuts: elements on this rank
        self._views_in: list[list[ParamView]] = []
        self._handles = _handles(root)
        names = CleanNames(root, prefix)
        known = {id(view.param): view for view in self.params}
        stand_ins: dict[int, list[ParamView]] = {}  # for each flat parameter that the optimizer holds
        for module, handle in self._handles:
            _check(names.of_module[id(module)] or "the root", handle)
            flat = handle.flat_param
            if flat._params is None:
                self._add_unit(flat, stand_ins.setdefault(id(flat), _stand_ins(names, handle)), handle)
                continue
            for number, param in enumerate(flat._params):
                self._add_unit(param, [known[id(param)]], handle, number)
        self.params = [each for view in self.params for each in stand_ins.get(id(view.param), [view])]
        check_unique("two parameters", (name for view in self.params for name in (view.fqn, *view.aliases)))
        self.holds_flat = bool(stand_ins)
        for view in self.params:
            if view.fqn not in self.fragments:
                self._views_in.append([view])
                self._units.append(view.param)
        self._number = {id(unit): number for number, unit in enumerate(self._units)}
        self._by_param = {id(view.param): view for view in self.params}

    def follow(self) -> None:
        """Only to refuse. What is gathered hangs in the tree as plain tensors, and comes back in another order."""
        found = self._tree.look()
        there = {view.fqn for view in found}
        before = [view for view in self._in_tree if view.fqn in there or view.fqn not in self.fragments]
        by_name = operator.attrgetter("fqn")
        if what := changes(sorted(before, key=by_name), sorted(found, key=by_name)):
            raise UnsupportedError(f"{what} after attach(). {self.fixed}")

    def _add_unit(self, unit: torch.Tensor, views: list[ParamView], handle: Any, number: int | None = None) -> None:
        flat = handle.flat_param
        places = range(len(views)) if number is None else [number]
        cut_over = dist.get_process_group_ranks(handle.process_group) if handle.uses_sharded_strategy else ()
        for place, view in zip(places, views, strict=True):
            held = flat._shard_param_infos[place]
            length = held.numel_in_shard if held.in_shard else 0
            offset = held.offset_in_shard if held.in_shard and number is None else 0
            start = held.intra_param_start_idx if held.in_shard else 0
            self.fragments[view.fqn] = Fragment(len(self._units), start, offset, length)
            self._shapes[view.fqn] = tuple(flat._shapes[place])
            self._among[view.fqn] = ranks_text(cut_over)
        self._units.append(unit)
        self._sizes.append(flat._sharded_size.numel() if number is None else length)
        self._views_in.append(views)

    # -- units --------------------------------------------------------------------------------------------------

    def unit(self, number: int) -> torch.Tensor:
        return self._units[number]

    def views_in(self, number: int) -> Sequence[ParamView]:
        return self._views_in[number]

    def number_of(self, unit: torch.Tensor) -> int:
        """Of a tensor that an optimizer holds."""
        return self._number[id(unit)]

    def unit_of(self, view: ParamView) -> int:
        return super().unit_of(view) if view.fqn in self.fragments else self._number[id(view.param)]

    def names(self) -> dict[int, str]:
        return {id(unit): views[0].fqn for unit, views in zip(self._units, self._views_in, strict=True)}

    def fragment_of(self, view: ParamView, flat: torch.Tensor) -> torch.Tensor:
        if view.fqn not in self.fragments:
            return flat.detach()
        if flat.numel() != self._sizes[self.fragments[view.fqn].unit]:
            raise UnsupportedError(f"FSDP1 has gathered {view.fqn} (summon_full_params): no update may come meanwhile")
        return super().fragment_of(view, flat)

    # -- which tensors ------------------------------------------------------------------------------------------

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        view = self._by_param.get(id(tensor))
        if view is None or view.fqn not in self.fragments:
            return tensor.detach()
        return self.fragment_of(view, self.unit(self.fragments[view.fqn].unit))

    def params_in_memory(self) -> Sequence[torch.Tensor]:
        return self._units  # where a parameter begins within its unit never changes

    def gradient_ready_params(self) -> list[nn.Parameter]:
        return []  # they announce no gradients

    def with_gradient(self) -> list[str]:
        return [view.fqn for view in self.params if self._holder(view).grad is not None]

    def put_gradient(self, view: ParamView, present: bool) -> None:
        put_gradient(self._holder(view), present)

    def _holder(self, view: ParamView) -> torch.Tensor:
        return self.unit(self.fragments[view.fqn].unit) if view.fqn in self.fragments else view.param

    # -- which slices -------------------------------------------------------------------------------------------

    def need(self, view: ParamView, kind: str, tensor: torch.Tensor) -> Slice:
        fragment = self.fragments.get(view.fqn)
        if fragment is None or (tensor.dim() == 0 and tensor is not view.param):
            return super().need(view, kind, tensor)
        code = dtype_code(tensor.dtype, f"{kind}/{view.fqn}")
        shape, among = self._shapes[view.fqn], self._among[view.fqn]
        return Slice(kind, view.fqn, code, shape, start=fragment.start, length=fragment.length, among=among)

    def state_shape(self, view: ParamView, entry: Slice) -> tuple[int, ...]:
        return tuple(view.param.shape) if entry.is_flat else entry.global_shape

    def keeps_state(self, view: ParamView) -> bool:
        # Of what a rank has no element of, torch takes the gradient away, so that its optimizer passes it by.
        fragment = self.fragments.get(view.fqn)
        return self.holds_flat or fragment is None or fragment.length > 0

    # -- restore ------------------------------------------------------------------------------------------------

    def take_up(self, carried: Any) -> None:
        """Frees what is still gathered: the next forward would not gather again, and go on with what was before."""
        for _, handle in self._handles:
            if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
                handle.reshard(True)
                handle.post_reshard()


class FSDP1FlatOptimizer(FlatState, TorchOptimizer):
    """A torch optimizer that holds flat parameters (`use_orig_params=False`)."""

    whole_only = (
        "with use_orig_params=False, FSDP1's optimizer holds one flat parameter a wrapped module, not the layers'"
    )

    flat: FSDP1Framework

    def __init__(self, framework: FSDP1Framework, optimizer: object) -> None:
        self._init_flat(framework)
        TorchOptimizer.__init__(self, framework, optimizer)
        self._nest.refuse_inside("FSDP1 with use_orig_params=False")

    @property
    def base(self) -> torch.optim.Optimizer:
        return self._optimizer

    @property
    def trained(self) -> list[ParamView]:
        return self.views  # what a view has is a shape only, so that nothing can be asked of it

    def units(self) -> list[list[int]]:
        return [[self.flat.number_of(unit) for unit in group["params"]] for group in self._optimizer.param_groups]


def _handles(root: nn.Module) -> list[tuple[nn.Module, Any]]:
    """All wrapped modules that have parameters of their own, with their handles."""
    return [
        (module, module._handle)
        for module in root.modules()
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None
    ]


def _stand_ins(names: CleanNames, handle: Any) -> list[ParamView]:
    """A view of each parameter in a flat one. What they hold is a shape only: there is no such tensor."""
    flat = handle.flat_param
    aliases: dict[tuple[int, str], list[str]] = {}
    for shared in flat._shared_param_infos:
        aliases.setdefault((id(shared.prim_module), shared.prim_param_name), []).append(
            join(names.of_module[id(shared.module)], shared.param_name)
        )
    views = []
    for shape, info in zip(flat._shapes, flat._param_infos, strict=True):
        empty = torch.empty(shape, dtype=flat.dtype, device="meta")
        layer = names.of_module[id(info.module)]
        views.append(
            ParamView(
                join(layer, info.param_name), layer, nn.Parameter(empty, requires_grad=flat.requires_grad),
                tuple(aliases.get((id(info.module), info.param_name), ())),
            )
        )  # fmt: skip
    return views


def _check(name: str, handle: Any) -> None:
    flat = handle.flat_param
    if handle._offload_params:
        raise UnsupportedError(f"FSDP1 with CPU offload of parameters ({name}) is not supported; FSDP2's is")
    if any(extension is not None for extension in flat._param_extensions):
        raise UnsupportedError(f"FSDP1 over tensor parallelism ({name}) is not supported; FSDP2's is")
    for fqn, contiguous in zip(flat._fqns, flat._contiguities, strict=True):
        if not contiguous:
            raise UnsupportedError(
                f"FSDP1: {fqn} of {name} is not row-major (channels_last), so its ranges have no name"
            )
