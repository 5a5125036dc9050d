# SPDX-License-Identifier: Apache-2.0
"""However often the number of ranks changes within an epoch, its order is dealt out whole, and once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.loops import Job, by_epochs, by_set_epoch, cycle, prefetching, seed, trial
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

import layerwise_dist as lwd
from layerwise_dist.data import ElasticDistributedSampler
from layerwise_dist.errors import MismatchError
from layerwise_dist.loop import elastic
from layerwise_dist.loop.elastic import Elastic, elsewhere
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.restore import sealed_state
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.schemas import fits

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:'set_vital'")
torch.set_num_threads(1)

SIZES = [0, 1, 7, 100]
WORLDS = range(1, 6)


class Numbers(Dataset):
    """Sample k is k."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def samplers(size: int, world: int, **options: Any) -> list[ElasticDistributedSampler]:
    return [ElasticDistributedSampler(Numbers(size), world, rank, **options) for rank in range(world)]


def order_of(size: int, *, shuffle: bool = True, seed: int = 0, epoch: int = 0) -> list[int]:
    """What torch deals out to one rank: all of the epoch."""
    whole = DistributedSampler(Numbers(size), 1, 0, shuffle=shuffle, seed=seed)
    whole.set_epoch(epoch)
    return list(whole)


def together(parts: list[list[int]]) -> list[int]:
    """The places of the order, of what each rank got of it."""
    assert len({len(part) for part in parts}) == 1, "all ranks got equally many"
    return [index for row in zip(*parts, strict=True) for index in row]


def is_whole(dealt: list[int], order: list[int], world: int, drop_last: bool) -> bool:
    """Is it the order, and then the padding that makes it even, or without what is left over?"""
    if drop_last:
        return dealt == order[: len(dealt)] and len(order) - len(dealt) < world
    padding = len(dealt) - len(order)
    return 0 <= padding < world and dealt == (order * (2 + padding))[: len(dealt)] if order else dealt == []


# -- as torch's -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [*SIZES, 3, 64])
def test_from_an_epochs_beginning_it_yields_what_torchs_yields(size: int, drop_last: bool) -> None:
    for world in [*WORLDS, 9]:
        for rank in range(world):
            for options in ({}, {"shuffle": False}, {"seed": 5}):
                both = [
                    kind(Numbers(size), world, rank, drop_last=drop_last, **options)
                    for kind in (DistributedSampler, ElasticDistributedSampler)
                ]
                for epoch in (0, 0, 1, 7):  # twice without set_epoch() too
                    for each in both:
                        each.set_epoch(epoch)
                    assert list(both[0]) == list(both[1]) == list(both[1])
                    assert len(both[0]) == len(both[1])
                    assert both[0].num_samples == both[1].num_samples and both[0].total_size == both[1].total_size


def test_it_takes_torchs_arguments_and_raises_torchs_errors() -> None:
    assert isinstance(ElasticDistributedSampler(Numbers(3), 2, 1, False, 4, True), DistributedSampler)
    with pytest.raises(ValueError, match="Invalid rank 2"):
        ElasticDistributedSampler(Numbers(3), 2, 2)
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        ElasticDistributedSampler(Numbers(3))


# -- the position -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_change_of_world_size_at_any_position_loses_and_repeats_nothing(size: int, drop_last: bool) -> None:
    for epoch, shuffle in ((0, True), (3, True), (0, False)):
        order = order_of(size, shuffle=shuffle, epoch=epoch)
        for world in WORLDS:
            olds = samplers(size, world, shuffle=shuffle, drop_last=drop_last)
            for each in olds:
                each.set_epoch(epoch)
            parts = [list(each) for each in olds]
            for samples in range(len(olds[0]) + 1):
                seen = together([part[:samples] for part in parts])
                position = olds[0].position(0, samples)
                assert position == min(len(seen), size)
                for other in WORLDS:
                    news = samplers(size, other, shuffle=shuffle, drop_last=drop_last)
                    for each in news:
                        each.set_epoch(epoch)
                        each.start_at(position)
                        assert each.begin == position
                    lengths = [len(each) for each in news]
                    rest = together([list(each) for each in news])
                    assert lengths == [len(each) for each in news] == [len(rest) // other] * other
                    if rest or position < size:
                        assert is_whole(seen + rest, order, other, drop_last), (world, samples, other)
                    else:
                        assert is_whole(seen, order, world, drop_last)
                    if other == world:
                        assert seen + rest == together(parts), "as if nothing had been"


@pytest.mark.parametrize("drop_last", [False, True])
def test_several_changes_in_one_epoch_lose_and_repeat_nothing(drop_last: bool) -> None:
    draw = random.Random(0)
    for _ in range(200):
        size, epoch = draw.choice([5, 7, 31, 100]), draw.randrange(3)
        order, dealt, position, world = order_of(size, epoch=epoch), [], 0, 1
        for last in (False, False, False, True):
            world = draw.choice(WORLDS)
            ranks = samplers(size, world, drop_last=drop_last)
            for each in ranks:
                each.set_epoch(epoch)
                each.start_at(position)
            samples = len(ranks[0]) if last else draw.randrange(len(ranks[0]) + 1)
            dealt += together([list(each)[:samples] for each in ranks])
            position = ranks[0].position(position, samples)
            if position == size:
                break
        assert is_whole(dealt, order, world, drop_last)


def test_only_the_next_iteration_begins_there() -> None:
    plain = list(DistributedSampler(Numbers(100), 2, 0))
    (sampler, _) = samplers(100, 2)
    sampler.start_at(40)
    iter(sampler)  # of which nothing is drawn
    assert list(sampler) == plain[20:] and len(sampler) == 30
    assert list(sampler) == plain and len(sampler) == 50
    sampler.start_at(40)
    sampler.set_epoch(0)  # as a resumed script does
    assert len(sampler) == 30 and list(sampler) == plain[20:]
    sampler.start_at(40)
    sampler.set_epoch(1)
    assert sampler.begin == 0 and len(sampler) == 50
    sampler.set_epoch(0)
    assert list(sampler) == plain
    for wrong in (-1, 101):
        with pytest.raises(ValueError, match=f"position {wrong} is not within the epoch: the data set has 100 samples"):
            sampler.start_at(wrong)


# -- loaders ----------------------------------------------------------------------------------------------------------
class Ranks:
    """The loaders of one job, each with its tap."""

    def __init__(self, size: int, world: int, batch_size: int | None, *, kind: Any = None, workers: int = 0,
                 sampler: Any = ElasticDistributedSampler, epoch: int = 0, persistent: bool = False,
                 drop_last: bool = False, batches: Callable[..., Any] | None = None,
                 **options: Any) -> None:  # fmt: skip
        self.batch_size, self.taps = batch_size, []
        for rank in range(world):
            dealer = sampler(Numbers(size), world, rank, **options)
            dealer.set_epoch(epoch)
            how: dict[str, Any] = {"batch_size": batch_size, "sampler": dealer, "drop_last": drop_last}
            if batches is not None:
                how = {"batch_sampler": batches(dealer, batch_size, drop_last)}
            loader = (kind or DataLoader)(
                Numbers(size), num_workers=workers, persistent_workers=persistent, **how,
                generator=torch.Generator().manual_seed(rank),
            )  # fmt: skip
            self.taps.append(LoaderTap(loader, "train"))
        self.iterators: list[Any] = []

    def draw(self, batches: int | None = None) -> list[int]:
        """The places that all ranks get with so many batches more, or with all."""
        self.iterators = self.iterators or [iter(tap.loader) for tap in self.taps]
        return together([numbers(each, batches) for each in self.iterators])

    def saved(self) -> dict[int, dict[str, Any]]:
        states = {rank: {"train": tap.snapshot()} for rank, tap in enumerate(self.taps)}
        read = typed_json.loads(*typed_json.dumps(states))
        for each in read.values():
            fits(sealed_state.LOADERS[each["train"]["kind"]], each["train"], "state")
        return read

    def restore(self, saved: dict[int, dict[str, Any]], choices: dict[str, str] | None = None) -> Ranks:
        """In a job of another world size, or as it is."""
        for rank, tap in enumerate(self.taps):
            state = saved[rank] if len(saved) == len(self.taps) else elsewhere(saved, rank, choices)
            tap.check(state["train"])
            tap.restore(state["train"])
        return self

    def end(self) -> None:
        self.iterators = []
        for tap in self.taps:
            tap.loader._iterator = None


def numbers(batches: Iterable[torch.Tensor], limit: int | None) -> list[int]:
    found: list[int] = []
    while limit is None or limit:
        batch = next(batches, None)  # type: ignore[call-overload]
        if batch is None:
            break
        found += batch.flatten().tolist()
        limit = None if limit is None else limit - 1
    return found


def change(size: int, worlds: list[int], batch_sizes: list[int | None], draws: list[int], **options: Any) -> list[int]:
    """One epoch, in which the job goes on elsewhere after so many batches; what it dealt out."""
    ranks, dealt = Ranks(size, worlds[0], batch_sizes[0], **options), []
    for world, batch_size, count in zip(worlds[1:], batch_sizes[1:], draws, strict=True):
        dealt += ranks.draw(count)
        saved = ranks.saved()
        ranks.end()
        ranks = Ranks(size, world, batch_size, **options).restore(saved)
    dealt += ranks.draw()
    ranks.end()
    return dealt


@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
@pytest.mark.parametrize("size", SIZES)
def test_loaders_go_on_elsewhere_after_any_number_of_batches(size: int, batch_size: int | None) -> None:
    order = order_of(size, epoch=2)
    for world, other in ((1, 2), (2, 1), (3, 2), (2, 5), (4, 3)):
        batches = math.ceil(math.ceil(size / world) / (batch_size or 1))
        for count in sorted({*range(min(batches + 1, 6)), batches}):
            dealt = change(size, [world, other], [batch_size] * 2, [count], epoch=2)
            ended = count == batches
            assert is_whole(dealt, order, world if ended else other, False), (world, other, count)


def test_the_batch_size_may_change_with_the_ranks_or_without_them() -> None:
    order = order_of(100)
    assert is_whole(change(100, [4, 2], [3, 6], [3]), order, 2, False)
    assert is_whole(change(100, [2, 2], [4, 3], [3]), order, 2, False)
    assert is_whole(change(100, [4, 1, 3, 3, 5], [2, None, 7, 4, 1], [3, 11, 1, 2]), order, 5, False)


def test_a_batch_that_drop_last_would_drop_is_dealt_out_if_it_fills_elsewhere() -> None:
    """20 samples to two ranks, in batches of 4: two of each are dropped. One rank alone has a whole batch of these."""
    order = order_of(20)
    assert change(20, [2, 2], [4, 4], [2], drop_last=True) == order[:16]
    assert change(20, [2, 1], [4, 4], [2], drop_last=True) == order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_what_workers_have_ready_is_not_consumed(workers: int, persistent: bool) -> None:
    if persistent and not workers:
        return
    order = order_of(40, epoch=1)
    options: dict[str, Any] = {"epoch": 1, "workers": workers, "persistent": persistent}
    assert is_whole(change(40, [2, 1, 2], [3, 3, 3], [3, 1], **options), order, 2, False)
    assert change(40, [2, 1], [20, 20], [1], **options) == order


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_tells_by_itself_goes_on_elsewhere(workers: int) -> None:
    kind = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    order = order_of(40)
    assert is_whole(change(40, [2, 3, 1], [3, 3, 2], [3, 1], kind=kind, workers=workers), order, 1, False)
    assert is_whole(change(40, [2, 2, 1], [3, 3, 2], [3, 1], kind=kind, workers=workers), order, 1, False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stateful", [False, True])
def test_after_a_change_a_resume_with_the_same_ranks_yields_what_the_job_yielded(stateful: bool, workers: int) -> None:
    kind = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader if stateful else None
    options: dict[str, Any] = {"kind": kind, "workers": workers}
    first = Ranks(40, 3, 2, **options)
    first.draw(2)
    saved = first.saved()
    whole, again = Ranks(40, 2, 2, **options).restore(saved), Ranks(40, 2, 2, **options).restore(saved)
    assert again.saved()[0]["train"]["elastic"] == whole.saved()[0]["train"]["elastic"], "restored and not drawn from"
    begun = whole.draw(2)
    middle = whole.saved()
    rest = whole.draw()
    assert begun + rest == again.draw()
    assert Ranks(40, 2, 2, **options).restore(middle).draw() == rest
    third = Ranks(40, 2, 2, **options).restore(middle)
    third.draw(1)
    last = third.saved()
    assert last[0]["train"]["elastic"]["position"] == 12 + 8 + 4
    assert rest[:4] + Ranks(40, 1, 2, **options).restore(last).draw() == order_of(40)[20:]
    for each in (first, whole, again, third):
        each.end()


def test_the_next_epoch_begins_at_its_beginning() -> None:
    ranks = Ranks(10, 2, 2)
    ranks.draw(2)
    alone = Ranks(10, 1, 2).restore(ranks.saved())
    (tap,) = alone.taps
    assert len(tap.loader) == 1
    assert [batch.tolist() for batch in tap.loader] == [order_of(10)[8:]]
    between = alone.saved()
    for resumed in (tap, Ranks(10, 1, 2).restore(between).taps[0]):
        assert numbers(iter(resumed.loader), None) == order_of(10)
        resumed.loader.sampler.set_epoch(1)
        assert numbers(iter(resumed.loader), None) == order_of(10, epoch=1)
    assert Ranks(10, 2, 5).restore(between).draw() == order_of(10), "between two epochs"


def test_an_epoch_that_was_at_its_end_yields_nothing_elsewhere() -> None:
    ranks = Ranks(10, 3, 2)
    ranks.draw(2)
    assert ranks.saved()[0]["train"]["elastic"]["position"] == 10
    assert Ranks(10, 2, 2).restore(ranks.saved()).draw() == []


def test_replicas_may_be_fewer_than_ranks() -> None:
    """Two ranks of one tensor-parallel group get the same samples; the same ranks may then be two replicas."""
    order = order_of(12)
    alike = [Ranks(12, 1, 2).taps[0] for _ in range(2)]
    its = [iter(tap.loader) for tap in alike]
    assert [numbers(it, 2) for it in its] == [order[:4]] * 2
    saved = {rank: {"train": tap.snapshot()} for rank, tap in enumerate(alike)}
    assert Ranks(12, 2, 2).restore(saved).draw() == order[4:]


def test_workers_elsewhere_draw_other_numbers_than_before_and_no_two_ranks_the_same() -> None:
    ranks = Ranks(40, 2, 2)
    ranks.draw(2)
    saved = ranks.saved()
    begun = [elsewhere(saved, rank)["train"]["start"] for rank in range(4)]
    then = [each["train"]["start"] for each in saved.values()]
    assert len({start["own"]["loader"].numpy().tobytes() for start in [*begun, *then]}) == 6
    assert len({start["rng"]["torch"].numpy().tobytes() for start in begun}) == 4
    now = [elsewhere(saved, rank)["train"]["now"]["own"]["loader"] for rank in range(4)]
    assert [torch.equal(now[rank], saved[rank]["train"]["now"]["own"]["loader"]) for rank in range(2)] == [True] * 2
    assert len({each.numpy().tobytes() for each in now}) == 4
    same = {rank: saved[0] for rank in range(2)}
    kept = elsewhere(same, 3)["train"]["now"]["own"]["loader"]
    assert torch.equal(kept, saved[0]["train"]["now"]["own"]["loader"]), "what all had alike is everybody's"


# -- loops ------------------------------------------------------------------------------------------------------------
def test_a_resume_with_the_same_ranks_is_as_exact_as_with_torchs() -> None:
    data = [torch.full((4,), index / 8) for index in range(8)]

    def make() -> Job:
        return Job(lambda: DataLoader(data, batch_size=1, sampler=ElasticDistributedSampler(data, 2, 1)))

    trial(make, by_set_epoch, kind="loader", boundaries=12, skip=(1, 3, 5, 7, 9, 11))
    dealt = trial(make, by_epochs, kind="loader", boundaries=12, skip=(2, 4, 6, 8, 10, 12))
    plain = trial(
        lambda: Job(lambda: DataLoader(data, batch_size=1, sampler=DistributedSampler(data, 2, 1))),
        by_epochs, kind="loader", boundaries=12, skip=tuple(range(1, 13)),
    )  # fmt: skip
    assert dealt.losses == plain.losses


@pytest.mark.parametrize("loop", ["for", "accumulating", "prefetching"])
def test_a_loop_goes_on_elsewhere_with_what_it_has_not_trained_on(loop: str) -> None:
    data = [torch.full((4,), index / 16) for index in range(16)]
    order = order_of(16)
    steps, samples = {"for": (3, 12), "accumulating": (2, 8), "prefetching": (3, 12)}[loop]

    def run(job: Job) -> None:
        if loop == "prefetching":
            prefetching(job, job.boundary.steps(steps))
            return
        batches = iter(job.loader)
        for step, batch in enumerate(batches if loop == "accumulating" else job.loader):
            if loop == "accumulating":
                job.loss(batch).backward()
                job.update(next(batches))
            else:
                job.update(batch)
            if step == steps:
                break

    saved = {}
    for rank in range(2):
        seed(rank)
        job = Job(lambda rank=rank: DataLoader(data, batch_size=2, sampler=ElasticDistributedSampler(data, 2, rank)))
        run(job)
        (state,) = (
            each["state"] for each in job.saved if each["step"] == samples // (8 if loop == "accumulating" else 4)
        )
        saved[rank] = state["loaders"]
    alone = Job(lambda: DataLoader(data, batch_size=4, sampler=ElasticDistributedSampler(data, 1, 0)))
    state = {**state, "loaders": elsewhere(saved, 0)}
    alone.boundary.start_at(3)
    alone.boundary.restore(state)
    got = [int(row[0] * 16) for batch in alone.loader for row in batch]
    assert got == order[samples:]
    assert [int(row[0] * 16) for row in next(cycle(alone.loader))] == order[:4]


def test_another_epoch_after_a_restore_gives_the_place_up_and_is_warned_of() -> None:
    ranks = Ranks(40, 2, 2, epoch=3)
    ranks.draw(2)
    for world in (1, 2):
        saved = ranks.saved()
        other = Ranks(40, world, 2).restore(saved)
        for tap in other.taps:
            tap.loader.sampler.set_epoch(0)
        assert is_whole(other.draw(), order_of(40), world, False)
        doubts = {tap.doubt for tap in other.taps}
        assert doubts == {
            "set_epoch(0) came after restore(), and the checkpoint stands at sample 8 of epoch 3; the rest of it "
            "is left out"
        }
    back = Ranks(40, 1, 2).restore(ranks.saved())
    back.taps[0].loader.sampler.set_epoch(0)
    back.taps[0].loader.sampler.set_epoch(3)
    assert back.draw() == order_of(40, epoch=3)[8:] and back.taps[0].doubt is None
    ranks.draw(8)
    over = Ranks(40, 1, 2).restore(ranks.saved())
    over.taps[0].loader.sampler.set_epoch(4)
    assert over.draw() == order_of(40, epoch=4) and over.taps[0].doubt is None, "nothing was left"


def test_another_batch_size_goes_on_within_the_epoch_of_a_checkpoint(tmp_path: Path) -> None:
    def attached(batch_size: int) -> tuple[Any, Callable[[int], list[int]]]:
        data = [torch.full((4,), index / 32) for index in range(32)]
        loader = DataLoader(data, batch_size=batch_size, sampler=ElasticDistributedSampler(data, 1, 0))
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ckpt = lwd.attach(model, optimizer, dir=str(tmp_path), state={"loader": loader})

        def train(batches: int) -> list[int]:
            seen: list[int] = []
            for batch in loader:
                seen += [int(row[0] * 32) for row in batch]
                optimizer.zero_grad()
                model(batch).sum().backward()
                optimizer.step()
                batches -= 1
                if not batches:
                    break
            return seen

        return ckpt, train

    ckpt, train = attached(3)
    with ckpt:
        seen = train(4)
    for batch_size, batches in ((5, 2), (5, 1), (4, 9)):
        ckpt, train = attached(batch_size)
        with ckpt:
            assert ckpt.restore() > 0
            seen += train(batches)
    assert seen == order_of(32)


# -- what is refused --------------------------------------------------------------------------------------------------
class Reading(BatchSampler):
    """Takes samples ahead, and yields them sorted."""

    def __iter__(self) -> Any:
        taken = sorted(self.sampler)
        yield from (taken[at : at + self.batch_size] for at in range(0, len(taken), self.batch_size))


class Backwards(ElasticDistributedSampler):
    def __iter__(self) -> Any:
        return iter(reversed(list(super().__iter__())))


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": DistributedSampler},
        {"sampler": Backwards},
        {"batches": Reading},
        {"batches": lambda dealer, size, drop: BatchSampler(RandomSampler(dealer.dataset), size, drop)},
        {"batches": lambda dealer, size, drop: BatchSampler(SequentialSampler(dealer.dataset), size, drop)},
    ],
    ids=["DistributedSampler", "subclass", "batches", "random", "sequential"],
)
def test_another_sampler_within_an_epoch_is_refused_by_name_and_has_ways_out(
    options: dict[str, Any],
) -> None:
    ranks = Ranks(40, 2, 2, **options)
    assert is_refused(ranks.saved()) is None, "nothing is drawn"
    ranks.draw(2)
    saved = ranks.saved()
    said = str(is_refused(saved))
    assert "'train' stands within an epoch" in said and "data.ElasticDistributedSampler" in said and "'anew'" in said
    anew = Ranks(40, 1, 2, **options).restore(saved, {"train": "anew"})
    assert len(anew.draw()) == 40
    ranks.draw()
    assert is_refused(ranks.saved()) is None, "between two epochs"
    with pytest.raises(ValueError, match="choices are 'anew', 'rank0', not 'no'"):
        elsewhere(saved, 0, {"train": "no"})


def is_refused(saved: dict[int, dict[str, Any]]) -> MismatchError | None:
    for rank in range(5):
        try:
            elsewhere(saved, rank)
        except MismatchError as error:
            return error
    return None


def test_loaders_that_yield_the_same_on_all_ranks_go_on_as_rank_0s() -> None:
    ranks = [Ranks(40, 1, 2, sampler=lambda data, *_: unsplit(data)).taps[0] for _ in range(2)]
    its = [iter(tap.loader) for tap in ranks]
    assert [numbers(it, 3) for it in its] == [list(range(6))] * 2
    saved = {rank: {"train": tap.snapshot()} for rank, tap in enumerate(ranks)}
    other = Ranks(40, 1, 2, sampler=lambda data, *_: unsplit(data))
    assert other.restore(saved, {"train": "rank0"}).draw() == list(range(6, 40))


def unsplit(data: Numbers) -> Any:
    sampler: Any = SequentialSampler(data)
    sampler.set_epoch = lambda epoch: None
    return sampler


def test_torchs_sampler_is_replaced_where_the_ranks_are_the_same_and_then_they_may_change() -> None:
    ranks = Ranks(40, 2, 2, sampler=DistributedSampler)
    begun = ranks.draw(2)
    replaced = Ranks(40, 2, 2).restore(ranks.saved())
    begun += replaced.draw(1)
    assert begun + Ranks(40, 1, 2).restore(replaced.saved()).draw() == order_of(40)


def test_the_same_ranks_as_other_replicas_are_refused_and_as_the_same_replicas_more_ranks_may_go_on() -> None:
    """Four ranks, two replicas of two tensor-parallel ranks each, and no longer four replicas."""

    def job(ranks: int, replicas: int, sampler: Any = DistributedSampler) -> Ranks:
        return Ranks(40, ranks, 2, sampler=lambda data, _, rank: sampler(data, replicas, rank % replicas))

    four = job(4, 4)
    begun = four.draw(2)
    for dealer in (DistributedSampler, ElasticDistributedSampler):
        with pytest.raises(
            MismatchError, match="'train' stands within an epoch that was divided among 4 replicas, here"
        ):
            job(4, 2, dealer).restore(four.saved())
        with pytest.raises(MismatchError, match="here it would be among 2"):
            job(2, 2, dealer).restore(four.saved(), {"train": "rank0"})
    with pytest.raises(MismatchError, match="whoever draws"):
        job(4, 1, lambda data, *_: unsplit(data)).restore(four.saved())
    eight = job(8, 4).restore(four.saved(), {"train": "rank0"})
    assert begun + together([numbers(iter(tap.loader), None) for tap in eight.taps[:4]]) == order_of(40)


def test_ranks_that_stand_at_different_places_are_refused() -> None:
    ranks = Ranks(40, 2, 2)
    ranks.draw(2)
    next(ranks.iterators[1])
    with pytest.raises(MismatchError, match="'train' stood at sample 8 on rank 0 and at sample 12 on rank 1"):
        Ranks(40, 1, 2).restore(ranks.saved())
    numbers(ranks.iterators[1], None)
    with pytest.raises(MismatchError, match="at sample 8 on rank 0 and between epochs on rank 1"):
        Ranks(40, 1, 2).restore(ranks.saved())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: Ranks(41, 1, 2), "samples 40, here 41"),
        (lambda: Ranks(40, 1, 2, seed=1), "seed 0, here 1"),
        (lambda: Ranks(40, 2, 2, shuffle=False), "shuffle True, here False"),
        (lambda: Ranks(40, 1, 2, sampler=DistributedSampler), "here it has none"),
        (lambda: Ranks(40, 2, 2, batches=Reading), "a BatchSampler that is not torch's"),
    ],
)
def test_another_order_than_the_checkpoints_is_a_mismatch(other: Callable[[], Ranks], said: str) -> None:
    ranks = Ranks(40, 2, 2)
    ranks.draw(2)
    with pytest.raises(MismatchError, match=f"stands at sample 8 of an epoch.*{said}"):
        other().restore(ranks.saved())


def test_a_rank_may_have_loaders_of_its_own() -> None:
    ranks = Ranks(40, 2, 2)
    ranks.draw(2)
    saved = ranks.saved()
    saved[0]["val"] = Ranks(8, 1, 2, sampler=DistributedSampler).saved()[0]["train"]
    assert [sorted(elsewhere(saved, rank)) for rank in range(3)] == [["train", "val"], ["train"], ["train"]]


@pytest.mark.parametrize("change", [{"position": 41}, {"begin": 9}, {"draws": -1}, {"batch_size": 0}, {"seed": 1.0}])
def test_a_position_that_cannot_be_is_damage(change: dict[str, Any]) -> None:
    ranks = Ranks(40, 2, 2)
    ranks.draw(2)
    state = ranks.saved()[0]["train"]
    state["elastic"] |= change
    with pytest.raises(Exception, match="elastic"):
        fits(sealed_state.LOADERS["counted"], state, "state")


# -- mutations --------------------------------------------------------------------------------------------------------
def test_mutation_a_position_of_one_rank_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ElasticDistributedSampler, "position", lambda _, begin, samples: begin + samples)
    with pytest.raises(AssertionError):
        test_a_change_of_world_size_at_any_position_loses_and_repeats_nothing(100, False)
    with pytest.raises(AssertionError):
        test_loaders_go_on_elsewhere_after_any_number_of_batches(100, 2)


def test_mutation_draws_that_are_skipped_where_the_ranks_are_others_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "_begun", lambda state, at, rank: state)
    monkeypatch.setattr(Elastic, "fitted", lambda _, state: state)
    with pytest.raises((AssertionError, MismatchError)):
        test_loaders_go_on_elsewhere_after_any_number_of_batches(100, 2)


def test_mutation_an_iteration_that_began_elsewhere_and_is_replayed_from_0_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Elastic, "start", lambda *_: 0)
    with pytest.raises(AssertionError):
        test_after_a_change_a_resume_with_the_same_ranks_yields_what_the_job_yielded(False, 0)


def test_mutation_what_workers_have_ready_counted_as_consumed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = Elastic._take
    monkeypatch.setattr(Elastic, "_take", lambda self, begin, draws: sealed(self, begin, draws + 2))
    with pytest.raises(AssertionError):
        test_what_workers_have_ready_is_not_consumed(2, False)


def test_mutation_a_place_in_another_epoch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elastic, "gone_on", lambda *_: False)
    with pytest.raises(AssertionError):
        test_another_epoch_after_a_restore_gives_the_place_up_and_is_warned_of()
