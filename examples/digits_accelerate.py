# SPDX-License-Identifier: Apache-2.0
"""The CNN of digits_cnn.py in a loop of Hugging Face Accelerate's, with gradient accumulation: one line more.

    python examples/digits_accelerate.py --dir checkpoints/digits-accelerate

Kill it at any moment and start it again: it resumes within the epoch. Under torchrun it trains one replica a rank:

    torchrun --standalone --nproc-per-node 2 examples/digits_accelerate.py --dir checkpoints/digits-accelerate-ddp
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from digits_cnn import DigitsCNN, accuracy, digits
from torch import nn
from torch.utils.data import DataLoader

from layerwise_dist.integrations.accelerate import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints/digits-accelerate", help="directory of the checkpoints")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    train, test = digits()
    cnn = DigitsCNN()
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9)
    loader = DataLoader(train, batch_size=16, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(cnn, optimizer, scheduler, loader)

    # All of the library: attach, the loop over epochs, close.
    ckpt = attach(accelerator, model, optimizer, scheduler, loader, dir=args.dir)
    accelerator.print(f"starting after step {ckpt.completed}", flush=True)
    for epoch in ckpt.epochs(args.epochs):
        for images, classes in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), classes)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and ckpt.completed % 10 == 0:
                accelerator.print(f"step {ckpt.completed + 1:3d}  loss {loss.item():.4f}", flush=True)
        right = accuracy(accelerator.unwrap_model(model), test)
        accelerator.print(f"epoch {epoch + 1}: {right:.1%} of the test images are right", flush=True)
    ckpt.close()
    accelerator.print(f"committed: step {ckpt.committed_step}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
