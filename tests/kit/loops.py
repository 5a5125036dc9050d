# SPDX-License-Identifier: Apache-2.0
"""Training loops as scripts write them, over data and loaders of every kind; and a trial of one.

Each trial runs a loop once, records everything at every boundary, and then, for every boundary, builds the job anew
with other random numbers, restores, and runs the loop to its end. What cannot be exact must have been warned of.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from layerwise_dist.loop import rng
from layerwise_dist.loop.boundary import Boundary, BoundaryMark
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.storage import typed_json

TOTAL = 10  # steps; two and a half epochs of the data below


class Noisy(Dataset):
    """Eight samples, each with noise from all three global generators."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), index / 8) + torch.randn(4) * 0.1 + np.random.rand() * 0.1 + random.random() * 0.1


class Endless(Sampler):
    """A new permutation from the global generator whenever the last one is used up."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


class Stream(IterableDataset):
    """Shuffles with the global generator once; noise per sample only if asked, since replayed noise differs."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in torch.randperm(8).tolist():
            yield torch.full((4,), index / 8) + (torch.randn(4) if self.noise else 0)


class Warnings(list):
    def warning(self, message: str) -> None:
        self.append(message)


class Job:
    """A training script's objects, with the hooks that the engine would set."""

    def __init__(
        self, make_loader: Callable[[], DataLoader], *, attach: tuple[str, ...] = ("train",), total: int = TOTAL
    ) -> None:
        self.total = total
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.loader = make_loader()
        self.val = DataLoader(Noisy(), batch_size=4, shuffle=True)
        self.at: dict[str, Any] = {"epoch": 0, "step": 0}
        self.updated = 0  # losses as of the last update, where an inferred boundary takes its random numbers
        self.losses: list[float] = []
        self.log = Warnings()
        self.marks: list[BoundaryMark] = []
        self.saved: list[dict[str, Any]] = []
        loaders = {"train": self.loader, "val": self.val}
        self.taps = {name: LoaderTap(loaders[name], name) for name in attach}
        self.boundary = Boundary(self.save, self.taps, log=self.log)
        self.model.register_forward_pre_hook(
            lambda module, _: self.boundary.training_forward() if module.training and torch.is_grad_enabled() else None
        )
        self.optimizer.register_step_pre_hook(lambda *_: self.boundary.update_starting())
        self.optimizer.register_step_post_hook(lambda *_: self.done())

    @property
    def objects(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.scheduler

    def done(self) -> None:
        self.updated = len(self.losses)
        self.boundary.update_done()

    def save(self, mark: BoundaryMark) -> None:
        state = mark.state()
        state = typed_json.loads(*typed_json.dumps(state))
        self.marks.append(mark)
        objects = copy.deepcopy([each.state_dict() for each in self.objects])
        self.saved.append(
            {
                "step": mark.step,
                "state": state,
                "objects": objects,
                "at": copy.deepcopy(self.at),
                "losses": self.updated if mark.kind == "inferred" else len(self.losses),
            }
        )

    def restore(self, saved: dict[str, Any]) -> None:
        for each, state in zip(self.objects, saved["objects"], strict=True):
            each.load_state_dict(copy.deepcopy(state))
        self.at.update(copy.deepcopy(saved["at"]))
        self.boundary.start_at(saved["step"])
        self.boundary.restore(copy.deepcopy(saved["state"]))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        loss = self.model(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def update(self, batch: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()

    def end(self) -> None:
        """Let go of workers now: the garbage collector may do it within another job's forked worker. And a boundary
        that is not closed watches all loaders that are started, those of later tests too, until it is collected.
        """
        self.loader._iterator = None
        self.boundary.close(seal=False)

    def evaluate(self, limit: int = 99) -> None:
        self.model.eval()
        with torch.no_grad():
            for batch in itertools.islice(self.val, limit) if limit < 99 else self.val:
                self.losses.append(self.model(batch + torch.randn(4)).mean().item())
        self.model.train()


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def trial(
    make: Callable[[], Job],
    loop: Callable[[Job], None],
    *,
    kind: str,
    warns: str | None = None,
    boundaries: int = TOTAL,
    skip: tuple[int, ...] = (),
) -> Job:
    """Run, then resume from every boundary but those in `skip`; returns the uninterrupted job."""
    seed(1)
    whole = make()
    loop(whole)
    whole.end()
    assert [mark.step for mark in whole.marks] == list(range(1, boundaries + 1))
    assert {mark.kind for mark in whole.marks} <= {kind, "close"}
    assert (len(whole.log) == 0) if warns is None else any(warns in message for message in whole.log), whole.log
    for saved in whole.saved:
        if saved["step"] in skip:
            continue
        seed(1000 + saved["step"])
        again = make()
        again.restore(saved)
        loop(again)
        again.end()
        assert again.losses == whole.losses[saved["losses"] :], f"losses after a resume at boundary {saved['step']}"
        for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs), f"parameters after a resume at boundary {saved['step']}"
        assert again.boundary.completed == boundaries
        for mine, theirs in zip(again.saved, whole.saved[saved["step"] :], strict=True):
            assert equal(mine["state"], theirs["state"]), (
                f"boundary {mine['step']} after a resume at boundary {saved['step']}"
            )
    return whole


def equal(one: Any, other: Any) -> bool:
    """Are two nests of plain values and tensors the same?"""
    if isinstance(one, dict) and "python" in one:
        return rng.same(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def cycle(loader: DataLoader) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def progress(loader: DataLoader) -> Iterator[torch.Tensor]:
    for batch in loader:  # noqa: UP028 (a `yield from` would be another opcode)
        yield batch


def by_steps(job: Job, *, top: bool = False, bottom: bool = False) -> None:
    batches = iter(job.loader)
    for step in job.boundary.steps(job.total):
        if top and step % 3 == 1:
            job.evaluate()
        try:
            batch = next(batches)
        except StopIteration:
            job.scheduler.step()
            batches = iter(job.loader)
            batch = next(batches)
        job.update(batch)
        if bottom and step % 3 == 1:
            job.evaluate()


def by_cycle(job: Job) -> None:
    batches = cycle(job.loader)
    for _ in job.boundary.steps(job.total):
        job.update(next(batches))


def by_zip(job: Job) -> None:
    for _, batch in zip(job.boundary.steps(job.total), cycle(job.loader), strict=False):
        job.update(batch)
        torch.randn(3)


def by_set_epoch(job: Job) -> None:
    """Three epochs, of each of which the sampler is told."""
    while job.at["epoch"] < 3:
        job.loader.sampler.set_epoch(job.at["epoch"])
        for batch in job.loader:
            job.update(batch)
        job.at["epoch"] += 1


def by_epochs(
    job: Job,
    wrap: Callable[[DataLoader], Any] = lambda loader: loader,
    *,
    top: bool = False,
    bottom: bool = False,
    limit: int = 99,
) -> None:
    """Three epochs of four batches, the scheduler on the epoch."""
    while job.at["epoch"] < 3:
        for batch in wrap(job.loader):
            if top:
                job.evaluate(limit)
            job.update(batch)
            job.optimizer.param_groups[0]["lr"] *= 0.95
            if bottom:
                job.evaluate(limit)
        job.scheduler.step()
        job.evaluate()
        job.at["epoch"] += 1


def by_end_step(job: Job, *, top: bool = False) -> None:
    batches = cycle(job.loader)
    while job.boundary.completed < job.total:
        if top:
            torch.randn(1)
        job.update(next(batches))
        torch.randn(3)
        job.scheduler.step()
        job.boundary.end_step()


def prefetching(job: Job, steps: Iterator[int], *, early: bool = False, bottom: bool = False) -> None:
    batches = cycle(job.loader)
    batch = next(batches)
    for step in steps:
        if early:
            ahead = next(batches)
        loss = job.loss(batch)
        if not early:
            ahead = next(batches)
        job.optimizer.zero_grad()
        loss.backward()
        job.optimizer.step()
        if bottom and step % 3 == 1:
            job.evaluate()
        batch = ahead


def shuffled(**options: Any) -> Callable[[], DataLoader]:
    return lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, **options)


def with_generator(**options: Any) -> Callable[[], DataLoader]:
    return lambda: DataLoader(
        Noisy(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5), **options
    )


def own_sampler() -> DataLoader:
    data = Noisy()
    return DataLoader(
        data, batch_size=2, sampler=RandomSampler(data, num_samples=20, generator=torch.Generator().manual_seed(5))
    )


def stateful(**options: Any) -> Callable[[], DataLoader]:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return lambda: module.StatefulDataLoader(Noisy(), batch_size=2, shuffle=True, **options)
