# SPDX-License-Identifier: Apache-2.0
"""A script of Lightning's that is killed and started again. Every rank tells what it does in OUT/<rank>.jsonl.

lit.py DIR OUT [--kind auto|manual|several] [--epochs N] [--accumulate N] [--die-at MICRO_BATCH] [--die-rank R]
    [--every N] [--plain] [--fsdp1] [--fsdp2] [--endless]
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from job_kit import contents, process_group, teller
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from layerwise_dist.integrations.lightning import LayerwiseCheckpoint


def data(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, 12, generator=generator), torch.randn(size, 3, generator=generator))


class Stream(IterableDataset[Any]):
    """Of no known length, so that the loop draws a batch ahead. Its samples draw random numbers."""

    def __iter__(self) -> Iterator[Any]:
        for x, y in data(46, 5):
            yield x + 0.1 * torch.randn(12), y


class Net(LightningModule):
    def __init__(self, options: argparse.Namespace, tell: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 33), nn.BatchNorm1d(33), nn.Dropout(0.2), nn.Linear(33, 3))
        self.mean = MeanMetric()
        self.automatic_optimization = options.kind == "auto"
        self.options, self.tell, self.used, self.micro = options, tell, 0, 0

    def on_train_start(self) -> None:
        engine: Any = next((each.engine for each in self.trainer.callbacks if hasattr(each, "engine")), None)
        self.tell(start=getattr(engine, "completed", 0))

    def configure_model(self) -> None:
        if self.options.fsdp2:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = (self.net(x) - y).square().mean() + 0.01 * torch.randn(())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("most", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        if not self.automatic_optimization:
            self.by_hand(loss, batch_idx)
        self.tell(
            epoch=self.current_epoch, batch=batch_idx, loss=loss.item().hex(), global_step=self.global_step,
            total=self.trainer.fit_loop.total_batch_idx,
        )  # fmt: skip
        self.used += 1
        if self.used == self.options.die_at:
            engine: Any = next(each for each in self.trainer.callbacks if isinstance(each, LayerwiseCheckpoint)).engine
            if engine.completed:  # on all ranks: one in the next collective does not judge what it has saved
                engine.wait(engine.completed)
            if self.trainer.global_rank == self.options.die_rank:
                os.kill(os.getpid(), signal.SIGKILL)
        return loss if self.automatic_optimization else None

    def by_hand(self, loss: Tensor, batch_idx: int) -> None:
        """A window of batches that crosses epochs' ends; with several optimizers, one of them in every other window."""
        self.manual_backward(loss)
        self.micro += 1
        if self.micro % self.options.accumulate:
            return
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for number, each in enumerate(optimizers):
            if number == 0 or self.micro // self.options.accumulate % 2:
                each.step()
        for each in optimizers:
            each.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["micro"] = self.micro

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.micro = checkpoint["micro"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val", (self.net(x) - y).square().mean() + 0.01 * torch.randn(()), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.tell(epoch_end=self.current_epoch, drawn=torch.rand(()).item().hex())

    def configure_optimizers(self) -> Any:
        if self.options.kind == "several":
            first, last = self.net[0], self.net[3]
            return [
                torch.optim.AdamW([*first.parameters(), *self.net[1].parameters()], lr=1e-2),
                torch.optim.SGD(last.parameters(), lr=1e-2, momentum=0.9),
            ]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.options.kind == "manual":
            return optimizer
        step = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return [optimizer], [
            {"scheduler": step, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "val"},
        ]


class Told(Logger):
    name, version = "told", 0

    def __init__(self, tell: Any) -> None:
        super().__init__()
        self._tell = tell

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._tell(log={name: float(value).hex() for name, value in sorted(metrics.items())}, step=step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def fsdp_on_cpus() -> None:
    """Lightning lets FSDPStrategy run on GPUs only, and without one torch's FSDP wants its device to be named."""

    def wrapped(self: FSDPStrategy, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )

    _AcceleratorConnector._check_strategy_and_fallback = lambda self: None
    FSDPStrategy._setup_model = wrapped


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=3)
    parser.add_argument("--die-at", type=int, default=-1)
    parser.add_argument("--die-rank", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--fsdp1", action="store_true")
    parser.add_argument("--fsdp2", action="store_true")
    parser.add_argument("--endless", action="store_true")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    tell = teller(options.out / f"{rank}.jsonl")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with process_group():
        torch.manual_seed(3)
        module = Net(options, tell)
        torch.manual_seed(100 + rank)
        strategy: Any = "auto"
        if "RANK" in os.environ:
            strategy = DDPStrategy(process_group_backend="gloo")
        if options.fsdp1:
            strategy = FSDPStrategy(process_group_backend="gloo", auto_wrap_policy={nn.Linear})
            fsdp_on_cpus()
        if options.fsdp2:
            strategy = ModelParallelStrategy(tensor_parallel_size=1, data_parallel_size=int(os.environ["WORLD_SIZE"]))
        callbacks: list[Any] = [EarlyStopping("val", patience=100)]
        if not options.plain:
            callbacks.append(LayerwiseCheckpoint(
                options.dir, monitor="val", every_n_steps=options.every,
                commit={"timeout_s": 30.0, "on_failure": "raise"},
            ))  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=strategy,
            max_epochs=options.epochs, callbacks=callbacks, logger=Told(tell), log_every_n_steps=1,
            accumulate_grad_batches=options.accumulate if options.kind == "auto" else 1,
            val_check_interval=1.0 if options.endless else 0.5, num_sanity_val_steps=1, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=not options.plain, inference_mode=False,
        )  # fmt: skip
        train: Any = DataLoader(Stream(), batch_size=4) if options.endless else DataLoader(
            data(46, 5), batch_size=4, shuffle=True
        )  # fmt: skip
        trainer.fit(module, train, DataLoader(data(12, 6), batch_size=4))
        seen = hashlib.sha256()
        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()  # validation leaves its parameters whole
        held = contents(module, *trainer.optimizers)
        for name, value in sorted(held.items()):
            seen.update(name.encode())
            raw = isinstance(value, Tensor) and value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            seen.update(raw or repr(value).encode())
        tell(
            end=True, hash=seen.hexdigest(), global_step=trainer.global_step, epochs=trainer.current_epoch,
            schedules=[repr(each.scheduler.state_dict()) for each in trainer.lr_scheduler_configs],
            early=repr(sorted(callbacks[0].state_dict().items())),
            metrics={name: float(value).hex() for name, value in sorted(trainer.callback_metrics.items())},
        )  # fmt: skip
        del trainer, module, callbacks, train


if __name__ == "__main__":
    main()
