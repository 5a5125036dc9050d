# SPDX-License-Identifier: Apache-2.0
"""Small scripts to rehearse: one that resumes exactly, and others with one fault each.

rehearsed.py NAME [DIR]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import layerwise_dist as lwd

TOTAL = 12
DIR = sys.argv[2] if len(sys.argv) > 2 else "checkpoints"
torch.set_num_threads(1)
torch.manual_seed(0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def clean() -> None:
    model, gen, counts = network(), torch.Generator().manual_seed(3), {"seen": 0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    average = AveragedModel(model)
    state = {"gen": gen, "counts": counts, "scheduler": scheduler}
    ckpt = lwd.attach(models={"model": model, "average": average}, optimizer=optimizer, dir=DIR, state=state)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4, generator=gen))
        scheduler.step()
        average.update_parameters(model)
        counts["seen"] += 4
    ckpt.close()


def unsaved_generator() -> None:
    model, gen = network(), torch.Generator().manual_seed(3)
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4, generator=gen))
    ckpt.close()


class Noisy(Dataset[Tensor]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(4)


def worker_rng() -> None:
    """Persistent workers draw on from epoch to epoch; those of a resumed run begin anew."""
    model = network()
    optimizer = sgd(model.parameters())
    loader = DataLoader(Noisy(), batch_size=4, num_workers=1, persistent_workers=True)
    ckpt = lwd.attach(model, optimizer, dir=DIR, state={"loader": loader})
    ckpt.restore()
    while ckpt.completed < TOTAL:
        for x in loader:
            update(model, optimizer, x)
    ckpt.close()


def loader_outside() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    loader = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4)
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    while ckpt.completed < TOTAL:
        for (x,) in loader:
            update(model, optimizer, x)
            ckpt.end_step()
    ckpt.close()


def time_in_data() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4) + time.time() % 1)
    ckpt.close()


def average_outside() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    average = AveragedModel(model)
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
        average.update_parameters(model)
    ckpt.close()


def dict_order() -> None:
    """A dict that is made from a set has another order in each process."""
    model = network()
    optimizer = sgd(model.parameters())
    sources = {
        name: torch.full((4, 4), len(name) + number / 8) for number, name in enumerate(sorted({*"abcdefghijkl"}))
    }
    mixed = {name: sources[name] for name in {*sources}}
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for step in ckpt.steps(TOTAL):
        update(model, optimizer, list(mixed.values())[step])
    ckpt.close()


def late_set_epoch() -> None:
    """Called when the epoch's order is made already, so that it is the next epoch's."""
    model, progress = network(), {"epoch": 0}
    optimizer = sgd(model.parameters())
    data = TensorDataset(torch.randn(16, 4))
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    ckpt = lwd.attach(model, optimizer, dir=DIR, state={"loader": loader, "progress": progress})
    ckpt.restore()
    while ckpt.completed < TOTAL:
        for (x,) in loader:
            sampler.set_epoch(progress["epoch"])
            update(model, optimizer, x)
        progress["epoch"] += 1
    ckpt.close()


def optimizer_outside() -> None:
    model = network()
    optimizer, other = sgd(model[0].parameters()), sgd(model[3].parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
        model(torch.randn(4, 4)).square().mean().backward()
        other.step()
        other.zero_grad()
    ckpt.close()


def write_in_place() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    model[3].weight.data.mul_(0.5)
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
    ckpt.close()


class Unsteady(nn.Module):
    """An operation that gives other bits each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + int.from_bytes(os.urandom(4), "little") * 1e-12


def unsteady_op() -> None:
    model = nn.Sequential(network(), Unsteady())
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
    ckpt.close()


# -- what else can go wrong -------------------------------------------------------------------------------------------


class Momentary(nn.Module):
    """What it remembers is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.running = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.running = 0.9 * self.running + x.detach().mean(0)
        return x - self.running


def hidden_state() -> None:
    model = nn.Sequential(network(), Momentary())
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
    ckpt.close()


class Source:
    """Its `state_dict()` leaves its generator out."""

    def __init__(self) -> None:
        self.gen, self.drawn = torch.Generator().manual_seed(3), 0

    def draw(self) -> Tensor:
        self.drawn += 1
        return torch.randn(4, 4, generator=self.gen)

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def half_a_state() -> None:
    model, source = network(), Source()
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR, state={"source": source})
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, source.draw())
    ckpt.close()


def schedule_outside() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL)
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    ckpt.restore()
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
        scheduler.step()
    ckpt.close()


def never_restored() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR, fresh=True)
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
    ckpt.close()


def raises_when_resumed() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    ckpt = lwd.attach(model, optimizer, dir=DIR)
    if ckpt.restore():
        raise RuntimeError("no way on from here")
    for _ in ckpt.steps(TOTAL):
        update(model, optimizer, torch.randn(4, 4))
    ckpt.close()


def raises() -> None:
    model = network()
    lwd.attach(model, sgd(model.parameters()), dir=DIR).restore()
    raise RuntimeError("no training today")


def does_not_attach() -> None:
    print("done")


if __name__ == "__main__":
    found: Callable[[], None] = globals()[sys.argv[1]]
    found()
