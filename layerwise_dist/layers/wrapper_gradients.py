# SPDX-License-Identifier: Apache-2.0
"""Gradients that a wrapper reduces itself: DDP's bucket by bucket, FSDP1's unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks.averaging import Averaging
from layerwise_dist.frameworks.private_names import require
from layerwise_dist.layers.gradients import Arrivals


def watch(
    model: nn.Module, params: Mapping[str, nn.Parameter], on_arrival: Callable[[str], None] | None = None, *,
    exact: bool = False, reduced: bool = False,
) -> Arrivals:  # fmt: skip
    """The `Arrivals` of `model`'s parameters. With `reduced` a gradient that arrives is final under DDP too; otherwise
    only the order counts. Raises UnsupportedError where that cannot be had.
    """
    if reduced and isinstance(model, DistributedDataParallel):
        return BucketArrivals(Averaging.of(model), params, on_arrival, exact=exact)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return UnitArrivals(model, params, on_arrival, exact=exact)
    return Arrivals(params, on_arrival, exact=exact)


class BucketArrivals(Arrivals):
    """Under DDP. A bucket is looked at when a later one begins to be reduced, and at the end of the backward: always on
    the thread of the backward, never on those of the reduction.

    What arrives within the backward is in the bucket, and DDP puts it into `.grad` only at the end. So `.grad` is the
    bucket's until then.
    """

    def __init__(
        self, averaging: Averaging, params: Mapping[str, nn.Parameter], on_arrival: Callable[[str], None] | None, *,
        exact: bool,
    ) -> None:  # fmt: skip
        require("gradients of DistributedDataParallel")
        self._averaging = averaging
        self._names = {id(param): fqn for fqn, param in params.items()}
        self._pending: list[tuple[Sequence[nn.Parameter], Sequence[torch.Tensor], Any]] = []
        self._lent: list[tuple[nn.Parameter, torch.Tensor | None]] = []  # and the `.grad` that was there
        super().__init__(params, on_arrival, exact=exact)

    def _register(self) -> list[Any]:
        return [self._averaging.listen(self._began)]

    def _began(
        self, index: int, params: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor], future: Any
    ) -> None:
        if index == 0:  # of a new backward
            self._give_back()
            self._pending.clear()
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)
        for bucket in [bucket for bucket in self._pending if bucket[2].done()]:
            self._pending.remove(bucket)
            bucket[2].wait()  # raises what went wrong
            self._lend(*bucket[:2])
            self._arrive(bucket[0])
        self._pending.append((params, gradients, future))

    def _lend(self, params: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor]) -> None:
        for param, gradient in zip(params, gradients, strict=True):
            if gradient.layout != torch.strided:
                continue  # nothing is updated with it in a backward
            if param.grad is None or param.grad.data_ptr() != gradient.data_ptr():
                self._lent.append((param, param.grad))
                param.grad = gradient

    def _give_back(self) -> None:
        for param, gradient in self._lent:
            param.grad = gradient
        self._lent.clear()

    def _arrive(self, params: Sequence[nn.Parameter]) -> None:
        for param in params:
            if id(param) in self._names:
                self._fired(self._names[id(param)])

    def _ended(self) -> None:
        """The last node has run. DDP's own callback, which puts gradients into place, comes next, ours after it."""
        self._give_back()
        torch.autograd.Variable._execution_engine.queue_callback(self._in_place)

    def _in_place(self) -> None:
        for fqn in self._seen:
            self._note(fqn)
        pending, self._pending = self._pending, []
        for params, _, _ in pending:
            self._arrive(params)


class UnitArrivals(Arrivals):
    """Under FSDP1 with use_orig_params=True: its units call what stands as an optimizer in a parameter's
    `_in_backward_optimizers`, with the reduced gradient of this rank's part in place.

    A parameter that this rank has nothing of never arrives. Parameters that FSDP ignores arrive as any others, and so
    do flat ones (use_orig_params=False), before they are reduced.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, nn.Parameter], on_arrival: Callable[[str], None] | None, *,
        exact: bool,
    ) -> None:  # fmt: skip
        require("FSDP1")
        self._handles = [
            module._handle
            for module in model.modules()
            if isinstance(module, FullyShardedDataParallel) and module._handle is not None
        ]
        super().__init__(params, on_arrival, exact=exact)

    def expects(self, fqn: str) -> bool:
        return fqn not in self._elsewhere and super().expects(fqn)

    def _register(self) -> list[Any]:
        if any(handle._offload_params for handle in self._handles):
            raise UnsupportedError("FSDP1 with CPU offload drops each gradient that it has announced")
        names = {id(param): fqn for fqn, param in self._params.items()}
        self._elsewhere = {
            names[id(param)]
            for handle in self._handles
            for param, held in zip(handle.flat_param._params or (), handle.flat_param._shard_param_infos, strict=False)
            if not held.in_shard and id(param) in names
        }
        units = [(h, [p for p in h.flat_param._params or () if id(p) in names]) for h in self._handles]
        told = [param for _, params in units for param in params]
        if any(hasattr(param, "_in_backward_optimizers") for param in told):
            raise UnsupportedError("FSDP1 updates in its backward already (_apply_optimizer_in_backward)")
        others = names.keys() - {id(param) for param in told}
        return [
            *(_Told(param, partial(self._fired, names[id(param)])) for param in told),
            *(_Telling(handle) for handle, params in units if params),
            *(self._hook(names[key]) for key in others if self._params[names[key]].requires_grad),
        ]


class _Told:
    """What FSDP1 takes for an optimizer of one parameter."""

    def __init__(self, param: nn.Parameter, call: Callable[[], None]) -> None:
        self._param, self.step = param, call
        param._in_backward_optimizers = [self]  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The gradient stays for the optimizer's step."""

    def remove(self) -> None:
        del self._param._in_backward_optimizers  # type: ignore[attr-defined]


class _Telling:
    """Tells a unit to call, in case that its first forward, in which it looks by itself, is over."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        handle._has_optim_in_backward = True

    def remove(self) -> None:
        self._handle._has_optim_in_backward = False
