# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel: the ranks of a group hold the same, so each writes a part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.buckets import BucketOrder
from layerwise_dist.frameworks.framework import Framework, ParamView
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.frameworks.shares import shares
from layerwise_dist.tensors.pieces import Piece
from layerwise_dist.tensors.slices import Slice, ranks_text

# Of torch's communication hooks, those with which the ranks' gradients, and so their parameters, are not the same.
_LOCAL_HOOKS = ("post_localSGD_hook", "noop_hook")


class DDPFramework(Framework):
    """What DDP keeps equal is equal on the ranks of its process group, which need not be all. These parameters in order
    are one long row of bytes, cut into equal parts, one a rank of the group, at whole elements.

    Optimizer state of a parameter's shape is cut where the parameter is; other state belongs to the rank that has the
    parameter's first element. The cut depends on names, shapes and the group only: it is the same at every step.

    What DDP was told to ignore (experts, say) is each rank's own, and with a communication hook that leaves gradients
    local everything is. The buffers are those of the group's first rank where DDP sends them around before each
    forward; not if it was told not to, or if a hook of the user's does it.
    """

    name = "ddp"
    opens = False
    fixed = (
        "DistributedDataParallel reduces gradients of, and keeps equal, only what it was given: wrap the changed "
        "model, and attach() that"
    )

    def __init__(self, root: nn.Module, rank: int, world_size: int, prefix: str = "") -> None:
        super().__init__(root, rank, world_size, prefix)
        wrapper = root if isinstance(root, DistributedDataParallel) else None
        group = dist.get_process_group_ranks(wrapper.process_group) if wrapper is not None else range(world_size)
        self._first, self._group = group[0], tuple(sorted(group))
        self._among = ranks_text(self._group)
        self._wrapper, ignored = wrapper, _ignored(wrapper)
        kept = [view for view in self.params if id(view.param) not in ignored] if self._among else []
        sizes = [(view.param.numel(), view.param.element_size()) for view in kept]
        cut = shares(sizes, self._group.index(rank), len(self._group))
        self._numels = {view.fqn: view.param.numel() for view in self.params}
        self._mine = {view.fqn: share for view, share in zip(kept, cut, strict=True)}
        hooks = wrapper._comm_hooks if wrapper is not None else []
        if any(getattr(hook, "__name__", "") in _LOCAL_HOOKS for hook, _ in hooks):
            self.write_apart()
        self._buckets = BucketOrder(wrapper, self.params) if wrapper is not None else None

    def sharers(self, view: ParamView) -> tuple[int, ...]:
        return self._group if view.fqn in self._mine else ()

    def _replicas(self, view: ParamView, tensor: torch.Tensor) -> tuple[int, ...]:
        return self.sharers(view)

    def need(self, view: ParamView, kind: str, tensor: torch.Tensor) -> Slice:
        wanted = super().need(view, kind, tensor)
        return replace(wanted, among=self._among) if view.fqn in self._mine else wanted

    def buffer_slices(self) -> list[tuple[Slice, torch.Tensor]]:
        found = super().buffer_slices()
        wrapper = self._wrapper
        if wrapper is None or not wrapper.broadcast_buffers or hasattr(wrapper, "buffer_hook"):
            return found
        ignored = _ignored(wrapper)
        return [
            (part if id(buffer) in ignored else replace(part, among=self._among), local)
            for (part, local), (_, buffer) in zip(found, self.buffers(), strict=True)
        ]

    def written_buffers(self) -> list[tuple[Slice, torch.Tensor]]:
        if self.apart:
            return [(replace(part, among=""), local) for part, local in self.buffer_slices()]
        return [each for each in self.buffer_slices() if not each[0].among or self.rank == self._first]

    def carry(self) -> Any:
        return self._buckets.order if self._buckets else None

    def carry_on(self, carried: Any, step: int, parts: Parts, *, same_world: bool) -> Any:
        return carried if same_world else None  # buckets follow from the ranks too

    def check_forward(self) -> None:
        """Under `Join` a rank whose inputs have ended makes no more iterations, and the others go on."""
        joined = self._wrapper._join_config if self._wrapper is not None else None
        if joined is not None and joined.enable and not joined.throw_on_early_termination and len(self._group) > 1:
            raise UnsupportedError(
                "a training forward within Join or model.join(): ranks whose inputs end make fewer iterations, so that "
                "there is no step that all of them can save. Give every rank as many batches (drop_last=True, a "
                "DistributedSampler), or use throw_on_early_termination=True, which ends all ranks with the first"
            )

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
        if not self.alike(view, kind, tensor):
            return [Piece(replace(self.need(view, kind, tensor), among=""), self.local(tensor), lease)]
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
        part = replace(whole, offsets=None, lengths=None, start=start, length=end - start)
        # A row-major tensor's range is a view; of any other the whole goes along, and the copy at the boundary cuts it.
        dense = local.is_contiguous()
        return [Piece(part, local.reshape(-1)[start:end] if dense else local, lease and dense)]


def _ignored(wrapper: DistributedDataParallel | None) -> set[int]:
    """Parameters and buffers that DDP neither sends around nor reduces, by id."""
    if wrapper is None:
        return set()
    module, names = wrapper.module, wrapper.parameters_to_ignore
    # It ignores these at first, and reduces all of them at once later.
    delayed = {id(param) for param in getattr(wrapper, "_delay_all_reduce_params", ())}
    params = {id(param) for name, param in module.named_parameters() if name in names}
    return (params - delayed) | {id(buffer) for name, buffer in module.named_buffers() if name in names}
