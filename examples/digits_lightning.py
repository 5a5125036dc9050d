# SPDX-License-Identifier: Apache-2.0
"""The CNN of digits_cnn.py in Lightning's Trainer: one callback saves every step, and the best one under a tag.

    python examples/digits_lightning.py --dir checkpoints/digits-lightning

Kill it at any moment and start it again: it resumes within the epoch. Under torchrun it trains one replica a rank:

    torchrun --standalone --nproc-per-node 2 examples/digits_lightning.py --dir checkpoints/digits-lightning-ddp
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from digits_cnn import DigitsCNN, digits
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from layerwise_dist.integrations.lightning import LayerwiseCheckpoint


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.cnn = DigitsCNN()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, classes = batch
        loss = nn.functional.cross_entropy(self.cnn(images), classes)
        if self.global_step % 10 == 0:
            self.print(f"step {self.global_step + 1:3d}  loss {loss.item():.4f}", flush=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, classes = batch
        self.log("right", (self.cnn(images).argmax(1) == classes).float().mean(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.print(f"{self.trainer.callback_metrics['right']:.1%} of the test images are right", flush=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints/digits-lightning", help="directory of the checkpoints")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    train, test = digits()
    # All of the library.
    checkpoints = LayerwiseCheckpoint(args.dir, monitor="right", mode="max")
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), max_epochs=args.epochs, logger=False,
        callbacks=[checkpoints], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Digits(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=100))
    if trainer.is_global_zero and checkpoints.engine is not None:
        print(f"committed: step {checkpoints.engine.committed_step}; best: {checkpoints.best_score:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
