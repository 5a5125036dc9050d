# SPDX-License-Identifier: Apache-2.0
"""Loaders that `state=` does not name: resumed exactly, or warned of."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kit.loops import TOTAL, Job, cycle, seed, shuffled, trial
from torch.utils.data import DataLoader, DistributedSampler

from layerwise_dist.loop import loose as loose_module
from layerwise_dist.loop.put_back import PendingRng

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first resume steps it first


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
    assert DataLoader.__iter__ is not before or loose_module.watching
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
