"""FSDP2 (`fully_shard`): parameters and their optimizer state are DTensors; each rank writes its local part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.pieces import dtype_code
from layerwise_dist.slices import Slice


class FSDP2Framework(Framework):
    name = "fsdp2"

    def __init__(self, root: nn.Module, rank: int, world_size: int, prefix: str = "") -> None:
        super().__init__(root, rank, world_size, prefix)
        for view in self.params:
            if (
                isinstance(view.param, DTensor)
                and view.param.to_local().numel()
                and not view.param.to_local().is_contiguous()
            ):
                raise UnsupportedError(
                    f"parameter {view.fqn}: its local shard is not row-major ({view.param.placements})"
                )

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def addresses(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        return [(each._local_tensor if isinstance(each, DTensor) else each).data_ptr() for each in tensors]

    def gradient_ready_params(self) -> list[nn.Parameter]:
        return []  # with CPU offload such a hook makes FSDP2 wait for each gradient's copy

    def is_wrapped(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, DTensor)

    def need(self, view: ParamView, kind: str, tensor: torch.Tensor) -> Slice:
        if not isinstance(tensor, DTensor):
            return super().need(view, kind, tensor)
        shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        code = dtype_code(tensor.dtype, f"{kind}/{view.fqn}")
        return Slice(kind, view.fqn, code, tuple(tensor.shape), offsets=tuple(offsets), lengths=tuple(shape))

    def new_state(self, view: ParamView, entry: Slice, dtype: torch.dtype, wrapped: bool) -> torch.Tensor:
        param = view.param
        if not (wrapped and isinstance(param, DTensor)):
            return (
                super().new_state(view, entry, dtype, wrapped)
                if not isinstance(param, DTensor)
                else torch.empty(
                    entry.global_shape, dtype=dtype, device=param.to_local().device if entry.global_shape else "cpu"
                )
            )
        if entry.global_shape != tuple(param.shape):
            raise UnsupportedError(f"optimizer state {entry.name}: a DTensor of another shape than its parameter")
        return torch.empty_like(param, dtype=dtype, requires_grad=False)
