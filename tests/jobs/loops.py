# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/loops.md, as they stand, within what each says that a script has.

    loops.py OUT WHICH

twice in one process, the second one with more steps: it goes on where the first one ended. Writes what was committed.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from job_kit import process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"


def blocks() -> dict[str, str]:
    """The code of each section, by its heading."""
    sections = PAGE.read_text().split("\n## ")[1:]
    return {each.splitlines()[0]: each.split("```python\n")[1].split("```")[0] for each in sections if "```" in each}


def train_step(model: Any, optimizer: Any, scheduler: Any, batch: torch.Tensor) -> None:
    model(batch).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if scheduler is not None:
        scheduler.step()


def engine_step(engine: Any, batch: torch.Tensor) -> None:
    engine.backward(engine(batch).square().sum())
    engine.step()


def batches_of(loader: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def run(which: str, code: str, total: int) -> int:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=4)
    held = {
        "lwd": lwd, "torch": torch, "model": model, "optimizer": optimizer, "total": total, "loader": loader,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "train_step": train_step,
        "engine_step": engine_step, "DistributedDataParallel": DistributedDataParallel, "fully_shard": fully_shard,
    }  # fmt: skip
    draws: dict[int, Any] = {}
    held["next_batch"] = lambda loader: next(draws.setdefault(id(loader), batches_of(loader)))
    if which == "DeepSpeed":
        import deepspeed

        held |= {"deepspeed": deepspeed, "ds_config": {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},  # else one is compiled for minutes
        }}  # fmt: skip
    exec(code, held)
    return held["ckpt"].committed_step


def main(out: str, which: str) -> None:
    with process_group() as rank:
        os.chdir(out)
        code = blocks()[which]
        steps = [run(which, code, 3), run(which, code, 5)]
        Path(out, f"{rank}.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
