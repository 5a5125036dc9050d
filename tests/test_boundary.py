"""A resume at any boundary gives the losses and parameters of the run that was never interrupted, bit for bit.

Each trial runs a loop once, records everything at every boundary, and then, for every boundary, builds the job anew
with other random numbers, restores, and runs the loop to its end. What cannot be exact must have been warned of.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from layerwise_dist.errors import BoundaryError, MismatchError, UnsupportedError
from layerwise_dist.loop import loose as loose_module
from layerwise_dist.loop import rng
from layerwise_dist.loop.boundary import Boundary, BoundaryMark
from layerwise_dist.loop.loaders import LoaderTap, drawn_by_for
from layerwise_dist.loop.put_back import PendingRng

try:
    from layerwise_dist.storage import typed_json
except ImportError:
    typed_json = None  # type: ignore[assignment]

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first resume steps it first

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
        state = typed_json.loads(*typed_json.dumps(state)) if typed_json is not None else copy.deepcopy(state)
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
        """Let go of workers now: the garbage collector may do it within another job's forked worker."""
        self.loader._iterator = None

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
    return bool(np.all(one == other))


# -- loops ------------------------------------------------------------------------------------------------------------
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


# -- loaders that state= does not name -------------------------------------------------------------------------------
PLAIN = [torch.full((4,), index / 8) for index in range(8)]  # its samples draw nothing


def loose(data: Any = PLAIN, total: int = TOTAL, **options: Any) -> Callable[[], Job]:
    return lambda: Job(lambda: DataLoader(data, batch_size=2, **options), attach=(), total=total)


def skipping(job: Job, count: int) -> Iterator[torch.Tensor]:
    """What a script does that knows at which step it goes on. The loader is started when the first batch is drawn."""
    while True:
        for number, batch in enumerate(job.loader):
            if number >= count:
                yield batch
        count = 0


def lazily(job: Job) -> None:
    batches = skipping(job, job.boundary.completed % 4)
    for _ in job.boundary.steps(job.total):
        job.update(next(batches))


def before_steps(job: Job, *, reseed: bool = False) -> None:
    def start() -> Iterator[torch.Tensor]:
        if reseed:
            seed(77 + job.boundary.completed // 4)
        return iter(job.loader)

    at_a_turn = reseed and job.boundary.completed % 4 == 0 < job.boundary.completed
    batches = iter(()) if at_a_turn else start()
    for _ in range(job.boundary.completed % 4):
        next(batches)
    for _ in job.boundary.steps(job.total):
        try:
            batch = next(batches)
        except StopIteration:
            batches = start()
            batch = next(batches)
        job.evaluate()  # by a loader that is started and used up in each iteration
        job.update(batch)


def by_zips(job: Job) -> None:
    while job.boundary.completed < job.total:
        skip = job.boundary.completed % 4
        for _, batch in zip(job.boundary.steps(job.total), itertools.islice(job.loader, skip, None), strict=False):
            job.update(batch)


def by_epochs_and_end_step(job: Job, *, anew: bool = False, evaluate: bool = False) -> None:
    while (step := job.boundary.completed) < job.total:
        loader = DataLoader(PLAIN, batch_size=2) if anew else job.loader
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(step // 4)
        for batch in itertools.islice(loader, step % 4, None):
            job.update(batch)
            job.boundary.end_step()
            if job.boundary.completed == job.total:
                break
        if evaluate:
            job.evaluate()


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"shuffle": True}], ids=["plain", "workers", "shuffled"])
def test_a_loader_that_is_started_within_steps_and_not_attached_is_warned_of(options: dict[str, Any]) -> None:
    make = loose(total=3, **options)
    seed(1)
    job = make()
    lazily(job)
    job.end()
    assert len(job.log) == 1 and "DataLoader over list (batch_size=2), which state= does not name" in job.log[0]
    assert "started within an iteration" in job.log[0] and "attach(state=" in job.log[0]


def test_a_second_loader_that_is_started_within_the_for_over_an_attached_one_is_warned_of() -> None:
    job = Job(shuffled())
    extra = cycle(DataLoader(PLAIN, batch_size=2))
    for batch in job.loader:
        job.update(batch + next(extra))
    assert [True] == ["started within an iteration" in message for message in job.log]


@pytest.mark.parametrize(
    ("loop", "make"),
    [
        (before_steps, loose()),
        (by_zips, loose()),
        (lazily, loose(generator=torch.Generator())),
        (lambda job: by_epochs_and_end_step(job, anew=True), loose()),
        (by_epochs_and_end_step, loose(sampler=DistributedSampler(PLAIN, 1, 0, seed=3))),  # type: ignore[arg-type]
        (lambda job: before_steps(job, reseed=True), loose(shuffle=True, total=7)),
        (by_epochs_and_end_step, loose(num_workers=1, total=5)),
    ],
    ids=["before steps", "zip", "own generator", "anew", "DistributedSampler", "seeded", "workers"],
)
def test_loops_that_place_their_loader_themselves_resume_exactly_without_a_warning(
    loop: Callable[[Job], None], make: Callable[[], Job]
) -> None:
    trial(make, loop, kind="explicit", boundaries=make().total)


def test_an_order_from_the_global_generators_that_is_not_attached_is_warned_of() -> None:
    """After the first epoch, whose order the script can bring about as it did at its start."""
    job = loose(shuffle=True, total=4)()
    by_epochs_and_end_step(job)
    assert not job.log
    job.total = 6
    by_epochs_and_end_step(job)
    assert len(job.log) == 1 and "takes its order from the global generators" in job.log[0]


def test_evaluation_between_the_epochs_of_end_step_or_of_steps_is_warned_of() -> None:
    job = loose()()
    by_epochs_and_end_step(job, evaluate=True)
    assert len(job.log) == 1 and "a resume from step 4 is not exact" in job.log[0]
    job = loose()()
    for epoch in range(2):
        batches = iter(job.loader)
        for _ in job.boundary.steps(4 * (epoch + 1)):
            job.update(next(batches))
    assert not job.log
    job.evaluate()
    next(job.boundary.steps(9))
    assert len(job.log) == 1 and "between two loops over steps(): a resume from step 8" in job.log[0]


def test_nothing_tells_of_loaders_once_nobody_watches() -> None:
    gc.collect()  # boundaries of other tests
    before = DataLoader.__iter__
    job = loose()()
    assert DataLoader.__iter__ is not before or loose_module._watches
    job.boundary.close()
    assert list(DataLoader(PLAIN, batch_size=8))[0].shape == (8, 4)


def test_mutation_loaders_that_nobody_watches_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loose_module.LooseLoaders, "boundary", lambda *_, **__: ([], []))
    with pytest.raises(AssertionError):
        test_a_loader_that_is_started_within_steps_and_not_attached_is_warned_of({})
    with pytest.raises(AssertionError, match="were drawn between end_step"):
        test_loops_that_place_their_loader_themselves_resume_exactly_without_a_warning(
            lambda job: by_epochs_and_end_step(job, anew=True), loose()
        )


def test_mutation_numbers_put_back_at_the_forward_instead_of_the_loaders_start_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PendingRng, "at_start", lambda *_: None)
    with pytest.raises(AssertionError, match="after a resume at boundary 4"):
        test_loops_that_place_their_loader_themselves_resume_exactly_without_a_warning(
            lambda job: by_epochs_and_end_step(job, anew=True), loose()
        )


# -- explicit ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loop", [by_steps, by_cycle, by_zip, by_end_step])
@pytest.mark.parametrize(
    "make_loader", [shuffled(), with_generator(), own_sampler], ids=["plain", "generator", "sampler"]
)
def test_explicit_loops_resume_exactly(loop: Callable[[Job], None], make_loader: Callable[[], DataLoader]) -> None:
    trial(lambda: Job(make_loader), loop, kind="explicit")


def test_an_epoch_may_be_a_step() -> None:
    def loop(job: Job) -> None:
        for _ in job.boundary.steps(4):
            for batch in job.loader:
                job.update(batch)
            job.scheduler.step()

    trial(lambda: Job(shuffled()), loop, kind="explicit", boundaries=4)


@pytest.mark.parametrize("attach", [("train",), ("train", "val")])
@pytest.mark.parametrize("where", ["top", "bottom"])
def test_evaluation_within_steps_resumes_exactly(where: str, attach: tuple[str, ...]) -> None:
    trial(lambda: Job(shuffled(), attach=attach), lambda job: by_steps(job, **{where: True}), kind="explicit")


@pytest.mark.parametrize("bottom", [False, True])
def test_a_prefetched_batch_in_steps_is_drawn_again_after_a_resume(bottom: bool) -> None:
    job = trial(
        lambda: Job(shuffled()),
        lambda job: prefetching(job, job.boundary.steps(job.total), bottom=bottom),
        kind="explicit",
    )
    assert {mark.rng_event for mark in job.marks} == {"draw"}


def test_a_batch_drawn_before_the_forward_of_the_one_ahead_is_warned_of() -> None:
    seed(1)
    job = Job(shuffled())
    prefetching(job, job.boundary.steps(3), early=True)
    assert any("ahead" in message for message in job.log)


@pytest.mark.parametrize("after", [True, False])
def test_a_queue_of_two_batches_is_warned_of(after: bool) -> None:
    seed(1)
    job = Job(shuffled())
    batches = iter(job.loader)
    queue = [next(batches), next(batches)]
    for _ in job.boundary.steps(2):
        if not after:
            queue.append(next(batches))
        job.update(queue.pop(0))
        if after:
            queue.append(next(batches))
    assert any("one at most" in message for message in job.log)


def test_random_numbers_between_end_step_and_the_next_draw_are_warned_of() -> None:
    seed(1)
    job = Job(shuffled())
    by_end_step(job, top=True)
    assert len(job.log) == 1 and "end_step()" in job.log[0]


def test_an_endless_sampler_on_the_global_generator_resumes_exactly() -> None:
    trial(lambda: Job(lambda: DataLoader(Noisy(), batch_size=2, sampler=Endless(8))), by_cycle, kind="explicit")


def test_an_endless_sampler_with_workers_yields_the_same_order_after_a_resume() -> None:
    trial(
        lambda: Job(lambda: DataLoader(Noisy(), batch_size=2, sampler=Endless(8), num_workers=1), total=7),
        by_cycle,
        kind="explicit",
        boundaries=7,
    )


def test_a_generator_is_used_between_iter_and_the_first_draw() -> None:
    def loop(job: Job) -> None:
        batches = iter(job.loader)
        for _ in job.boundary.steps(4):
            torch.randn(3)
            job.update(next(batches))

    trial(lambda: Job(shuffled()), loop, kind="explicit", boundaries=4)


def test_a_generator_that_the_data_shares_with_the_loader_comes_back() -> None:
    def make_loader() -> DataLoader:
        generator = torch.Generator().manual_seed(5)
        noise = lambda batch: torch.stack(batch) + torch.rand(4, generator=generator)  # noqa: E731
        return DataLoader(Noisy(), batch_size=2, shuffle=True, generator=generator, collate_fn=noise)

    trial(lambda: Job(make_loader), by_cycle, kind="explicit")
    trial(lambda: Job(make_loader), by_epochs, kind="loader", boundaries=12)


def test_evaluation_batches_drawn_by_hand_are_not_taken_for_prefetched_ones() -> None:
    def loop(job: Job) -> None:
        batches, val = cycle(job.loader), cycle(job.val)
        for step in job.boundary.steps(job.total):
            job.update(next(batches))
            if step % 3 == 1:
                job.losses.append(next(val).sum().item())

    job = trial(lambda: Job(shuffled(), attach=("train", "val")), loop, kind="explicit")
    assert {mark.rng_event for mark in job.marks} == {"boundary"}


def test_evaluation_on_the_training_loader_leaves_its_position() -> None:
    def evaluate(job: Job) -> None:
        with torch.no_grad():
            job.losses.append(sum(batch.sum().item() for batch in job.loader))

    def explicit(job: Job) -> None:
        batches = iter(job.loader)
        for step in job.boundary.steps(4):
            job.update(next(batches))
            if step % 2:
                evaluate(job)

    def by_for(job: Job) -> None:
        while job.at["epoch"] < 2:
            for batch in job.loader:
                job.update(batch)
                evaluate(job)
            job.at["epoch"] += 1

    trial(lambda: Job(shuffled()), explicit, kind="explicit", boundaries=4)
    trial(lambda: Job(shuffled()), by_for, kind="loader", boundaries=8)


def test_an_evaluation_before_the_loop_does_not_use_up_the_restored_random_numbers() -> None:
    def sane(loop: Callable[[Job], None]) -> Callable[[Job], None]:
        return lambda job: (list(job.val), loop(job))[1]

    both = ("train", "val")
    trial(lambda: Job(shuffled(), attach=both), sane(by_end_step), kind="explicit")
    trial(lambda: Job(shuffled(), attach=both), sane(by_epochs), kind="loader", boundaries=12)


# -- loader -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrap",
    [lambda loader: loader, progress, lambda loader: progress(progress(loader))],
    ids=["plain", "tqdm", "nested"],
)
@pytest.mark.parametrize("make_loader", [shuffled(), with_generator()], ids=["plain", "generator"])
def test_for_loops_over_epochs_resume_exactly(
    wrap: Callable[[DataLoader], Any], make_loader: Callable[[], DataLoader]
) -> None:
    trial(lambda: Job(make_loader), lambda job: by_epochs(job, wrap), kind="loader", boundaries=12)


@pytest.mark.parametrize("attach", [("train",), ("train", "val")])
@pytest.mark.parametrize("limit", [99, 1])
@pytest.mark.parametrize("where", ["top", "bottom"])
def test_evaluation_within_the_for_resumes_exactly_and_makes_no_boundary(
    where: str, limit: int, attach: tuple[str, ...]
) -> None:
    trial(
        lambda: Job(shuffled(), attach=attach),
        lambda job: by_epochs(job, limit=limit, **{where: True}),
        kind="loader",
        boundaries=12,
    )


def late(loader: DataLoader) -> Iterator[torch.Tensor]:
    batches = iter(loader)
    torch.randn(3)
    yield from batches


@pytest.mark.parametrize("wrap", [lambda loader: loader, late], ids=["plain", "late"])
def test_epochs_that_are_left_by_break_resume_exactly(wrap: Callable[[DataLoader], Any]) -> None:
    def loop(job: Job) -> None:
        while job.at["epoch"] < 4:
            for batch in wrap(job.loader):
                job.update(batch)
                job.at["batch"] = (job.at.get("batch", 0) + 1) % 2
                if not job.at["batch"]:
                    break
            job.scheduler.step()
            job.evaluate()
            job.at["epoch"] += 1

    trial(lambda: Job(shuffled()), loop, kind="loader", boundaries=7)


def test_accumulation_makes_one_boundary_per_update() -> None:
    def loop(job: Job) -> None:
        while job.at["epoch"] < 3:
            for number, batch in enumerate(job.loader):
                (job.loss(batch) / 2).backward()
                if number % 2:
                    job.optimizer.step()
                    job.optimizer.zero_grad()
            job.at["epoch"] += 1

    trial(lambda: Job(shuffled()), loop, kind="loader", boundaries=6)


def test_a_closure_resumes_exactly() -> None:
    def make() -> Job:
        job = Job(shuffled())
        job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.01, momentum=0.9)  # without the plain hooks
        job.scheduler = torch.optim.lr_scheduler.ExponentialLR(job.optimizer, 0.9)
        return job

    def closed(job: Job, batch: torch.Tensor) -> None:
        def closure() -> torch.Tensor:
            job.optimizer.zero_grad()
            loss = job.loss(batch)
            loss.backward()
            return loss

        job.boundary.update_starting(in_closure=True)
        closure()
        job.boundary.update_starting()
        job.optimizer.step()
        job.done()

    def by_for(job: Job) -> None:
        while job.at["epoch"] < 2:
            for batch in job.loader:
                closed(job, batch)
            job.at["epoch"] += 1

    def by_hand(job: Job) -> None:
        batches = cycle(job.loader)
        while job.at["step"] < TOTAL:
            closed(job, next(batches))
            job.at["step"] += 1

    trial(make, by_for, kind="loader", boundaries=8)
    trial(make, by_hand, kind="inferred", warns="inferred", boundaries=TOTAL - 1)


def test_distributed_sampler_with_set_epoch_resumes_exactly() -> None:
    data = Noisy()

    def make() -> Job:
        return Job(lambda: DataLoader(data, batch_size=1, sampler=DistributedSampler(data, num_replicas=2, rank=1)))

    def loop(job: Job) -> None:
        while job.at["epoch"] < 3:
            job.loader.sampler.set_epoch(job.at["epoch"])
            for batch in job.loader:
                job.update(batch)
            job.at["epoch"] += 1

    trial(make, loop, kind="loader", boundaries=12)

    def endless(job: Job) -> None:
        batches = iter(job.loader)
        for _ in job.boundary.steps(job.total):
            batch = next(batches, None)
            if batch is None:
                job.loader.sampler.set_epoch(job.loader.sampler.epoch + 1)
                batches = iter(job.loader)
                batch = next(batches)
            job.update(batch)

    trial(make, endless, kind="explicit")


@pytest.mark.parametrize("loop", [by_epochs, by_cycle])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes_exactly(loop: Callable[[Job], None], workers: int) -> None:
    # The first random numbers inside the workers are not its promise, so with workers the data is without noise.
    module = pytest.importorskip("torchdata.stateful_dataloader")
    data: Any = Noisy() if workers == 0 else [torch.full((4,), index / 8) for index in range(8)]
    make_loader = lambda: module.StatefulDataLoader(data, batch_size=2, shuffle=True, num_workers=workers)  # noqa: E731
    kind, boundaries = ("loader", 12) if loop is by_epochs else ("explicit", TOTAL)
    trial(
        lambda: Job(make_loader),
        loop,
        kind=kind,
        boundaries=boundaries,
        warns="inside its workers" if workers else None,
        skip=(2, 3, 6, 7, 9) if workers else (),
    )


def test_a_stateful_data_loader_with_a_sampler_of_torch_resumes_exactly() -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    data = Noisy()

    def make_loader() -> DataLoader:
        return module.StatefulDataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, False))

    trial(lambda: Job(make_loader), by_epochs, kind="loader", boundaries=12)


@pytest.mark.parametrize("loop", [by_epochs, by_cycle])
def test_workers_with_noise_of_their_own_resume_exactly(loop: Callable[[Job], None]) -> None:
    kind, boundaries = ("loader", 12) if loop is by_epochs else ("explicit", TOTAL)
    trial(lambda: Job(shuffled(num_workers=2)), loop, kind=kind, boundaries=boundaries, skip=(2, 3, 6, 7, 9))


def test_persistent_workers_give_the_right_order_and_are_warned_of() -> None:
    data = [torch.full((4,), index / 8) for index in range(8)]

    def make_loader() -> DataLoader:
        return DataLoader(data, batch_size=2, shuffle=True, num_workers=1, persistent_workers=True)

    trial(
        lambda: Job(make_loader),
        by_epochs,
        kind="loader",
        boundaries=12,
        warns="persistent workers",
        skip=(2, 3, 6, 7, 10, 11),
    )


def test_an_iterable_dataset_resumes_exactly_or_is_warned_of() -> None:
    make = lambda noise: lambda: Job(lambda: DataLoader(Stream(noise), batch_size=2))  # noqa: E731
    trial(make(False), by_epochs, kind="loader", boundaries=12)
    trial(make(False), by_cycle, kind="explicit")
    trial(make(True), by_epochs, kind="loader", boundaries=12, warns="iterable dataset")


# -- inferred ---------------------------------------------------------------------------------------------------------
def by_hand(job: Job, *, top: bool = False, prefetch: bool = False, epochs: bool = False) -> None:
    """Neither steps() nor a `for`; the script counts its own steps."""
    batches = iter(job.loader) if epochs else cycle(job.loader)
    ahead = next(batches) if prefetch else None
    while job.at["step"] < job.total:
        if top and job.at["step"] % 3 == 1:
            job.evaluate()
        batch = ahead if prefetch else next(batches, None)
        if batch is None:
            batches = iter(job.loader)
            batch = next(batches)
        loss = job.loss(batch)
        if prefetch:
            ahead = next(batches)
        job.optimizer.zero_grad()
        loss.backward()
        job.optimizer.step()
        job.at["step"] += 1


@pytest.mark.parametrize("options", [{}, {"top": True}, {"prefetch": True}, {"epochs": True}], ids=str)
@pytest.mark.parametrize("attach", [("train",), ("train", "val")])
def test_hand_drawn_loops_resume_exactly_with_a_warning(options: dict[str, bool], attach: tuple[str, ...]) -> None:
    trial(
        lambda: Job(shuffled(), attach=attach),
        lambda job: by_hand(job, **options),
        kind="inferred",
        warns="inferred",
        boundaries=TOTAL - 1,
    )


def test_what_an_inferred_boundary_cannot_keep_is_what_its_warning_says() -> None:
    def loop(job: Job) -> None:
        batches = cycle(job.loader)
        while job.at["step"] < job.total:
            job.update(next(batches))
            torch.randn(3)  # between the update and the end of the iteration
            job.at["step"] += 1

    with pytest.raises(AssertionError, match="losses after a resume at boundary 1"):
        trial(
            lambda: Job(shuffled()),
            loop,
            kind="inferred",
            warns="elsewhere than between forward and",
            boundaries=TOTAL - 1,
        )


# -- the end ----------------------------------------------------------------------------------------------------------
def test_break_makes_no_boundary_and_close_seals_what_it_left() -> None:
    seed(1)
    job = Job(shuffled())
    batches = iter(job.loader)
    for step in job.boundary.steps(8):
        job.update(next(batches))
        if step == 2:
            break
    assert len(job.marks) == 2
    assert not job.boundary.close(seal=False) and len(job.marks) == 2
    assert job.boundary.close() and not job.boundary.close()
    assert (job.marks[-1].kind, job.marks[-1].step, job.marks[-1].state()["kind"]) == ("close", 3, "explicit")


def test_a_longer_run_goes_on_exactly_from_what_close_sealed() -> None:
    def loop(job: Job, total: int) -> None:
        done = job.boundary.completed
        while done < total:
            for batch in job.loader:
                job.update(batch)
                done += 1
                if done == total:
                    break

    seed(1)
    whole, short = Job(shuffled()), None
    loop(whole, 8)
    seed(1)
    short = Job(shuffled())
    loop(short, 6)
    assert short.boundary.close() and short.marks[-1].state()["kind"] == "loader"
    seed(3)
    longer = Job(shuffled())
    longer.restore(short.saved[-1])
    loop(longer, 8)
    assert longer.losses == whole.losses[6:]


def test_an_exception_in_the_body_makes_no_boundary() -> None:
    job = Job(shuffled())
    with pytest.raises(ZeroDivisionError):
        for _ in job.boundary.steps(4):
            job.update(next(iter(job.loader)))
            raise ZeroDivisionError
    assert not job.marks


# -- errors -----------------------------------------------------------------------------------------------------------
def test_two_updates_without_steps_are_an_error_and_with_steps_are_not() -> None:
    job = Job(shuffled())
    with pytest.raises(BoundaryError, match=r"steps\(total\)"):
        for batch in job.loader:
            job.update(batch)
            job.update(batch)
    job = Job(shuffled())
    batches = cycle(job.loader)
    for _ in job.boundary.steps(3):
        job.update(next(batches))
        job.update(next(batches))
    job = Job(shuffled())
    job.boundary.explicit()
    for batch in job.loader:
        job.update(batch)
        job.update(batch)
        job.boundary.end_step()
    assert [mark.step for mark in job.marks] == [1, 2, 3, 4]


def test_end_step_after_inferred_boundaries_is_an_error() -> None:
    job = Job(shuffled())
    batch = torch.ones(2, 4)
    job.update(batch)
    job.update(batch)
    with pytest.raises(BoundaryError, match="explicit"):
        job.boundary.end_step()


def test_end_step_within_steps_is_an_error() -> None:
    job = Job(shuffled())
    with pytest.raises(BoundaryError, match="either"):
        for _ in job.boundary.steps(3):
            job.boundary.end_step()


def test_three_boundaries_without_an_update_are_an_error_unless_excused() -> None:
    boundary = Boundary(lambda mark: None, {}, log=Warnings())
    with pytest.raises(BoundaryError, match="no optimizer update"):
        for _ in boundary.steps(5):
            pass
    assert boundary.completed == 2
    marks: list[BoundaryMark] = []
    boundary = Boundary(marks.append, {}, log=Warnings(), excuse=lambda: True)
    assert list(boundary.steps(5)) == [0, 1, 2, 3, 4]
    assert not any(mark.updated for mark in marks)
    boundary = Boundary(lambda mark: None, {}, log=Warnings())
    for _ in boundary.steps(5):
        boundary.update_skipped()
    assert boundary.completed == 5


def test_a_skipped_update_is_an_iteration_of_a_for_loop() -> None:
    job = Job(shuffled())
    for batch in job.loader:
        job.loss(batch).backward()
        job.boundary.update_skipped()
    assert [mark.updated for mark in job.marks] == [False] * 4


def test_another_thread_is_an_error() -> None:
    job, caught = Job(shuffled()), []

    def draw() -> None:
        try:
            next(iter(job.loader))
        except BoundaryError as error:
            caught.append(str(error))

    thread = threading.Thread(target=draw, name="prefetcher")
    thread.start()
    thread.join()
    assert caught and "prefetcher" in caught[0]


def test_two_live_iterators_of_one_loader_are_an_error() -> None:
    job = Job(shuffled())
    with pytest.raises(BoundaryError, match="two live iterators"):
        for _ in zip(job.loader, job.loader, strict=True):
            pass


def test_an_iterator_from_before_restore_is_an_error() -> None:
    job = Job(shuffled())
    by_cycle(job)
    again = Job(shuffled())
    batches = iter(again.loader)
    again.restore(job.saved[4])
    with pytest.raises(BoundaryError, match="made before restore"):
        next(batches)


def test_another_loader_is_a_mismatch() -> None:
    job = Job(shuffled())
    by_cycle(job)
    with pytest.raises(MismatchError, match="generators"):
        Job(with_generator()).restore(job.saved[4])
    shorter = Job(lambda: DataLoader(Noisy(), batch_size=8, shuffle=True))
    shorter.restore(job.saved[6])
    with pytest.raises(MismatchError, match="after 1 batches"):
        iter(shorter.loader)
    with pytest.raises(MismatchError, match="attached are"):
        Job(shuffled(), attach=()).restore(job.saved[4])


# -- the tap and the generators ---------------------------------------------------------------------------------------
def test_a_tapped_loader_is_the_loader_that_it_was() -> None:
    plain = with_generator()()
    seed(1)
    expected = [batch.tolist() for batch in plain]
    loader = with_generator()()
    kept = type(loader)
    tap = LoaderTap(loader, "train")
    assert isinstance(loader, DataLoader) and (type(loader).__name__, type(loader).__qualname__) == (
        "DataLoader",
        "DataLoader",
    )
    assert len(loader) == 4 and loader.batch_size == 2 and len(iter(loader)) == 4
    seed(1)
    loader.generator.manual_seed(5)
    assert [batch.tolist() for batch in loader] == expected
    assert tap.draws == 4 and tap.exhausted and not tap.alive
    twin = copy.deepcopy(loader)
    next(iter(twin))
    assert tap.draws == 4
    tap.detach()
    assert type(loader) is kept
    with pytest.raises(UnsupportedError, match="list"):
        LoaderTap([1, 2], "train")  # type: ignore[arg-type]


def test_an_abandoned_iterator_does_not_count() -> None:
    tap = LoaderTap(shuffled()(), "train")
    first = iter(tap.loader)
    next(first), next(first)
    second = iter(tap.loader)
    next(second)
    assert tap.snapshot()["draws"] == 1
    del second
    assert tap.snapshot()["iterating"] is False


class ByFor:
    def __init__(self) -> None:
        self.seen: set[bool] = set()

    def __iter__(self) -> ByFor:
        self.left = 3
        return self

    def __next__(self) -> int:
        import sys

        self.seen.add(drawn_by_for(sys._getframe(1)))
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return self.left


def _passing(source: ByFor) -> Iterator[int]:
    yield from source


def _by_hand(source: ByFor) -> Iterator[int]:
    it = iter(source)
    while True:
        try:
            yield next(it)
        except StopIteration:
            return


@pytest.mark.parametrize(
    "wrap",
    [
        iter,
        enumerate,
        progress,
        _passing,
        lambda s: enumerate(progress(enumerate(s))),
        lambda s: (x for x in s),
        lambda s: zip(s, range(9), strict=False),
    ],
)
def test_a_for_is_known_through_what_wraps_the_loader(wrap: Callable[[Any], Any]) -> None:
    source = ByFor()
    for _ in wrap(source):
        pass
    assert source.seen == {True}
    source, long_body = ByFor(), "\n".join(f"    x{number} = {number}" for number in range(300))
    exec(f"for _ in wrap(source):\n{long_body}", {"wrap": wrap, "source": source})  # the jump needs EXTENDED_ARG
    assert source.seen == {True}
    source = ByFor()
    wrapped = iter(wrap(source))
    next(wrapped), next(wrapped)
    assert source.seen == {False}


def test_a_next_is_no_for() -> None:
    source = ByFor()
    for _ in _by_hand(source):
        pass
    assert source.seen == {False}


def test_generators_come_back() -> None:
    seed(1)
    np.random.randn()
    random.gauss(0, 1)
    state, glance = rng.take(), rng.glance()

    def draw() -> tuple[Any, ...]:
        return torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()

    expected = draw()
    assert not rng.same(state, rng.take()) and rng.glance() != glance
    rng.put(state)
    assert rng.same(state, rng.take()) and rng.glance() == glance
    assert draw() == expected
    if typed_json is not None:
        rng.put(typed_json.loads(*typed_json.dumps(state)))
        assert draw() == expected
