# SPDX-License-Identifier: Apache-2.0
"""DDP's gradient buckets, which decide the order in which more than two ranks add.

DDP lays its buckets out anew after the first iteration, in the order in which gradients became ready. A resumed job
would reduce its first iteration in the first layout, the uninterrupted one reduced it in the second; with three ranks
or more a ring adds an element's parts in an order that depends on its place in the bucket, and the bits differ. So the
order is observed, saved, and taken up by a resumed job before its first iteration.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.frameworks.averaging import Averaging
from layerwise_dist.frameworks.framework import ParamView

log = logging.getLogger("layerwise_dist")


class BucketOrder:
    """`order` lists the parameters in the order of the first synchronised backward, empty until there was one."""

    def __init__(self, root: DistributedDataParallel, params: Sequence[ParamView]) -> None:
        self._root = root
        self._params = {view.fqn: view.param for view in params if view.param.requires_grad}
        self._seen: list[str] = []
        # Without a rebuild there is one layout only, and it depends on the model alone.
        self._rebuilds = root.static_graph or not root.find_unused_parameters
        self._hooks = []
        if self._rebuilds:
            self._hooks = [
                param.register_post_accumulate_grad_hook(lambda _, fqn=fqn: self._ready(fqn))
                for fqn, param in self._params.items()
            ]

    @property
    def order(self) -> list[str]:
        return self._seen if len(self._seen) == len(self._params) else []

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _ready(self, fqn: str) -> None:
        if not self._root.require_backward_grad_sync:
            return
        if fqn not in self._seen:
            self._seen.append(fqn)
        if self.order:
            self.detach()

    def take_up(self, order: list[str]) -> None:
        """Lets DDP see one backward of zeros in the saved order, so that its next forward lays the buckets out by it.

        Collective: one all-reduce of zeros. Gradients are as before when it returns; no hook of the user's runs.
        """
        known = set(order) == set(self._params)
        if not self._rebuilds or self._root._get_ddp_logging_data().get("has_rebuilt_buckets") or not known:
            return
        if torch.distributed.get_world_size(self._root.process_group) > 2:
            ours = Averaging.find(self._root)
            if self._root.static_graph or (self._root._comm_hooks and ours is None):
                what = "static_graph=True" if self._root.static_graph else "a communication hook"
                log.warning(
                    "DistributedDataParallel with %s: its bucket layout cannot be restored, so the first iteration "
                    "after this restore may differ in the last bits from an uninterrupted run",
                    what,
                )
            else:
                if ours is not None:
                    ours.silent = True
                try:
                    self._replay(order)
                finally:
                    if ours is not None:
                        ours.silent = False
        self._seen = list(order)
        self.detach()

    def _replay(self, order: list[str]) -> None:
        self.detach()
        before = {fqn: param.grad for fqn, param in self._params.items()}
        model = self._root._modules["module"]
        was = self._root.training, self._root.require_forward_param_sync
        try:
            for param in self._params.values():
                param.grad = None
            # The stand-in has the parameters' graph and nothing else: not the model's forward, hooks or random draws.
            self._root._modules["module"] = _Zeros([self._params[fqn] for fqn in reversed(order)])
            self._root.training, self._root.require_forward_param_sync = True, False
            with torch.enable_grad():
                self._root.forward().backward()
        finally:
            self._root._modules["module"] = model
            self._root.training, self._root.require_forward_param_sync = was
            for fqn, param in self._params.items():
                param.grad = before[fqn]


class _Zeros(nn.Module):
    """Its backward reaches the parameters in the reverse of the given order: autograd runs the newest node first."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self._parts = tuple(params)  # a tuple, so that they are not registered

    def forward(self) -> torch.Tensor:
        total = torch.zeros((), device=self._parts[0].device)
        for param in self._parts:
            total = total + (param.sum() * 0).to(total)
        return total
