# SPDX-License-Identifier: Apache-2.0
"""Trains a small CNN on real images, scikit-learn's handwritten digits, for two epochs, with a checkpoint every step.

    python examples/digits_cnn.py --dir checkpoints/digits

Interrupt it at any moment, with Ctrl-C or with kill -9, and start it again: it resumes within the epoch, at the newest
committed step, with the batches that were still to come. Started once more when it is done, it only evaluates.
Under torchrun it trains one replica a rank with DDP:

    torchrun --standalone --nproc-per-node 2 examples/digits_cnn.py --dir checkpoints/digits-ddp
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import layerwise_dist as lwd


class DigitsCNN(nn.Module):
    """Two convolutions with batch normalisation over 8 x 8 pixels; ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,497 images to train on and 300 to test with: (n, 1, 8, 8) float32 from 0 to 1, and classes."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(data.target)
    return TensorDataset(images[:-300], classes[:-300]), TensorDataset(images[-300:], classes[-300:])


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Of the model without DDP, whose forward would wait for the other ranks."""
    model.eval()
    with torch.no_grad():
        images, classes = test.tensors
        right = (model(images).argmax(1) == classes).float().mean().item()
    model.train()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints/digits", help="directory of the checkpoints")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if distributed else 0

    torch.manual_seed(0)
    train, test = digits()
    sampler = DistributedSampler(train, seed=0) if distributed else None
    loader = DataLoader(train, batch_size=32, shuffle=sampler is None, sampler=sampler)
    cnn = DigitsCNN()
    model = nn.parallel.DistributedDataParallel(cnn) if distributed else cnn
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    progress = {"epoch": 0}

    # All of the library: attach, restore, close. The loader is named, so its `for` tells where iterations end.
    ckpt = lwd.attach(model, optimizer, dir=args.dir, state={"loader": loader, "progress": progress})
    start = ckpt.restore()
    if rank == 0:
        print(f"starting after step {start}, in epoch {progress['epoch'] + 1}", flush=True)
    while progress["epoch"] < args.epochs:
        if sampler is not None:
            sampler.set_epoch(progress["epoch"])
        for images, classes in loader:
            loss = nn.functional.cross_entropy(model(images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if rank == 0 and ckpt.completed % 10 == 0:
                print(f"step {ckpt.completed + 1:3d}  loss {loss.item():.4f}", flush=True)
        progress["epoch"] += 1
        if rank == 0:
            print(f"epoch {progress['epoch']}: {accuracy(cnn, test):.1%} of the test images are right", flush=True)
    ckpt.close()
    if rank == 0:
        print(f"committed: step {ckpt.committed_step}; test accuracy {accuracy(cnn, test):.4f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
