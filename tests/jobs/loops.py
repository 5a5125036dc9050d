# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/loops.md, as they stand, within what each says that a script has.

    loops.py OUT WHICH

twice in one process, the second one with more steps, or epochs: it goes on where the first one ended. Writes what was
committed, and which step the second one restored. The blocks of the package's own page run after that.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job_kit import process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd

sys.path.insert(0, str(Path(__file__).parents[1]))
from kit import snippets  # noqa: E402

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


def accelerated_step(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, batch: torch.Tensor) -> None:
    accelerator.backward(model(batch).square().sum())
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


def batches_of(loader: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def script(which: str, total: int) -> dict[str, Any]:
    """The names that a script has."""
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
    elif which == "Accelerate":
        import accelerate

        held |= {"accelerator": accelerate.Accelerator(cpu=True), "accelerated_step": accelerated_step}
    elif which == "Lightning":
        held |= of_lightning(model)
    return held


def run(which: str, code: str, total: int) -> tuple[int, int]:
    """The step that was committed last, and the one that was restored; 0 for none."""
    held = script(which, total)
    exec(code, held)
    ckpt = held["callback"].engine if which == "Lightning" else held["ckpt"]
    found = re.search(r"step_(\d+)", ckpt.restored_from or "")
    return ckpt.committed_step, int(found[1]) if found else 0


def of_lightning(model: torch.nn.Module) -> dict[str, Any]:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.model(batch).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return {"module": Module(), "Trainer": functools.partial(Trainer, accelerator="cpu", **quiet)}


def enter(folder: str) -> None:
    """Where nothing is saved yet."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)


def run_page(which: str) -> None:
    """What docs/integrations/ has of this package."""
    held = script(which, 3)
    if which == "Accelerate":
        held["loss_of"] = lambda model, batch: model(batch).square().sum()
        assert snippets.run("docs/integrations/accelerate.md 1", held)["ckpt"].committed_step == 3 * 16
    elif which == "Lightning":
        snippets.run("docs/integrations/lightning.md 1", held)
        assert held["trainer"].callbacks[0].engine.committed_step == 3 * 16
    elif which == "DeepSpeed":
        run_page_of_deepspeed(held)


def run_page_of_deepspeed(held: dict[str, Any]) -> None:
    class WithLoss(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.model(batch).square().sum()

    page = "docs/integrations/deepspeed.md"
    held |= {"model": WithLoss(held["model"]), "batches": batches_of(held["loader"]), "epoch": 7}
    if dist.get_rank() == 0:
        Path("ds_config.json").write_text(json.dumps(held["ds_config"] | snippets.members(f"{page} 1")))
    dist.barrier()
    assert snippets.run(f"{page} 1", held)["ckpt"].committed_step == 3
    enter("calls")
    drop_in, load, save = snippets.snippets()[f"{page} 2"].split("\n...\n")
    for loaded in (None, {"epoch": 7}):
        exec(drop_in, held)
        held["engine"], *_ = held["deepspeed"].initialize(
            model=WithLoss(script("DeepSpeed", 3)["model"]), config=held["ds_config"] | snippets.members(f"{page} 2")
        )
        exec(load, held)
        assert held["client_state"] == loaded
        for _ in range(2):
            held["engine"].backward(held["engine"](next(held["batches"])))
            held["engine"].step()
        exec(save, held)
        held["engine"].layerwise.close()


def main(out: str, which: str) -> None:
    with process_group() as rank:
        os.chdir(out)
        code = blocks()[which]
        (first, _), (second, restored) = run(which, code, 3), run(which, code, 5)
        enter("page")
        run_page(which)
        Path(out, f"{rank}.json").write_text(json.dumps([first, restored, second]))


if __name__ == "__main__":
    main(*sys.argv[1:])
