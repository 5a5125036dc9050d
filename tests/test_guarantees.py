# SPDX-License-Identifier: Apache-2.0
"""Every promise of docs/guarantees.md has tests in docs/tables/guarantees.md, and every test named there exists, as do
those of docs/tables/track-record.md, where every fault names one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest
from kit.commands import ROOT, functions_in
from kit.commit_model.broken_rules import RULES
from kit.crash_stories import MUTATIONS, OF_ONE_RANK

pytestmark = pytest.mark.quick

_PYTHON = re.compile(r"`tests/(test_\w+\.py)::(\w+)")
_NATIVE = re.compile(r'`(\w+\.\w+)`|"([^"]+)"')
_CASE = re.compile(r'TEST_CASE\w*\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)')


def page(name: str = "guarantees") -> str:
    return (ROOT / "docs" / "tables" / f"{name}.md").read_text()


def sections(text: str) -> dict[str, str]:
    """What stands under each heading below the title's, by heading."""
    parts = re.split(r"^##+ (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def untested(promises: str, tests: str) -> list[str]:
    """Sections that promise something and name no test, and sections of tests without a promise."""
    promised = {name for name, text in sections(promises).items() if re.search(r"^> ", text, re.MULTILINE)}
    tested = {name for name, text in sections(tests).items() if in_python(text)}
    return sorted(promised ^ tested)


def in_python(text: str) -> set[tuple[str, str]]:
    return set(_PYTHON.findall(text))


def in_native(text: str) -> Iterator[tuple[str, str]]:
    """File and title: the titles in quotes that follow a file's name in its bullet."""
    for bullet in re.split(r"\n(?=- |\n)", text):
        file = ""
        for other, title in _NATIVE.findall(" ".join(bullet.split())):
            if other:
                file = other if other.endswith("_test.cc") else ""
            elif file:
                yield file, title


@cache
def titles(file: str) -> set[str]:
    path = ROOT / "csrc" / "tests" / file
    found = _CASE.findall(path.read_text()) if path.exists() else []
    return {"".join(re.findall(r'"((?:[^"\\]|\\.)*)"', each)) for each in found}


def lost(text: str) -> list[str]:
    python = [f"tests/{file}::{name}" for file, name in sorted(in_python(text)) if name not in functions_in(file)]
    return python + [f"{file}: {title}" for file, title in in_native(text) if title not in titles(file)]


def test_what_holds_a_promise_is_there() -> None:
    text = page()
    assert len(in_python(text)) > 300 and len(list(in_native(text))) > 12, "the search finds them"
    assert lost(text) == []


def test_every_mutation_is_listed_with_the_test_that_catches_it() -> None:
    text = page("mutations")
    assert len(in_python(text)) > 20 and lost(text) == []
    assert [name for name in [*MUTATIONS, *OF_ONE_RANK] if name not in text] == []
    assert [rule for rule, broken in RULES.items() if f"| {rule} | `{broken.mutant.__name__}` |" not in text] == []


def test_every_promise_has_its_tests() -> None:
    promises = (ROOT / "docs" / "guarantees.md").read_text()
    assert len(sections(promises)) > 20 and untested(promises, page()) == []


def test_mutation_a_promise_without_a_test_is_found() -> None:
    promises = (ROOT / "docs" / "guarantees.md").read_text()
    assert untested(promises + "\n## More\n\n> It is also fast.\n", page()) == ["More"]
    assert untested(promises, page().replace("## 7. No pickle", "## No pickle")) == ["7. No pickle", "No pickle"]


@pytest.mark.parametrize(
    "text",
    [
        "- `tests/test_lineage.py::test_that_nobody_wrote`",
        "- `tests/test_of_nothing.py::test_x`: and more",
        '- `posix_env_test.cc`: "a title that\n  no test has"',
        '- `of_nothing_test.cc`: "a finished shard"',
    ],
)
def test_mutation_a_test_that_is_not_there_is_found(text: str) -> None:
    assert lost(f"Held by\n{text}\n") != []


def unshown(text: str) -> list[str]:
    """Rows of a track record that name no test or script that is there."""
    rows = [row for row in text.splitlines() if re.match(r"\| (?!fault |found by )\w", row)]
    found = [row for row in rows if not re.search(r"\b[0-9a-f]{7}\b.* \d{4}-\d\d-\d\d \|", row)]
    for row in rows:
        shown = row.rsplit(" | ", 1)[-1]
        scripts = re.findall(r"`(tests/[\w/]+\.sh)`", shown)
        names = [*scripts, *in_python(shown), *in_native(shown)]
        if not names or lost(shown) or not all((ROOT / script).is_file() for script in scripts):
            found.append(row)
    return found


def test_what_shows_each_fault_of_the_track_record_is_there() -> None:
    text = (ROOT / "docs" / "tables" / "track-record.md").read_text()
    assert text.count("\n| ") > 25 and unshown(text) == []


@pytest.mark.parametrize(
    "row",
    [
        "| it was slow | 1234567, 2026-11-29 | `tests/test_lineage.py::test_that_nobody_wrote` |",
        "| it was slow | 1234567, 2026-11-29 | `tests/fuzz/of_nothing.sh` |",
        '| it was slow | 1234567, 2026-11-29 | `posix_env_test.cc`: "a title that no test has" |',
        "| it was slow | 1234567, 2026-11-29 | somebody saw it |",
        "| it was slow | lately | `tests/fuzz/native.sh` |",
    ],
)
def test_mutation_a_fault_that_nothing_shows_is_found(row: str) -> None:
    assert unshown(f"| fault | commit, date | shown by |\n|---|---|---|\n{row}\n") == [row]
    sound = "| it was slow | 1234567, 2026-11-29 | `tests/fuzz/native.sh` |"
    assert unshown(sound) == []
