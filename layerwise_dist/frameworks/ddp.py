"""DistributedDataParallel: every rank holds the same, so each writes a part, and every byte is written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.frameworks.buckets import BucketOrder
from layerwise_dist.frameworks.shares import shares
from layerwise_dist.pieces import Piece
from layerwise_dist.slices import Slice


class DDPFramework(Framework):
    """Parameters in order are one long row of bytes, cut into equal parts, one a rank, at whole elements.

    Optimizer state of a parameter's shape is cut where the parameter is; other state belongs to the rank that has the
    parameter's first element. The cut depends on names, shapes and world size only: it is the same at every step.
    """

    name = "ddp"
    shared_params = True
    fixed = (
        "DistributedDataParallel reduces gradients of, and keeps equal, only what it was given: wrap the changed "
        "model, and attach() that"
    )

    def __init__(self, root: nn.Module, rank: int, world_size: int, prefix: str = "") -> None:
        super().__init__(root, rank, world_size, prefix)
        self.shared_buffers = isinstance(root, DistributedDataParallel) and root.broadcast_buffers
        sizes = [(view.param.numel(), view.param.element_size()) for view in self.params]
        cut = shares(sizes, rank, world_size)
        self._whole: set[str] = set()  # whose optimizer state is on one rank only
        self._numels = {view.fqn: view.param.numel() for view in self.params}
        self._mine = {view.fqn: share for view, share in zip(self.params, cut, strict=True)}
        self._buckets = BucketOrder(root, self.params) if isinstance(root, DistributedDataParallel) else None

    def keep_state_whole(self, fqns: Sequence[str]) -> None:
        self._whole.update(fqns)

    def shared(self, kind: str, fqn: str) -> bool:
        return super().shared(kind, fqn) and (kind == "param" or fqn not in self._whole)

    def carry(self) -> Any:
        return self._buckets.order if self._buckets else None

    def take_up(self, carried: Any) -> None:
        if self._buckets is not None and carried:
            self._buckets.take_up(carried)

    def detach(self) -> None:
        if self._buckets is not None:
            self._buckets.detach()

    def pieces(self, view: ParamView, kind: str, tensor: torch.Tensor, *, lease: bool) -> list[Piece]:
        if view.param.numel() != self._numels[view.fqn]:
            raise UnsupportedError(
                f"parameter {view.fqn} had {self._numels[view.fqn]} elements at attach() and has {view.param.numel()} "
                f"now. {self.fixed}"
            )
        if tensor is not view.param and view.fqn in self._whole:
            return super().pieces(view, kind, tensor, lease=lease)
        whole = self.need(view, kind, tensor)
        local = tensor.detach()
        mine = self._mine[view.fqn]
        start, end, first = mine.start, mine.end, mine.first
        if tuple(tensor.shape) != tuple(view.param.shape):
            start, end = (0, tensor.numel()) if first else (0, 0)
        if (start, end) == (0, tensor.numel()) and (first or end):
            return [Piece(whole, local, lease)]
        if start >= end:
            return []
        part = Slice(kind, view.fqn, whole.dtype, whole.global_shape, start=start, length=end - start)
        # A row-major tensor's range is a view; of any other the whole goes along, and the copy at the boundary cuts it.
        dense = local.is_contiguous()
        return [Piece(part, local.reshape(-1)[start:end] if dense else local, lease and dense)]
