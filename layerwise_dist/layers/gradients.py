# SPDX-License-Identifier: Apache-2.0
"""When gradients become ready in a backward, and whether somebody changed them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Arrivals:
    """Watches the gradients of `params` (by name) from one `reset()` to the next; `remove()` ends it.

    The event is torch's post-accumulate hook: after the last use of the parameter, and under FSDP2 after the
    reduction. Under DDP it comes before the reduction, and under FSDP1 not at all: `wrapper_gradients` has others.
    `on_arrival` is called in it with the parameter's name.

    Args:
        exact: also compare numbers, not only version counters: some kernels (GradScaler's unscale) do not count. It
            costs a pass over each gradient when it arrives and another one in `changed()`: for the observation.

    Attributes:
        fires: how often each parameter's gradient was accumulated since the last `reset()`.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        on_arrival: Callable[[str], None] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self._params = dict(params)
        self._on_arrival = on_arrival
        self.exact = exact
        self._hooks = self._register()
        self.reset()

    def _register(self) -> list[Any]:
        """What makes `_fired` be called; each has a `remove()`."""
        return [self._hook(fqn) for fqn, param in self._params.items() if param.requires_grad]

    def _hook(self, fqn: str) -> Any:
        return self._params[fqn].register_post_accumulate_grad_hook(lambda _: self._fired(fqn))

    def expects(self, fqn: str) -> bool:
        """Whether this rank may have a gradient of the parameter: only for those can one wait."""
        return self._params[fqn].requires_grad

    def reset(self) -> None:
        self.fires = dict.fromkeys(self._params, 0)
        self._seen: dict[str, tuple[Any, tuple[int, int]]] = {}  # in the order of the last arrivals
        self._numbers: dict[str, torch.Tensor] = {}

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], {}

    @property
    def order(self) -> list[str]:
        """Names of the parameters whose gradients arrived, by their last arrival."""
        return list(self._seen)

    def changed(self) -> list[str]:
        """Names of those whose `.grad` is not what it was when it last arrived: replaced, removed or written to.

        Without `exact`, what does not count versions is not seen: `.data`, numpy, GradScaler's unscale.
        """
        return [
            fqn
            for fqn, (grad, version) in self._seen.items()
            if self._params[fqn].grad is not grad
            or _version(grad) != version
            or (fqn in self._numbers and not torch.equal(self._numbers[fqn], _numbers(grad)))
        ]

    def accept(self, fqns: Sequence[str]) -> None:
        """Takes these gradients as they are now: some optimizers write into them in their step."""
        for fqn in fqns:
            grad = self._params[fqn].grad
            self._seen[fqn] = (grad, _version(grad))

    def sparse(self) -> list[str]:
        """Names of those whose gradient is sparse."""
        return [fqn for fqn, (grad, _) in self._seen.items() if grad.layout != torch.strided]

    def _fired(self, fqn: str) -> None:
        self.fires[fqn] += 1
        self._seen.pop(fqn, None)
        self._note(fqn)
        if self._on_arrival is not None:
            self._on_arrival(fqn)

    def _note(self, fqn: str) -> None:
        """Takes the gradient as it is now for what arrived."""
        grad = self._params[fqn].grad
        assert grad is not None, "it has arrived"
        self._seen[fqn] = (grad, _version(grad))
        if self.exact and grad.layout == torch.strided:
            self._numbers[fqn] = _numbers(grad)


def _version(grad: Any) -> tuple[int, int]:
    """Of the tensor, and of this rank's part of it if it is a DTensor."""
    return grad._version, getattr(grad, "_local_tensor", grad)._version


def _numbers(grad: Any) -> torch.Tensor:
    """Bits (uint8) that a change of scale of this rank's part of `grad` changes, unless all of it is zero."""
    local = getattr(grad, "_local_tensor", grad).detach()
    return torch.stack((torch.linalg.vector_norm(local), local.abs().sum())).view(torch.uint8)
