# SPDX-License-Identifier: Apache-2.0
"""The models that benchmarks train: byte-level GPTs, pre-norm, learned positions, no dropout, tied embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model and what it is fed: `batch` windows of `context` bytes a step, all ranks together."""

    dim: int
    layers: int
    heads: int
    batch: int
    context: int

    @property
    def parameters(self) -> int:
        return 12 * self.layers * self.dim**2 + self.dim * (13 * self.layers + _VOCABULARY + self.context + 2)


# With AdamW 0.41 and 1.18 GB of state; a step takes about 0.8 and 1.2 s on two cores.
SHAPES = {
    "34M": Shape(dim=448, layers=14, heads=7, batch=4, context=128),
    "98M": Shape(dim=672, layers=18, heads=12, batch=2, context=128),
}
QUICK = Shape(dim=64, layers=2, heads=2, batch=2, context=32)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self._heads, dim // self._heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = _Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The loss of predicting each next byte: (batch, length + 1) int64 in, a scalar out; length <= context."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, shape.dim)
        self.positions = nn.Embedding(shape.context, shape.dim)
        self.blocks = nn.ModuleList(_Block(shape.dim, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, _VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, windows: Tensor) -> Tensor:
        tokens, targets = windows[:, :-1], windows[:, 1:]
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def windows(shape: Shape, ranks: int) -> Tensor:
    """A rank's part of a step's input: random bytes, which cost what text costs."""
    return torch.randint(_VOCABULARY, (max(1, shape.batch // ranks), shape.context + 1))


def adamw(params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], implementation: str) -> torch.optim.AdamW:
    """`implementation` is "foreach" or "fused"."""
    kernel: dict[str, Any] = {implementation: True}
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, **kernel)
