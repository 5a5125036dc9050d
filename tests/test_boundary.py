# SPDX-License-Identifier: Apache-2.0
"""Where an iteration ends, what is an error there, and what taps and generators keep."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kit.loops import Job, Noisy, Warnings, by_cycle, cycle, progress, seed, shuffled, trial, with_generator
from torch.utils.data import DataLoader

from layerwise_dist.errors import BoundaryError, MismatchError, UnsupportedError
from layerwise_dist.loop import rng
from layerwise_dist.loop.boundary import Boundary, BoundaryMark
from layerwise_dist.loop.loaders import LoaderTap, drawn_by_for
from layerwise_dist.storage import typed_json

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first resume steps it first


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
    with pytest.raises(MismatchError, match="this job has"):
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


def test_random_numbers_that_nobody_saved_at_a_boundary_are_not_given_later_as_if_they_were_of_it() -> None:
    marks: list[BoundaryMark] = []

    def passed(mark: BoundaryMark) -> None:
        marks.append(mark)
        if mark.step == 2:
            mark.state()

    boundary, there = Boundary(passed, {}, log=Warnings(), excuse=lambda: True), []
    for _ in range(2):
        there.append(rng.take())
        boundary.end_step()
        torch.rand(1)
    with pytest.raises(RuntimeError, match="nobody asked for before it was over"):
        marks[0].state()
    assert rng.same(marks[1].state()["rng"], there[1])


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
    rng.put(typed_json.loads(*typed_json.dumps(state)))
    assert draw() == expected


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.SFC64, np.random.Philox, np.random.MT19937])
def test_numpys_global_generator_may_be_of_any_kind(kind: Any) -> None:
    """Numpy tells of all but its first kind by mappings, of which some hold arrays."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(1))
    try:
        state = rng.take()
        assert rng.same(state, rng.take())
        expected = np.random.random(3).tolist()
        assert not rng.same(state, rng.take())
        rng.put(state)
        assert rng.same(state, rng.take()) and np.random.random(3).tolist() == expected
    finally:
        np.random.set_bit_generator(before)
