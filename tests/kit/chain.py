# SPDX-License-Identifier: Apache-2.0
"""A chain of wide layers that one process trains: with the engine on a disk of any speed, and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import torch
from torch import nn

from layerwise_dist import errors
from layerwise_dist._native import PosixEnv
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly

torch.set_num_threads(1)

WIDTH, LAYERS = 256, 6  # a layer has 512 KiB of weight and momentum


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.BatchNorm1d(WIDTH))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(4, WIDTH, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, param in model.named_parameters():
        held |= {f"{kind}/{name}": value.clone() for kind, value in optimizer.state.get(param, {}).items()}
    return held


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, root: Path, env: Any = None, **options: Any) -> Any:
    base = {
        "dir": str(root),
        "keep_last": 100,
        "writer": {"queue_depth": 1, "block_kb": 64},
        "commit": {"timeout_s": 30.0},
    }
    return assembly.assemble(
        model, optimizer, load_config({**base, **options}), LocalTransport(LocalHub(1), 0), env or PosixEnv()
    )


def slow(seconds: float) -> Any:
    env = testing.FaultEnv(PosixEnv())
    env.delay("write", "*rank_*", seconds)
    return env


def on_a_slow_disk(model: nn.Module, optimizer: torch.optim.Optimizer, root: Path) -> Any:
    """Still writes when the next step begins. Aborted checkpoints are counted, and don't end the job."""
    writer = {"queue_depth": 1, "block_kb": 64, "backend": "posix"}
    return attach(
        model, optimizer, root, slow(0.01), pool_mb=8, fence_timeout_s=5, writer=writer, commit={"raise_after": 1000}
    )


def plain(steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """What a job without the engine holds after each step."""
    model, optimizer = build()
    at = {}
    for step in range(steps):
        update(model, optimizer, step)
        at[step + 1] = tensors(model, optimizer)
    return at


def check_committed(root: Path, steps: int) -> list[int]:
    """Every committed step restores to what a job without the engine holds there.

    What was overwritten before it was read is other values, or a block whose hash was taken before that: either is an
    AssertionError.
    """
    at, found = plain(steps), []
    for step in sorted((int(path.parent.name[5:15]) for path in root.glob("step_*/manifest.json")), reverse=True):
        model, optimizer = build(seed=1)
        with attach(model, optimizer, root) as ckpt:
            try:
                assert ckpt.restore(step) == step
            except errors.DamageError as damage:
                raise AssertionError(f"step {step}") from damage
        assert equal(tensors(model, optimizer), at[step]), f"step {step}"
        found.append(step)
    return found
