# SPDX-License-Identifier: Apache-2.0
"""What a rank is told of headers that others read is worked out on arrays: the same as part by part."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from layerwise_dist.errors import DamageError
from layerwise_dist.restore import gathered_tensor, headers, states, tally
from layerwise_dist.restore.gathered import Gathered
from layerwise_dist.restore.gathered_tensor import GatheredTensor
from layerwise_dist.restore.headers import FILES_A_RANK, ROW, Share
from layerwise_dist.restore.holdings import Holdings
from layerwise_dist.restore.reslice import run_of
from layerwise_dist.restore.sight import Sight
from layerwise_dist.storage.entries import Entries, Entry
from layerwise_dist.storage.header import Blocks
from layerwise_dist.tensors.slices import Slice
from layerwise_dist.tensors.values import alike

pytestmark = pytest.mark.quick

SAVED, HERE, CASES = 3, 3, 100
NEAREST = [0, 2, 2]
SEALED: Any = {"optimizer": {"groups": [], "scalars": {}, "order": {}}}


def part(draw: random.Random, name: str, shape: tuple[int, ...], among: str = "0-2") -> Slice:
    if draw.random() < 0.4:
        start = draw.randint(0, math.prod(shape))
        length = draw.randint(0, math.prod(shape) - start)
        return Slice("param", name, "F32", shape, start=start, length=length, among=among)
    offsets = tuple(draw.randint(0, size) for size in shape)
    lengths = tuple(
        draw.choice((size - at, draw.randint(0, size - at))) for size, at in zip(shape, offsets, strict=True)
    )
    return Slice("param", name, "F32", shape, offsets=offsets, lengths=lengths, among=among)


def written(draw: random.Random, slices: list[Slice], rank: int) -> Any:
    """As much of a shard as is looked at."""
    entries, at = [], 4096
    for each in slices:
        entries.append(Entry(each, at, at + each.nbytes, False))
        at += each.nbytes
    index = SimpleNamespace(
        path=f"rank_{rank}", rank=rank, size=at, entries=Entries.of(entries), layers=[("a", 4096, 8192)], hashed=True,
        blocks=Blocks([("a", 4096, 8192)], 4096), hashes=[1, 2],
    )  # fmt: skip
    return SimpleNamespace(index=index, peek=lambda begins, ends: draw.randbytes(int((ends - begins).sum())))


class Case:
    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        names = [f"w.{number}" for number in range(6)]
        shapes = {name: tuple(draw.randint(1, 4) for _ in range(draw.randint(0, 3))) for name in names}
        self.aliases = {"w.1": ["tied"]} if draw.random() < 0.5 else {}
        self.shards = []
        for rank in range(SAVED):
            slices = [
                Slice.whole("param", name, "F32", shapes[name])
                if name == "w.0" or draw.random() < 0.1
                else part(draw, name, shapes[name])
                for name in names
                if draw.random() < 0.9
            ]
            if draw.random() < 0.3:
                draw.shuffle(slices)
            self.shards.append(written(draw, slices, rank))
        self.holdings = []
        for _ in range(HERE):
            held: dict[str, list[Slice] | None] = {}
            for name in (*names, "tied"):
                kind, shape = draw.random(), shapes.get(name, shapes["w.1"])
                if kind < 0.1:
                    held[name] = None
                elif kind < 0.2:
                    held[name] = [part(draw, name, (*shape, 2))]
                elif kind < 0.9:
                    held[name] = [part(draw, name, shape) for _ in range(draw.choice((1, 1, 1, 2)))]
            self.holdings.append(Holdings(held))

    def told(self) -> list[set[tuple[Any, ...]]]:
        """What each rank here is told of: name, file, and where and which elements."""
        manifest: Any = SimpleNamespace(step=1, world_size=SAVED)
        share = Share(manifest, self.holdings, NEAREST)
        for rank, shard in enumerate(self.shards):
            share.add(rank, [shard], {**SEALED, "aliases": self.aliases})
        _, tensors = headers.read_for_all(share.for_all(), SAVED)
        return [_read(message, tensors) for message in share.for_each()]

    def expected(self) -> list[set[tuple[Any, ...]]]:
        found: list[set[tuple[Any, ...]]] = [set() for _ in range(HERE)]
        first: dict[str, int] = {}
        for rank, shard in enumerate(self.shards):
            for name, entry in shard.index.entries.items():
                of, run = entry.slice, run_of(entry.slice)
                copy = not of.among and first.setdefault(name, rank) != rank
                for held, out, nearest in zip(self.holdings, found, NEAREST, strict=True):
                    if copy and nearest != rank:
                        continue
                    names = [of.fqn, *self.aliases.get(of.fqn, ())]
                    if of.numel and any(held.needs(each, of, run) for each in names):
                        where = run or (tuple(of.offsets or ()), tuple(of.lengths or ()))
                        out.add((name, of.among, FILES_A_RANK * rank, entry.begin, *where))
        return found


def _read(message: bytes, tensors: list[tally.Summary]) -> set[tuple[Any, ...]]:
    head, rows, *_ = states.unpack(message)
    about, boxes = json.loads(bytes(head))
    found: set[tuple[Any, ...]] = set()
    for number, file, *where in np.frombuffer(rows, dtype="<u8").reshape(-1, ROW).tolist():
        found.add((tensors[number].name, tensors[number].among, file, *where))
    for number, file, begin, offsets, lengths in boxes:
        found.add((tensors[number].name, tensors[number].among, file, begin, tuple(offsets), tuple(lengths)))
    assert {each[2] for each in found} == {number for number, *_ in about}
    return found


def test_each_rank_is_told_of_what_it_may_need_and_of_nothing_else() -> None:
    seen = [0, 0]
    for seed in range(CASES):
        case = Case(seed)
        told, expected = case.told(), case.expected()
        assert told == expected, seed
        every = {each for one in told for each in one}
        seen[0] += len(every)
        seen[1] += sum(isinstance(each[-1], tuple) for each in every)
    assert seen[0] > 500 and seen[1] > 20, seen


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "all boxes are one run": lambda patch: patch.setattr(
        tally, "run_strides", lambda shape, lengths: tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
    ),
    "all layouts are one": lambda patch: patch.setattr(
        tally.Layout, "fits", lambda self, entries: len(self.items) == len(entries)
    ),
    "aliases are nothing": lambda patch: patch.setattr(
        headers.Share, "_tell", lambda self, file, number, entry, aliases, to, tell=headers.Share._tell: tell(
            self, file, number, entry, (), to
        ),
    ),
    "the first of several parts is all": lambda patch: patch.setattr(
        Holdings, "reach", lambda self, name, shape: (0, self._runs[name][0][2][1]) if self._runs.get(name) else (9, -1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_a_rank_that_is_told_less_is_found(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises((AssertionError, TypeError, DamageError)):
        test_each_rank_is_told_of_what_it_may_need_and_of_nothing_else()


@pytest.mark.parametrize(
    ("copies", "more", "read"),
    [
        ({"a": [0, 1, 2]}, [], 2), ({"a": [0, 1]}, [], 0), ({"a": [0, 1], "b": [2]}, [], 0),
        ({"a": [0, 1, 2]}, [tally.Summary("buffer/b", "", "F32", (2,), 0, 1, {"a": [1, 2]})], 0),
    ],
)  # fmt: skip
def test_of_copies_that_are_all_equal_the_nearest_is_read_and_else_the_first(
    copies: dict[str, list[int]], more: list[tally.Summary], read: int
) -> None:
    whole: Any = object.__new__(Gathered)
    whole.manifest, whole._nearest = SimpleNamespace(world_size=3), 2
    assert whole._chosen([tally.Summary("buffer/b", "", "F32", (), 0, 0, copies), *more]).copy == read


def test_each_rank_has_one_that_is_nearest_to_what_it_reads() -> None:
    assert [Sight(2, 4).nearest(rank) for rank in range(2)] == [0, 2]
    assert [Sight(3, 2).nearest(rank) for rank in range(3)] == [0, 0, 1]
    seen = [frozenset((2, 3)), frozenset((0,)), frozenset[int]()]
    assert [Sight(3, 4, seen).nearest(rank) for rank in range(3)] == [2, 0, 2]


def test_elements_are_counted_without_an_end_and_a_tensor_of_too_many_is_damage() -> None:
    most = (1 << 62) - 1
    counted = tally.Tally(1, [])
    huge = Slice("param", "w", "U8", (2 * most,), start=0, length=most, among="0-2")
    for _ in range(4):
        counted.add(0, Entries.of([Entry(huge, 4096, 4096 + most, False)]))
    assert counted.tensors[0].elements == 4 * most
    with pytest.raises(DamageError, match=r"w of shape \[2, \d+\] has more elements than 2\*\*63"):
        more = Slice("param", "w", "U8", (2, 1 << 62), start=0, length=1, among="0-2")
        counted.add(0, Entries.of([Entry(more, 4096, 4097, False)]))


def test_a_rank_that_has_a_tensor_for_itself_has_all_of_it() -> None:
    some = Slice("param", "w", "F32", (4,), start=0, length=3)
    with pytest.raises(DamageError, match="rank 2 has it for itself, and its shard has elements 0 to 3 of shape"):
        tally.Tally(1, []).add(2, Entries.of([Entry(some, 4096, 4108, False)]))


@pytest.mark.parametrize("few", [0, gathered_tensor._FEW], ids=["many", "few"])
def test_what_fills_a_run_has_each_element_once_and_from_a_part_that_has_it(
    monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(gathered_tensor, "_FEW", few)
    draw, size, seen = random.Random(1), 30, [0, 0]
    shards: Any = {number: SimpleNamespace(number=number) for number in range(4)}
    for _ in range(300):
        parts = [(draw.randrange(4), draw.randrange(0, 900, 4), first, draw.randint(0, size - first))
                 for first in (draw.randrange(size) for _ in range(draw.randint(0, 9)))]  # fmt: skip
        rows = np.array([[0, *each] for each in parts], dtype=np.uint64).reshape(-1, ROW)
        tensor = GatheredTensor("param/w", "0-2", (0, 1, 2), "F32", (5, 6), [rows])
        start = draw.randint(0, size)
        length = draw.randint(0, size - start)
        wanted = Slice("param", "w", "F32", (5, 6), start=start, length=length)
        held = {at for _, _, first, count in parts for at in range(first, first + count)}
        gap = next((at for at in range(start, start + length) if at not in held), None)
        seen[gap is None] += 1
        if gap is not None:
            with pytest.raises(DamageError, match=rf"element \[{gap // 6}, {gap % 6}\]"):
                tensor.spans(wanted, shards)
            continue
        found = tensor.spans(wanted, shards)
        assert list(found) == [found[at] for at in range(len(found))]
        assert sum(span.end - span.begin for span in found) == 4 * length
        filled = set()
        for span in found:
            for byte in range(span.begin, span.end, 4):
                at = start + (span.offset + byte - span.begin) // 4
                filled.add(at)
                assert any(
                    span.shard.number == file and begin + 4 * (at - first) == byte and first <= at < first + count
                    for file, begin, first, count in parts
                )
        assert filled == set(range(start, start + length))
    assert min(seen) > 20


def test_a_rank_takes_what_it_read_itself_as_the_others_hear_it() -> None:
    """Half of the tensors and states that it hears of are its own, which it does not decode again."""
    for seed in range(20):
        case = Case(seed)
        manifest: Any = SimpleNamespace(step=1, world_size=SAVED)
        share = Share(manifest, case.holdings, NEAREST)
        for rank, shard in enumerate(case.shards):
            more: Any = {
                "objects": {"a": (rank, 1.5), "b": {"c": [rank // 2]}},
                "wrapper": None,
                "boundary": {"rng": b"x"},
            }
            share.add(rank, [shard], {**SEALED, **more, "aliases": case.aliases})
        encoded, tensors = headers.read_for_all(share.for_all(), SAVED)
        assert share.tensors == tensors
        assert alike(share.states.sealed(), states.decode(encoded))
        assert [state["objects"]["a"] for state in share.states.sealed().values()] == [(0, 1.5), (1, 1.5), (2, 1.5)]
