# SPDX-License-Identifier: Apache-2.0
"""Hooks on model and optimizer: forwards, gradients, and updates."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from layerwise_dist.engine.captures import Captures
from layerwise_dist.engine.rehearsing import Rehearsal
from layerwise_dist.engine.training_thread import TrainingThread
from layerwise_dist.frameworks.compiled import eager
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter, UpdateEvents
from layerwise_dist.loop.boundary import Boundary

_LOOKS = 32  # most in a backward: of 10,000 tensors each one's look would take milliseconds of every step


class Hooks:
    """From `register` until `remove`."""

    def __init__(
        self, framework: Framework, optimizer: OptimizerAdapter, events: UpdateEvents, captures: Captures,
        boundary: Boundary, thread: TrainingThread, rehearsal: Rehearsal | None,
    ) -> None:  # fmt: skip
        self._framework, self._optimizer, self._events = framework, optimizer, events
        self._captures, self._boundary, self._thread = captures, boundary, thread
        self._rehearsal = rehearsal
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """What it has registered when it raises is `remove`'s as well."""
        for root in self._framework.roots:
            self._handles.append(root.register_forward_pre_hook(eager(self._before_forward)))
        for module in self._framework.forward_modules():
            self._handles.append(module.register_forward_hook(eager(self._after_forward)))
        params = self._framework.gradient_ready_params()
        for param in params[:: -(-len(params) // _LOOKS) or 1]:
            self._handles.append(param.register_post_accumulate_grad_hook(self._during_backward))
        self._optimizer.watch(self._events)
        if self._rehearsal is not None:
            self._rehearsal.watch()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._optimizer.detach()
        if self._rehearsal is not None:
            self._rehearsal.detach()

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        self._captures.settle()
        if module.training and torch.is_grad_enabled() and threading.get_ident() == self._thread.ident:
            self._framework.check_forward()
            self._boundary.training_forward()

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._captures.unsettled:
            self._captures.settle()

    def _during_backward(self, param: torch.Tensor) -> None:
        # Without it a checkpoint that is written during the forward would be committed no earlier than the next update.
        if self._captures.unsettled:
            self._captures.settle()
