# SPDX-License-Identifier: Apache-2.0
"""Small models whose layers become ready in ways that are easy to get wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, which has a convolution of its own where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(width, out, 1, bias=False) if width != out else nn.Identity()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """(batch, 3, side, side) to (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = ResidualBlock(4, 4)
        self.layer2 = ResidualBlock(4, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(x.mean((2, 3)))


class Reused(nn.Module):
    """A block used twice, embeddings tied to the output, a parameter of its own, one frozen layer and one not used.

    (batch, length) int64 below 16 to (batch, length, 16).
    """

    def __init__(self, unused: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(8, 16, bias=False)  # registered first, used last
        self.tokens = nn.Embedding(16, 8)
        self.head.weight = self.tokens.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8))
        self.middle = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        if unused:
            self.unused = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(self.tokens(tokens))
        x = x + self.block(x)
        x = x + self.middle(x) * self.scale
        return self.head(x + self.block(x))


class Keeping(torch.optim.Optimizer):
    """Gradient descent with momentum that does what `keep` says after each update of a parameter.

    No subclass of one of torch's: a `step()` that calls another class's runs the hooks of both.
    """

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        number = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    momentum = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                    param.sub_(momentum.mul_(0.9).add_(param.grad), alpha=group["lr"])
                    self.keep(number, param, self.state[param])
                    number += 1

    def keep(self, number: int, param: Tensor, state: dict[Any, Any]) -> None:
        """Of the parameter of that number, those without a gradient not counted."""


class Hollow(Reused):
    """Has parameters without elements: the first and the last to be ready in a layer, one alone in its layer, and a
    frozen one.
    """

    def __init__(self, unused: bool = False) -> None:
        super().__init__(unused)
        self.middle = HollowLinear(8, 8)
        self.alone = HollowSum()
        self.frozen.nothing = nn.Parameter(torch.empty(3, 0), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.alone()


class HollowLinear(nn.Linear):
    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.first, self.last = (nn.Parameter(torch.empty(0, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.last.sum()) + self.first.sum()


class HollowSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))

    def forward(self) -> Tensor:
        return self.nothing.sum()


class Sometimes(nn.Module):
    """(batch, 8) to (batch, 8). In every second iteration it uses neither `other` nor the bias of `always`."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.tensor(1.5))  # without dimensions
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        used = self.calls % 2 == 0
        x = F.linear(x, self.always.weight, self.always.bias if used else None) * self.gain
        return self.other(x) if used else x
