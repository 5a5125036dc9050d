# SPDX-License-Identifier: Apache-2.0
"""A resume at any boundary gives the losses and parameters of the run that was never interrupted, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kit.drawing import drawn
from kit.loops import (
    TOTAL,
    Endless,
    Job,
    Noisy,
    Stream,
    by_cycle,
    by_end_step,
    by_epochs,
    by_set_epoch,
    by_steps,
    by_zip,
    cycle,
    own_sampler,
    prefetching,
    progress,
    seed,
    shuffled,
    trial,
    with_generator,
)
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first resume steps it first


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
    where: str, limit: int, attach: tuple[str, ...], long: bool
) -> None:
    if limit != drawn([99, 1], f"evaluation at the {where}, {len(attach)} attached") and not long:
        pytest.skip("the other limit was drawn; both with --long")
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

    trial(make, by_set_epoch, kind="loader", boundaries=12)

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
