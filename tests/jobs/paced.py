# SPDX-License-Identifier: Apache-2.0
"""`every_n_steps: auto` in a real job: rank 0's choices are told, those of a script or its own; then resumed.

paced.py OUT      OUT/<rank>.json is what is wrong, and what the ranks must have alike
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from job_kit import process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist.commit import grants
from layerwise_dist.interval import Choice, Pace

STEPS = 45


def job(folder: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Linear(6, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt = lwd.attach(
        model, optimizer, dir=folder, every_n_steps="auto", keep_last=1000, save_last=False, max_in_flight=64, **options
    )
    return model, optimizer, ckpt


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ckpt: Any, total: int) -> list[int]:
    """The interval after each step."""
    seen = []
    for _ in ckpt.steps(total):
        model(torch.randn(2, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seen.append(ckpt.stats()["every_n_steps"])
    return seen


def scripted(folder: str, **options: Any) -> list[Any]:
    """Rank 0 chooses 3, then 7. A monitor grants boundaries far ahead, so that the second may come too late."""
    choices = [Choice(3, "so"), Choice(7, "so")]

    def decide(pace: Pace) -> Choice | None:
        return choices.pop(0) if choices and pace.steps in (10, 3) else None

    with mock.patch.object(Pace, "decide", decide), mock.patch.object(grants, "_GRANT_SECONDS", 0.0):
        model, optimizer, ckpt = job(folder, **options)
        seen = train(model, optimizer, ckpt, STEPS)
        ckpt.close()
    steps = sorted(manifest.step for manifest in ckpt.metadata.inventory().manifests.values())
    return [seen, steps, ckpt.stats()["interval_changes"]]


def resumed(folder: str, **options: Any) -> int:
    """The interval with which the job goes on."""
    _, _, ckpt = job(folder, **options)
    ckpt.restore()
    found = ckpt.stats()["every_n_steps"]
    ckpt.close()
    return int(found)


def main() -> None:
    out = Path(sys.argv[1])
    found: dict[str, Any] = {}
    with process_group() as rank:
        for mode in ("direct", "monitor"):
            folder = [tempfile.mkdtemp(dir=out) if rank == 0 else ""]
            dist.broadcast_object_list(folder)
            found[mode] = scripted(folder[0], mode=mode)
            found[f"{mode} resumed"] = resumed(folder[0], mode=mode)
        folder = [tempfile.mkdtemp(dir=out) if rank == 0 else ""]
        dist.broadcast_object_list(folder)
        model, optimizer, ckpt = job(folder[0], interval={"max_overhead": 0.5, "max_steps": 40})
        found["real"] = train(model, optimizer, ckpt, STEPS)
        ckpt.close()
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
