# SPDX-License-Identifier: Apache-2.0
"""The training job whose power is cut: a small model with a leased, a packed and a frozen layer, AdamW and a scheduler.

What it computes depends on nothing but the step, so every session has the same state after step N.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import layerwise_dist as lwd

DEADLINE_S = 120.0  # of anything in a machine in which every instruction is emulated


class Training:
    """As it is without checkpoints."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(96, 192), nn.Tanh(), nn.Linear(192, 96), nn.Tanh(), nn.Linear(96, 8))
        self.model[2].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.7)

    def train(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.model(torch.randn(4, 96, generator=generator)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def digest(self) -> str:
        """Of all that the training's future depends on."""
        seen = hashlib.sha256()
        for name, param in self.model.named_parameters():
            for key, value in (("", param.detach()), *sorted(self.optimizer.state.get(param, {}).items())):
                seen.update(f"{name} {key} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        rates = [group["lr"] for group in self.optimizer.param_groups]
        seen.update(repr((rates, sorted(self.scheduler.state_dict().items()))).encode())
        return seen.hexdigest()


class Job(Training):
    """With checkpoints of every step in `folder`, until `ckpt.close()`."""

    def __init__(self, folder: str, on_failure: str = "raise", **settings: Any) -> None:
        super().__init__()
        self.ckpt = lwd.attach(
            self.model, self.optimizer, state={"scheduler": self.scheduler}, dir=folder, fence_timeout_s=DEADLINE_S,
            commit={"timeout_s": DEADLINE_S, "on_failure": on_failure}, **settings,
        )  # fmt: skip


def without_dynamo() -> None:
    """An optimizer's first call imports torch._dynamo, which takes minutes in an emulated machine, only to turn it off
    for itself.
    """
    stub = types.ModuleType("torch._dynamo")
    stub.disable = lambda function, *arguments, **options: function  # type: ignore[attr-defined]
    stub.graph_break = lambda: None  # type: ignore[attr-defined]
    sys.modules["torch._dynamo"] = stub


def states(last: int) -> list[str]:
    """Of the training without checkpoints, after each step, the first from before step 1."""
    training, found = Training(), []
    for step in range(last + 1):
        if step:
            training.train(step)
        found.append(training.digest())
    return found


def session(
    folder: str, say: Callable[[str], None], last: int, *, back_by: int = 0, die: bool = False, **settings: Any
) -> None:
    """Goes on to step `last`, from the newest commit or from `back_by` commits before it, telling through `say` what it
    begins and what is promised. It is killed in step `last` if it must `die`.
    """
    job = Job(folder, **settings)
    back = None
    if back_by:
        lineage = list(job.ckpt.metadata.inventory().lineage())
        back = lineage[back_by].step
        say(f"may {back}")
    start = job.ckpt.restore(back)
    promised = start
    if start:
        say(f"may {start}")
        say(f"must {start}")
    for before in job.ckpt.steps(last):
        step = before + 1
        say(f"may {step}")
        job.train(step)
        if step % 3 == 0 and step - 1 > start:
            job.ckpt.wait(step - 1, "committed", timeout=DEADLINE_S)
        committed = job.ckpt.committed_step
        if committed is not None and committed > promised:
            promised = committed
            say(f"must {promised}")
        if die and step == last:
            os.kill(os.getpid(), signal.SIGKILL)
    job.ckpt.wait(last, "committed", timeout=DEADLINE_S)
    say(f"must {last}")
    job.ckpt.close()


def disturbed(folder: str, last: int) -> dict[int, str]:
    """A new job whose script changes a weight that is just being written, after every second step: those checkpoints
    fail, or have the old weight. Returns the digests of all steps.
    """
    job, digests = Job(folder, "warn", audit="always"), {}
    job.ckpt.restore()
    for before in job.ckpt.steps(last):
        if before % 2 == 1:
            job.model[0].weight.data.mul_(1.001)  # of what the step before has saved
        job.train(before + 1)
        digests[before + 1] = job.digest()
    job.ckpt.close()
    return digests


def come_back(folder: str, go_on: bool) -> dict[str, Any]:
    """What a restart finds; if it must `go_on`, what it finds after one more step."""
    job = Job(folder)
    step = job.ckpt.restore()
    found: dict[str, Any] = {"step": step, "digest": job.digest()}
    if go_on:
        for before in job.ckpt.steps(step + 1):
            job.train(before + 1)
            found["trained"] = job.digest()
        job.ckpt.wait(step + 1, "committed", timeout=DEADLINE_S)
    job.ckpt.close()
    if go_on:
        job = Job(folder)
        found["next"] = {"step": job.ckpt.restore(), "digest": job.digest()}
        job.ckpt.close()
    return found
