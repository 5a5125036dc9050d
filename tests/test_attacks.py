"""Crafted directories: each is a named error or the next older commit, in bounded time and memory, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks import THEMES, run


@pytest.mark.parametrize("themes", [["records", "ends", "names", "directories"], ["headers"], ["sizes"],
                                    ["sealed", "typed", "frozen", "terminal"]], ids=" ".join)  # fmt: skip
def test_every_crafted_directory_is_a_named_error_or_an_older_commit(tmp_path: Path, themes: list[str]) -> None:
    figures = run.run(tmp_path, themes)
    print(figures)
    assert not figures.problems, f"{figures}\n" + "\n".join(figures.problems)


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    names = [f"{theme}: {attack.name}" for theme, attacks in THEMES.items() for attack in attacks]
    assert len(names) == len(set(names)) >= 150
