# SPDX-License-Identifier: Apache-2.0
"""One package's loop for `bench loops`, beside a loop of one's own, alone in its process:

    python -m layerwise_dist.bench.loops_worker '{"loop": "accelerate", "shape": {...}, "folder": ..., ...}'

Each round trains the same model by each of WAYS in turn, and tells the seconds of a step: of the time between two draws
from the loader, which is where any loop is once a step.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise_dist as lwd
from layerwise_dist.bench.launching import tell
from layerwise_dist.bench.model import GPT, Shape, adamw, windows

WAYS = ("own", "by-hand", "loop", "integration")
_WARM = 8  # steps: three checkpoints are audited in full, and a few more until memory is warm


class _Windows(Dataset[Tensor]):
    def __init__(self, shape: Shape, steps: int) -> None:
        self._all = torch.cat([windows(shape, 1) for _ in range(steps)])

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Tensor:
        return self._all[index]


class _Job:
    """One training of so many measured steps, in an empty folder. `saved`: with a checkpoint each."""

    def __init__(self, shape: Shape, steps: int, folder: Path, *, saved: bool) -> None:
        torch.manual_seed(0)
        self.steps, self.folder = _WARM + steps, folder
        self.drawn: list[float] = []
        self.config: dict[str, Any] | None = None
        if saved:
            self.config = {"dir": str(folder / "checkpoints"), "every_n_steps": 1, "keep_last": 2}
        self.model = GPT(shape)
        self.optimizer = adamw(self.model.parameters(), "foreach")
        self.data, self.batch = _Windows(shape, self.steps), shape.batch

    def collate(self, samples: list[Tensor]) -> Tensor:
        self.drawn.append(time.perf_counter())
        return torch.stack(samples)

    def loader(self) -> DataLoader[Tensor]:
        return DataLoader(self.data, self.batch, collate_fn=self.collate)

    def seconds(self, steps: int) -> float:
        """Of a step, the mean over the last ones."""
        return (self.drawn[-1] - self.drawn[-1 - steps]) / steps


def _by_hand(job: _Job) -> None:
    loader = job.loader()
    ckpt = None
    if job.config is not None:
        ckpt = lwd.attach(job.model, job.optimizer, state={"loader": loader}, **job.config)
        ckpt.restore()
    draws: Iterator[Tensor] = iter(loader)
    for _ in range(job.steps) if ckpt is None else ckpt.steps(job.steps):
        job.model(next(draws)).backward()
        job.optimizer.step()
        job.optimizer.zero_grad()
    if ckpt is not None:
        ckpt.close()


def _accelerate(job: _Job) -> None:
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(job.model, job.optimizer, job.loader())
    ckpt: Any = None
    if job.config is not None:
        integration = importlib.import_module("layerwise_dist.integrations.accelerate")
        ckpt = integration.attach(accelerator, model, optimizer, None, loader, **job.config)
    for _ in range(1) if ckpt is None else ckpt.epochs(1):
        for batch in loader:
            accelerator.backward(model(batch))
            optimizer.step()
            optimizer.zero_grad()
    if ckpt is not None:
        ckpt.close()
    accelerator.free_memory()


def _lightning(job: _Job) -> None:
    lightning: Any = importlib.import_module("lightning")
    base: Any = lightning.LightningModule

    class Module(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gpt = job.model

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.gpt(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer

    callbacks = []
    if job.config is not None:
        integration = importlib.import_module("layerwise_dist.integrations.lightning")
        callbacks.append(integration.LayerwiseCheckpoint(**job.config))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, callbacks=callbacks, enable_checkpointing=bool(callbacks),
        default_root_dir=job.folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), job.loader())


class _WithLoss(nn.Module):
    """As a Trainer wants to be told."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.gpt = model

    def forward(self, windows: Tensor) -> dict[str, Tensor]:
        return {"loss": self.gpt(windows)}


def _transformers(job: _Job) -> None:
    transformers: Any = importlib.import_module("transformers")
    args = transformers.TrainingArguments(
        str(job.folder), use_cpu=True, per_device_train_batch_size=job.batch, max_steps=job.steps, max_grad_norm=0.0,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=_WithLoss(job.model), args=args, train_dataset=job.data, optimizers=(job.optimizer, None),
        data_collator=lambda samples: {"windows": job.collate(samples)},
    )  # fmt: skip
    if job.config is not None:
        importlib.import_module("layerwise_dist.integrations.transformers").attach(trainer, **job.config)
    trainer.train()


LOOPS: dict[str, Callable[[_Job], None]] = {
    "transformers": _transformers, "accelerate": _accelerate, "lightning": _lightning,
}  # fmt: skip


def main() -> None:
    spec = json.loads(sys.argv[1])
    shape, steps, folder = Shape(**spec["shape"]), spec["steps"], Path(spec["folder"])
    for number in range(spec["rounds"] + 1):
        for way in WAYS:
            place = folder / "training"
            place.mkdir()
            job = _Job(shape, steps, place, saved=way in ("by-hand", "integration"))
            (_by_hand if way in ("own", "by-hand") else LOOPS[spec["loop"]])(job)
            tell({"round": number, "way": way, "seconds": job.seconds(steps)})
            del job
            gc.collect()
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
