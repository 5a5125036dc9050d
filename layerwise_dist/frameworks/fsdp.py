# SPDX-License-Identifier: Apache-2.0
"""FSDP2 (`fully_shard`), alone, hybrid, or over tensor parallelism: parameters and their optimizer state are DTensors.

Each rank writes its local part. Where a mesh replicates a part, one of the ranks that hold it alike writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement

from layerwise_dist.errors import MismatchError, UnsupportedError
from layerwise_dist.frameworks.framework import Framework, ParamView, changes
from layerwise_dist.frameworks.shares import owners
from layerwise_dist.tensors.pieces import Piece, dtype_code
from layerwise_dist.tensors.slices import Slice, ranks_text


class FSDP2Framework(Framework):
    """A part is on all ranks along a mesh dimension whose placement is `Replicate`, and these count as equal. A tensor
    is that of its mesh: ranks on another one (of another pipeline stage) have another tensor, whatever its name.

    What is replicated by being on no mesh, or on a smaller one (modules that tensor parallelism passes by), is each
    rank's own: nothing keeps it equal by force.
    """

    name = "fsdp2"
    whole = opens = False

    def __init__(self, root: nn.Module, rank: int, world_size: int, prefix: str = "") -> None:
        # Of this process's part, by shape, mesh and placements: there are few of these, and torch takes its time.
        self._places: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._held_by: dict[Any, tuple[int, ...]] = {}  # by mesh and placements
        super().__init__(root, rank, world_size, prefix)
        self._divide()

    def _divide(self) -> None:
        for view in self.params:
            if isinstance(view.param, DTensor):
                self._check_part(view)
        replicated = [(view, self._holders(view.param)) for view in self.params]
        replicated = [(view, ranks) for view, ranks in replicated if len(ranks) > 1]
        sizes = [(ranks, self.local(view.param).nbytes) for view, ranks in replicated]
        self._owner = {view.fqn: owner for (view, _), owner in zip(replicated, owners(sizes), strict=True)}
        self._sharers = {view.fqn: ranks for view, ranks in replicated}
        self._among: dict[DeviceMesh, str] = {}

    def stand_ins(self) -> Mapping[int, nn.Parameter]:
        """The whole parameters, while those hang in the places of the sharded ones."""
        return {id(other): each.sharded_param for each in _managed(self.root) for other in _stand_ins(each)}

    def _take_up(self, found: list[ParamView]) -> None:
        for each in _managed(self.root):
            module, name = each._module_info.module, each._module_info.param_name
            there = module._parameters.get(name)
            if there is not each.sharded_param and not any(there is other for other in _stand_ins(each)):
                raise UnsupportedError(
                    f"{changes(self._in_tree, found)} after attach(). FSDP2 puts back what it was given: copy values "
                    "into the parameter that is there, or wrap the changed model, and attach() that"
                )
        super()._take_up(found)
        self._divide()

    def sharers(self, view: ParamView) -> tuple[int, ...]:
        return self._sharers.get(view.fqn, ())

    def _replicas(self, view: ParamView, tensor: torch.Tensor) -> tuple[int, ...]:
        # State that is laid out otherwise than its parameter may be cut where that is replicated: everybody writes it.
        alike = isinstance(tensor, DTensor) and self._holders(tensor) == self._holders(view.param)
        return self.sharers(view) if alike else ()

    def _mesh_text(self, mesh: DeviceMesh) -> str:
        if mesh not in self._among:
            self._among[mesh] = ranks_text(mesh.mesh.reshape(-1).tolist())
        return self._among[mesh]

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def in_memory(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [each._local_tensor if isinstance(each, DTensor) else each for each in tensors]

    def gradient_ready_params(self) -> list[nn.Parameter]:
        return []  # with CPU offload such a hook makes FSDP2 wait for each gradient's copy

    def forward_modules(self) -> list[nn.Module]:
        """Those that are gathered and freed as one, which have hooks of their own there."""
        return [module for module in self.root.modules() if isinstance(module, FSDPModule)]

    def is_wrapped(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, DTensor)

    def need(self, view: ParamView, kind: str, tensor: torch.Tensor) -> Slice:
        if not isinstance(tensor, DTensor):
            return super().need(view, kind, tensor)
        shape, offsets = self._place(tensor)
        code = dtype_code(tensor.dtype, f"{kind}/{view.fqn}")
        among = self._mesh_text(tensor.device_mesh)
        return Slice(kind, view.fqn, code, tuple(tensor.shape), offsets=offsets, lengths=shape, among=among)

    def pieces(self, view: ParamView, kind: str, tensor: torch.Tensor, *, lease: bool) -> list[Piece]:
        if tensor is view.param and isinstance(tensor, DTensor):
            self._check_part(view)  # its local part may have got another shape
        if self.alike(view, kind, tensor) and self._owner[view.fqn] != self.rank:
            return []
        return super().pieces(view, kind, tensor, lease=lease)

    def cut_buffers(self) -> list[str]:
        return [
            fqn
            for fqn, buffer in self.buffers()
            if isinstance(buffer, DTensor) and not all(placement.is_replicate() for placement in buffer.placements)
        ]

    def new_state(self, view: ParamView, entry: Slice, dtype: torch.dtype, wrapped: bool) -> torch.Tensor:
        param = view.param
        if not isinstance(param, DTensor):
            return super().new_state(view, entry, dtype, wrapped)
        if not wrapped:
            device = param.to_local().device if entry.global_shape else "cpu"
            return torch.empty(entry.global_shape, dtype=dtype, device=device)
        if entry.global_shape != tuple(param.shape):
            raise MismatchError(
                f"optimizer state {entry.name} is a DTensor of shape {list(entry.global_shape)}, its parameter here "
                f"has {list(param.shape)}"
            )
        return torch.empty_like(param, dtype=dtype, requires_grad=False)

    def _place(self, tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of this rank's part, and where it begins in the whole."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # private: not at our import

        key = tensor.shape, tensor.device_mesh, tensor.placements
        if key not in self._places:
            shape, offsets = compute_local_shape_and_global_offset(*key)
            self._places[key] = tuple(shape), tuple(offsets)
        return self._places[key]

    def _holders(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The ranks that hold the same part of a DTensor as this one, this one included; of any other tensor none."""
        if not isinstance(tensor, DTensor):
            return ()
        key = tensor.device_mesh, tensor.placements
        if key not in self._held_by:
            self._held_by[key] = _alike_with(*key)
        return self._held_by[key]

    def _check_part(self, view: ParamView) -> None:
        param = view.param
        assert isinstance(param, DTensor)
        if any(placement.is_partial() for placement in param.placements):
            raise UnsupportedError(f"parameter {view.fqn}: a sum that is not reduced yet ({param.placements})")
        if param.device_mesh.get_coordinate() is None:
            raise UnsupportedError(f"parameter {view.fqn}: this rank is not in its device mesh {param.device_mesh}")
        local = param.to_local()
        shape, _ = self._place(param)
        if tuple(local.shape) != shape:
            raise UnsupportedError(
                f"parameter {view.fqn}: its local shard of shape {list(local.shape)} is not what its placements "
                f"{param.placements} say ({list(shape)}), so its place is unknown"
            )
        if local.numel() and not local.is_contiguous():
            raise UnsupportedError(f"parameter {view.fqn}: its local shard is not row-major ({param.placements})")


def _managed(root: nn.Module) -> list[Any]:
    """What FSDP2 knows of each parameter that it has sharded."""
    states = [module._get_fsdp_state() for module in root.modules() if isinstance(module, FSDPModule)]
    return [each for state in states for group in _groups(state) for each in group.fsdp_params]


def _groups(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.11 and older: one at most


def _stand_ins(managed: Any) -> list[nn.Parameter]:
    """What hangs in the sharded parameter's place while it is gathered."""
    found = [getattr(managed, name, None) for name in ("_unsharded_param", "_sharded_post_forward_param")]
    return [param for param in found if param is not None]


def _alike_with(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, ...]:
    here = mesh.get_coordinate()
    assert here is not None, "of a parameter that `_check_part` took"
    place = tuple(
        slice(None) if placement.is_replicate() else at for placement, at in zip(placements, here, strict=True)
    )
    return tuple(mesh.mesh[place].reshape(-1).tolist())
