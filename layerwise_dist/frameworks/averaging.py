# SPDX-License-Identifier: Apache-2.0
"""DDP communication hooks that report each bucket: DDP's own averaging, bit for bit, or the script's hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerwise_dist.errors import UnsupportedError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

# Of a bucket: its number in this backward, its parameters, the reduced gradients that will be theirs, and the future
# that says when they are.
Listener = Callable[[int, Sequence[nn.Parameter], Sequence[torch.Tensor], Any], None]
Hook = Callable[[Any, "GradBucket"], torch.futures.Future[Any]]


class Averaging:
    """The hook's state. Listeners hear of each bucket when its reduction has begun, in the backward's thread.

    DDP takes one hook and never gives it back. So there is one of these for a DistributedDataParallel; without a
    listener it averages, and that is all.
    """

    def __init__(self, root: DistributedDataParallel) -> None:
        self._root = root
        self._listeners: list[Listener] = []
        self.silent = False  # whether nobody is told for a while
        self._ready: dict[int, int] = {}  # with gradient_as_bucket_view: where each gradient lay before DDP took it
        for param in root.parameters() if root.gradient_as_bucket_view else ():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._note)

    @staticmethod
    def of(root: DistributedDataParallel) -> Averaging:
        """The one of this model, made if need be. Raises UnsupportedError as `check`."""
        if (found := Averaging.find(root)) is not None:
            return found
        Averaging.check(root)
        state = Averaging(root)
        try:
            root.register_comm_hook(state, _average)
        except RuntimeError as error:
            root._comm_hooks.pop()
            raise UnsupportedError(f"DDP's buckets cannot be followed: {str(error).splitlines()[0]}") from None
        return state

    @staticmethod
    def check(root: DistributedDataParallel) -> None:
        """Raises UnsupportedError with the reason where there can be none."""
        reason = ""
        if Averaging.find(root) is not None:
            return
        if root._comm_hooks:
            reason = (
                "a communication hook is registered, and DDP takes only one: register it with "
                "layerwise_dist.register_comm_hook(model, state, hook)"
            )
        elif root.static_graph:
            reason = "with static_graph=True a backward cannot tell which gradients are still to come"
        elif root.find_unused_parameters:
            reason = "with find_unused_parameters=True a bucket has zeros for parameters that have no gradient"
        elif root.mixed_precision is not None:
            reason = "DDP's mixed precision reduces and casts in its own way"
        elif root._delay_all_reduce_params:
            reason = "some of its parameters are reduced by the script itself"
        if reason:
            raise UnsupportedError(f"DDP's buckets cannot be followed: {reason}")

    @staticmethod
    def find(root: DistributedDataParallel) -> Averaging | None:
        """The one that is registered, if it is."""
        return next((state for _, state in root._comm_hooks if isinstance(state, Averaging)), None)

    def listen(self, listener: Listener) -> Listening:
        """Until `remove()` of what is returned."""
        self._listeners.append(listener)
        return Listening(lambda: self._listeners.remove(listener))

    def run(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self._root._join_config.enable:
            raise UnsupportedError("DDP's join() divides by another number of ranks than in_backward has been told")
        future = self._reduce(bucket)
        for listener in () if self.silent else self._listeners:
            listener(bucket.index(), cast(list[nn.Parameter], bucket.parameters()), bucket.gradients(), future)
        return future

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        group = self._root.process_group
        self._divide(bucket, dist.get_world_size(group))
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def _note(self, param: torch.Tensor) -> None:
        assert param.grad is not None, "it is told when there is one"
        if param.grad.layout == torch.strided:
            self._ready[id(param)] = param.grad.data_ptr()

    def _divide(self, bucket: GradBucket, ranks: int) -> None:
        """Before the sum, as DDP does it: with three ranks or more the bits depend on it. What it copies into the
        bucket it multiplies by 1/ranks; a gradient that lies there already it divides by ranks, which may round
        otherwise.
        """
        if not self._root.gradient_as_bucket_view or bucket.buffer().layout != torch.strided:
            bucket.buffer().mul_(1.0 / ranks)
            return
        for param, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if self._ready.get(id(param)) == gradient.data_ptr():
                gradient.div_(ranks)
            else:
                gradient.mul_(1.0 / ranks)


class Following(Averaging):
    """Does what a hook of the script's does."""

    def __init__(self, root: DistributedDataParallel, state: object, hook: Hook) -> None:
        super().__init__(root)
        self._state, self._hook = state, hook

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self.silent:
            return super()._reduce(bucket)  # a backward that is not the script's: its hook may keep a state
        buffer = bucket.buffer()

        def into_bucket(done: torch.futures.Future[Any]) -> torch.Tensor:
            value = done.value()
            value = value[0] if isinstance(value, (list, tuple)) else value
            if value.data_ptr() != buffer.data_ptr():
                buffer.copy_(value)  # where listeners look for gradients; DDP would copy from the value
            return buffer

        return self._hook(self._state, bucket).then(into_bucket)


def register_comm_hook(model: DistributedDataParallel, state: object, hook: Hook) -> None:
    """Registers a communication hook of the script's as `model.register_comm_hook(state, hook)` does, followed.

    DDP takes one hook only. Of this one it can be told which gradients are reduced when, as `update: in_backward` has
    to know. The hook's results are what they are without this. Raises RuntimeError as DDP's own method, TypeError for
    another model than DistributedDataParallel.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"register_comm_hook: expected a DistributedDataParallel, not {type(model).__name__}")
    model.register_comm_hook(Following(model, state, hook), _average)


@dataclass(frozen=True)
class Listening:
    """As a hook's handle."""

    remove: Callable[[], None]


def _average(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes annotations for types, and these are strings
    return state.run(bucket)
