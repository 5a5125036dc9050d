# SPDX-License-Identifier: Apache-2.0
"""What any wrapper on any number of ranks saved, any other restores, to the bit (docs/tables/restore-matrix.md)."""

from __future__ import annotations

from pathlib import Path

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

# Each wrapper once as a source and once as a target, on few numbers of ranks: all of one number are one job.
DRAWN = [
    "plain:1>zero3:2", "ddp:3>fsdp1:2", "ddp-zero:2>fsdp2:3", "fsdp1:3>zero1:2", "fsdp1-orig:2>tp-fsdp2:4",
    "fsdp2:3>zero2:2", "hsdp:4>ddp:3", "tp-fsdp2:4>plain:1", "zero0:2>hsdp:4", "zero1:3>ddp-zero:2",
    "zero2:2>fsdp1-orig:3", "zero3:3>zero0:3",
]  # fmt: skip
# Without an engine, all in one job of two ranks.
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


def wrong(found: dict[str, str]) -> dict[str, str]:
    return {name: verdict for name, verdict in found.items() if verdict not in GOOD}


def test_drawn_pairs_of_wrappers_and_numbers_of_ranks_restore_to_the_bit(launcher: Launcher) -> None:
    pairs = [
        (Layout.of(source), Layout.of(target), CASES[number % len(CASES)])
        for number, (source, _, target) in enumerate(pair.partition(">") for pair in DRAWN)
    ]
    found: dict[str, str] = {}
    for ranks in (1, 2, 3, 4):
        sources = [(source, case) for source, _, case in pairs if source.ranks == ranks]
        tasks = [task for source, case in sources for task in write_tasks(source, [case], launcher.folder)]
        names = [f"{source} {case}" for source, case in sources]
        found |= zip(names, launcher.run(ranks, tasks), strict=True)
    assert wrong(found) == {}
    written = {f"{source} {case}": place(launcher.folder, source, case) for source, _, case in pairs}
    assert {name: problem for name, folder in written.items() if (problem := apart(folder))} == {}
    for ranks in (1, 2, 3, 4):
        mine = [(source, target, case) for source, target, case in pairs if target.ranks == ranks]
        tasks = [read_task(source, target, case, launcher.folder) for source, target, case in mine]
        names = [f"{source} > {target} {case}" for source, target, case in mine]
        for source, target, how in LOADED if ranks == 2 else ():
            case = next(case for one, _, case in pairs if str(one) == source)
            tasks.append(load_task(Layout.of(source), Layout.of(target), case, launcher.folder, how))
            names.append(f"{source} > {target} {case}, {how}")
        found |= zip(names, launcher.run(ranks, tasks), strict=True)
    assert wrong(found) == {}


def test_what_must_be_rounded_into_another_precision_is_refused_unless_it_is_asked_for(launcher: Launcher) -> None:
    case, folder = CASES[0], launcher.folder
    pairs = [tuple(map(Layout.of, pair.split(">"))) for pair in PRECISE]
    sources = list(dict.fromkeys(source for source, _ in pairs))
    tasks = [task for source in sources for task in write_tasks(source, [case], folder)]
    tasks += [read_task(source, target, case, folder) for source, target in pairs]
    verdicts = launcher.run(2, tasks)
    assert verdicts[: len(sources)] == [OK] * len(sources)
    found = dict(zip(PRECISE, verdicts[len(sources) :], strict=True))
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


def test_two_elements_that_changed_places_are_seen_under_every_kind_of_wrapper(launcher: Launcher) -> None:
    layouts = [Layout(wrapper, 2) for wrapper in SPOILED]
    case, folder = CASES[0], launcher.folder
    tasks = [task for layout in layouts for task in write_tasks(layout, [case], folder)]
    tasks += [read_task(layout, layout, case, folder, sabotage=spoil) for layout in layouts for spoil in (False, True)]
    verdicts = launcher.run(2, tasks)[len(layouts) :]
    for layout, sound, spoiled in zip(layouts, verdicts[::2], verdicts[1::2], strict=True):
        assert sound == OK, f"{layout}: {sound}"
        assert "param/" in spoiled and "elements differ" in spoiled, f"{layout}: {spoiled}"


def test_all_pairs(launcher: Launcher, long: bool) -> None:
    if not long:
        pytest.skip("the whole matrix runs with --long, or by tests/matrix.py")
    pairs = [(source, target) for target in LAYOUTS for source in LAYOUTS] + PRECISIONS
    found = restore_all(launcher, pairs, CASES + MORE_CASES, lanes=2, say=print)
    assert wrong({f"{source} > {target} {case}": verdict for (source, target, case), verdict in found.items()}) == {}
