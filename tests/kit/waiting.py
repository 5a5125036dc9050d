# SPDX-License-Identifier: Apache-2.0
"""A job whose disk is as slow as a test wants it, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import torch
from torch import nn

from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly

torch.set_num_threads(1)

FENCE_S = 0.1


class Job:
    """A model of 256 KiB, in blocks of 32 KiB that are written one after the other: each write may be delayed."""

    def __init__(self, root: Path, transport: LocalTransport | None = None, **config: Any) -> None:
        self.env = testing.FaultEnv(PosixEnv())
        self.model = nn.Linear(256, 256)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        base: dict[str, Any] = {
            "dir": str(root), "fence_timeout_s": FENCE_S, "commit": {"timeout_s": 30.0, "raise_after": 9}, "pool_mb": 8,
            "writer": {"queue_depth": 1, "block_kb": 32, "backend": "posix"}, "keep_last": 99,
        }  # fmt: skip
        self.ckpt = assembly.assemble(
            self.model, self.optimizer, load_config({**base, **config}),
            transport or LocalTransport(LocalHub(1), 0), self.env,
        )  # fmt: skip

    def slow(self, seconds: float = 0.03) -> None:
        self.env.delay("write", "*rank_*", seconds)

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 256)).square().mean().backward()
        self.optimizer.step()

    def to(self, total: int) -> None:
        for _ in self.ckpt.steps(total):
            self.update()

    def held(self) -> list[torch.Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]


def restored(root: Path, step: int) -> list[torch.Tensor]:
    again = Job(root)
    with again.ckpt:
        assert again.ckpt.restore(step) == step
    return again.held()


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
