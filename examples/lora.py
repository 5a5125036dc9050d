# SPDX-License-Identifier: Apache-2.0
"""Adapts a frozen network to new data by layers of low rank (LoRA), with a checkpoint every step.

    python examples/lora.py --dir checkpoints/lora

The frozen weights are most of the model. They are written once: each checkpoint refers to that file, and holds the
adapters and the state of their optimizer only. `layerwise ls` lists both. At the end the adapters are merged into the
weights, which changes them, so that the last checkpoint writes them once more; what no checkpoint refers to is removed.

Interrupt it at any moment, with Ctrl-C or with kill -9, and start it again.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import layerwise_dist as lwd

WIDTH, RANK = 768, 4


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained update of low rank beside it (Hu et al., LoRA, 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merge(self) -> None:
        """The adapter goes into the frozen weight, and begins anew at zero."""
        self.base.weight += self.up.weight @ self.down.weight
        self.up.weight.zero_()


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """1,797 images of (64,) float32 from 0 to 1, their classes, and the same images turned upside down."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return images.flatten(1), torch.tensor(data.target), images.rot90(2, (1, 2)).flatten(1)


def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == classes).float().mean().item()


def pretrained(images: Tensor, classes: Tensor) -> nn.Sequential:
    """What one would load: trained here, for a second, always to the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in torch.randperm(len(images)).split(128):
        nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints/lora", help="directory of the checkpoints")
    parser.add_argument("--steps", type=int, default=150, help="training steps; the adapters are merged after them")
    args = parser.parse_args()

    images, classes, turned = digits()
    backbone = pretrained(images, classes)
    print(f"the backbone: {accuracy(backbone, turned, classes):.1%} of the turned images are right", flush=True)
    model = nn.Sequential(*(LoRALinear(each) if isinstance(each, nn.Linear) else each for each in backbone))
    adapters = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=4e-3)

    ckpt = lwd.attach(model, optimizer, dir=args.dir)
    start = ckpt.restore()
    print(f"starting after step {start}", flush=True)
    for step in ckpt.steps(args.steps + 1):
        batch = torch.randint(len(turned), (64,))
        loss = nn.functional.cross_entropy(model(turned[batch]), classes[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == args.steps:
            for layer in model:
                if isinstance(layer, LoRALinear):
                    layer.merge()
        if step % 25 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
    ckpt.close()
    stats = ckpt.stats()
    print(
        f"frozen weights: {stats['base_bytes'] / 2**20:.1f} MiB, written {stats['bases_written']} time(s) by this run"
    )
    print(f"committed: step {ckpt.committed_step}; accuracy {accuracy(model, turned, classes):.4f}")


if __name__ == "__main__":
    main()
