# SPDX-License-Identifier: Apache-2.0
"""What any wrapper on any number of ranks saved, any other restores, to the bit (docs/tables/restore-matrix.md)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from kit.drawing import drawn
from kit.matrix import (
    CASES,
    GOOD,
    LAYOUTS,
    MORE_CASES,
    OK,
    PRECISIONS,
    ROUNDED,
    Launcher,
    Layout,
    load_task,
    place,
    read_task,
    restore_all,
    tour,
    write_tasks,
)
from kit.reading import apart
from kit.runners import Warm

# Two halves: in each of them every wrapper is in one pair, as a source in one half and as a target in the other. On few
# numbers of ranks: all of one number are one job.
HALVES = [
    ("plain:1>zero3:2", "ddp:3>fsdp1:2", "fsdp1-orig:2>tp-fsdp2:4", "fsdp2:3>zero2:2", "zero0:2>hsdp:4",
     "zero1:3>ddp-zero:2"),
    ("ddp-zero:2>fsdp2:3", "fsdp1:3>zero1:2", "hsdp:4>ddp:3", "tp-fsdp2:4>plain:1", "zero2:2>fsdp1-orig:3",
     "zero3:3>zero0:3"),
]  # fmt: skip
# Without an engine, all in one job of two ranks; those whose source is written.
LOADED = [
    ("ddp:3", "fsdp1:2", "into"), ("zero1:3", "fsdp2:2", "into"), ("fsdp2:3", "zero2:2", "into"),
    ("tp-fsdp2:4", "zero3:2", "into"), ("hsdp:4", "fsdp2:2", "meta"), ("fsdp1:3", "fsdp2:2", "dcp"),
]  # fmt: skip
TOURS = [
    ("fsdp2:4", "zero3:2", "plain:1", "ddp:3", "fsdp2:4"),
    # Ranks without an element of a parameter must not get state that does not go on with that of the others.
    ("plain:1", "fsdp1-orig:3", "fsdp1-orig:2", "ddp:2"),
]
# Of these, whether values must be rounded.
PRECISE = {
    "zero3-bf16:2>fsdp2:2": False, "fsdp2:2>zero3-bf16:2": True, "zero3-bf16:2>ddp-bf16:2": True,
    "ddp-bf16:2>zero1-bf16:2": False, "zero1-bf16:2>zero3-bf16:2": False,
}  # fmt: skip
SPOILED = ("fsdp2", "fsdp1", "ddp-zero", "zero1", "zero3")


@pytest.fixture
def launcher(warm: Warm, zero: Warm, tmp_path: Path) -> Launcher:
    return Launcher(warm, zero, tmp_path)


def precise_tasks(folder: Path) -> list[dict[str, Any]]:
    pairs = [tuple(map(Layout.of, pair.split(">"))) for pair in PRECISE]
    tasks = [task for source in dict.fromkeys(source for source, _ in pairs)
             for task in write_tasks(source, [CASES[0]], folder)]  # fmt: skip
    return tasks + [read_task(source, target, CASES[0], folder) for source, target in pairs]


def spoiled_tasks(folder: Path) -> list[dict[str, Any]]:
    layouts = [Layout(wrapper, 2) for wrapper in SPOILED]
    tasks = [task for layout in layouts for task in write_tasks(layout, [CASES[0]], folder)]
    both = itertools.product(layouts, (False, True))
    return tasks + [read_task(layout, layout, CASES[0], folder, sabotage=spoil) for layout, spoil in both]


@pytest.fixture(scope="module")
def at_two_ranks(zero: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """The verdicts of `precise_tasks` and of `spoiled_tasks`, of one job: starting it is half of the work."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "precise").mkdir(), (folder / "spoiled").mkdir()
    precise, spoiled = precise_tasks(folder / "precise"), spoiled_tasks(folder / "spoiled")
    verdicts = Launcher(zero, zero, folder).run(2, precise + spoiled)
    return verdicts[: len(precise)], verdicts[len(precise) :]


def wrong(found: dict[str, str]) -> dict[str, str]:
    return {name: verdict for name, verdict in found.items() if verdict not in GOOD}


def test_drawn_pairs_of_wrappers_and_numbers_of_ranks_restore_to_the_bit(launcher: Launcher, long: bool) -> None:
    """One half of the pairs, the other one in another run; both with --long."""
    pairs = [
        (Layout.of(source), Layout.of(target), CASES[number % len(CASES)])
        for half in (HALVES if long else [drawn(HALVES, "halves")])
        for number, (source, _, target) in enumerate(pair.partition(">") for pair in half)
    ]
    print(*(f"{source}>{target}" for source, target, _ in pairs))
    found: dict[str, str] = {}
    for ranks in sorted({source.ranks for source, _, _ in pairs}):
        sources = [(source, case) for source, _, case in pairs if source.ranks == ranks]
        tasks = [task for source, case in sources for task in write_tasks(source, [case], launcher.folder)]
        names = [f"{source} {case}" for source, case in sources]
        found |= zip(names, launcher.run(ranks, tasks), strict=True)
    assert wrong(found) == {}
    written = {f"{source} {case}": place(launcher.folder, source, case) for source, _, case in pairs}
    assert {name: problem for name, folder in written.items() if (problem := apart(folder))} == {}
    case_of = {str(source): case for source, _, case in pairs}
    for ranks in sorted({target.ranks for _, target, _ in pairs}):
        mine = [(source, target, case) for source, target, case in pairs if target.ranks == ranks]
        tasks = [read_task(source, target, case, launcher.folder) for source, target, case in mine]
        names = [f"{source} > {target} {case}" for source, target, case in mine]
        for source, target, how in LOADED if ranks == 2 else ():
            if case := case_of.get(source):
                tasks.append(load_task(Layout.of(source), Layout.of(target), case, launcher.folder, how))
                names.append(f"{source} > {target} {case}, {how}")
        found |= zip(names, launcher.run(ranks, tasks), strict=True)
    assert wrong(found) == {}


def test_what_must_be_rounded_into_another_precision_is_refused_unless_it_is_asked_for(
    at_two_ranks: tuple[list[str], list[str]],
) -> None:
    verdicts, _ = at_two_ranks
    written, read = verdicts[: -len(PRECISE)], verdicts[-len(PRECISE) :]
    assert written == [OK] * len({pair.split(">")[0] for pair in PRECISE})
    found = dict(zip(PRECISE, read, strict=True))
    assert found == {pair: ROUNDED if rounds else OK for pair, rounds in PRECISE.items()}


@pytest.mark.parametrize("layouts", TOURS, ids=" ".join)
def test_a_tour_of_wrappers_trains_as_jobs_that_got_each_leg_s_state_by_hand(
    launcher: Launcher, layouts: tuple[str, ...], long: bool
) -> None:
    if layouts != drawn(TOURS, "tours") and not long:
        pytest.skip("the other one was drawn; both with --long")
    found = tour(launcher, [Layout.of(text) for text in layouts], CASES[0])
    assert wrong(found) == {}
    assert len(found) == len(layouts)


def test_two_elements_that_changed_places_are_seen_under_every_kind_of_wrapper(
    at_two_ranks: tuple[list[str], list[str]],
) -> None:
    _, verdicts = at_two_ranks
    verdicts = verdicts[len(SPOILED) :]
    for wrapper, sound, spoiled in zip(SPOILED, verdicts[::2], verdicts[1::2], strict=True):
        assert sound == OK, f"{wrapper}: {sound}"
        assert "param/" in spoiled and "elements differ" in spoiled, f"{wrapper}: {spoiled}"


def test_all_pairs(launcher: Launcher, long: bool) -> None:
    if not long:
        pytest.skip("the whole matrix runs with --long, or by tests/matrix.py")
    pairs = [(source, target) for target in LAYOUTS for source in LAYOUTS] + PRECISIONS
    found = restore_all(launcher, pairs, CASES + MORE_CASES, lanes=2, say=print)
    assert wrong({f"{source} > {target} {case}": verdict for (source, target, case), verdict in found.items()}) == {}
