# SPDX-License-Identifier: Apache-2.0
"""Crafted directories: each is a named error or the next older commit, in bounded time and memory, and no more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from attacks import THEMES, run

# Halves of about the same work: where two tests run at once, all is done in half the time.
HALVES = [["sizes", "records", "frozen", "terminal"], ["ends", "headers", "names", "sealed", "typed", "directories"]]

# Of so many cases one is tried by default; most of these take seconds.
EVERY = {"sizes": 48}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[run.Worker]:
    made = run.Worker(tmp_path_factory.mktemp("attacks") / "worker")
    yield made
    made.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("themes", HALVES, ids=["sizes and records", "headers and states"])
def test_every_crafted_directory_is_a_named_error_or_an_older_commit(
    worker: run.Worker, long: bool, themes: list[str]
) -> None:
    figures = run.Figures()
    for theme in themes:
        figures.add(run.run([worker], [theme], every=1 if long else EVERY.get(theme, 16)))
    print(figures)
    assert not figures.problems, f"{figures}\n" + "\n".join(figures.problems)
    assert figures.tried >= 10


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    names = [f"{theme}: {attack.name}" for theme, attacks in THEMES.items() for attack in attacks]
    assert len(names) == len(set(names)) >= 600
    assert sorted(THEMES) == sorted(theme for half in HALVES for theme in half)


def test_a_directory_whose_path_is_no_utf_8_works(worker: run.Worker) -> None:
    themes, root = ["frozen", "directories"], "d\xff\xfe\x1b[31m\xe2\x82"
    figures = run.run([worker], themes, only="m", root=root, every=4)
    assert figures.tried > 3 and not figures.problems, "\n".join(figures.problems)


MUTATIONS = {
    "weight": ("sizes", "state: of eight million empty lists"),
    "hashes": ("sizes", "state: of a set of colliding ints"),
    "tensors": ("headers", "header: with a dtype of a list"),
    "contradictions": ("records", "manifest: that continues itself"),
    "random numbers": ("sealed", "random numbers: of Python that are short"),
    "shown": ("terminal", "terminal: header: with a tensor of control characters"),
}


SLOW = {"weight", "hashes"}  # take up to half a minute until they are too slow; only with --long


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_without_a_check_crafted_directories_are_found(worker: run.Worker, mutation: str, long: bool) -> None:
    """One that takes too long is ended as soon as that is certain."""
    if mutation in SLOW and not long:
        pytest.skip("takes half a minute: --long")
    assert run.mutated(worker, *MUTATIONS[mutation], mutation).problems
