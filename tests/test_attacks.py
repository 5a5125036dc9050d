"""Crafted directories: each is a named error or the next older commit, in bounded time and memory, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks import THEMES, run

# Halves of about the same work, each with one worker: where two tests run at once, all is done in half the time.
HALVES = [["sizes", "records", "frozen", "terminal"], ["ends", "headers", "names", "sealed", "typed", "directories"]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("themes", HALVES, ids=["sizes and records", "headers and states"])
def test_every_crafted_directory_is_a_named_error_or_an_older_commit(
    tmp_path: Path, long: bool, themes: list[str]
) -> None:
    figures = run.run(tmp_path, themes, every=1 if long else 5, workers=1)
    print(figures)
    assert not figures.problems, f"{figures}\n" + "\n".join(figures.problems)
    assert figures.tried >= 40


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    names = [f"{theme}: {attack.name}" for theme, attacks in THEMES.items() for attack in attacks]
    assert len(names) == len(set(names)) >= 600
    assert sorted(THEMES) == sorted(theme for half in HALVES for theme in half)


def test_a_directory_whose_path_is_no_utf_8_works(tmp_path: Path) -> None:
    themes, root = ["frozen", "directories"], "d\xff\xfe\x1b[31m\xe2\x82"
    figures = run.run(tmp_path, themes, only="m", workers=1, root=root, every=4)
    assert figures.tried > 3 and not figures.problems, "\n".join(figures.problems)


MUTATIONS = {
    "weight": ("sizes", "state: of eight million empty lists"),
    "hashes": ("sizes", "state: of a set of colliding ints"),
    "tensors": ("headers", "header: with a dtype of a list"),
    "contradictions": ("records", "manifest: that continues itself"),
    "random numbers": ("sealed", "random numbers: of Python that are short"),
    "shown": ("terminal", "terminal: header: with a tensor of control characters"),
}


SLOW = {"weight"}  # takes a minute to fill the memory; only with --long


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory, long: bool) -> dict[str, run.Figures]:
    tries = {name: where for name, where in MUTATIONS.items() if long or name not in SLOW}
    return run.mutated(tmp_path_factory.mktemp("mutated") / "worker", tries)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_without_a_check_crafted_directories_are_found(
    mutated: dict[str, run.Figures], mutation: str, long: bool
) -> None:
    if mutation in SLOW and not long:
        pytest.skip("takes a minute: --long")
    assert mutated[mutation].problems
