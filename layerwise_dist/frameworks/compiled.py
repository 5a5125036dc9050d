# SPDX-License-Identifier: Apache-2.0
"""Parts of this package that torch.compile meets in a model, and must leave alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook` for a module's forward, which is never traced.

    Nothing can have been compiled as long as torch's compiler is not even imported, which takes a second.
    """
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def without_compiled_wrapper(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` was given, which is called when the result is; else `model` itself."""
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    while isinstance(model, kind):
        model = model._orig_mod
    return model
