# SPDX-License-Identifier: Apache-2.0
"""What the sources say to people: no message runs two words into one, and what a text points at is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.statements import statements

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "layerwise_dist").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_OPENS = re.compile(r"""[rbf]{0,2}(["'])(?!\1\1)""", re.IGNORECASE)
_MAY_BE_TORN = re.compile(r"""[\w.,;:)\]}](["'])\s*\n\s*[rbf]{0,2}\1[\w({]""", re.IGNORECASE)


def torn(text: str) -> Iterator[str]:
    """Adjacent string literals on two lines with no space, and nothing else that parts words, where they meet."""
    if not _MAY_BE_TORN.search(text):  # what follows takes some milliseconds a file
        return
    lines = text.splitlines()
    seen: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Constant | ast.JoinedStr) or node.end_lineno == node.lineno:
            continue
        if lines[node.lineno - 1][node.col_offset :].lstrip("rRbBfFuU").startswith(('"""', "'''")):
            continue
        for number in range(node.lineno - 1, (node.end_lineno or 0) - 1):
            one, two = lines[number].rstrip(), lines[number + 1].lstrip()
            opens = _OPENS.match(two)
            if number in seen or opens is None or not one.endswith(opens[1]) or one.endswith(opens[1] * 3):
                continue
            seen.add(number)
            left, right = one[:-1], two[opens.end() :]
            if re.search(r"[\w.,;:)\]}]$", left) and not left.endswith("\\n") and re.match(r"[\w({]", right):
                yield f"{number + 1}: ...{left[-30:]}|{right[:30]}..."


# A part of a sentence that brings its own space, or none because it may be empty.
_WITH_SPACE = ("{stuck_calls()}", "{more}")


def test_no_message_runs_two_words_into_one() -> None:
    found = [f"{path.relative_to(ROOT)}:{each}" for path in SOURCES for each in torn(path.read_text())]
    assert [each for each in found if not any(f"|{part}" in each for part in _WITH_SPACE)] == []


@pytest.mark.parametrize(
    ("text", "finds"),
    [
        ('raise E(\n    "one"\n    "two"\n)', True),
        ('raise E(\n    f"one {x}"\n    f"{y} two"\n)', True),
        ('log.warning(\n    "one,"\n    "two"\n)', True),
        ('raise E(\n    "one "\n    "two"\n)', False),
        ('raise E(\n    "one"\n    " two"\n)', False),
        ('raise E(\n    "one-"\n    "two"\n)', False),
        ('raise E(\n    "one",\n    "two",\n)', False),
        ('raise E(\n    "one\\n"\n    "two"\n)', False),
        ('"""One.\n\n    "two"\n    "three"\n"""', False),
    ],
)
def test_the_search_finds_what_it_is_for(text: str, finds: bool) -> None:
    assert bool([*torn(text)]) == finds


def docstrings(path: Path) -> Iterator[tuple[int, list[str]]]:
    text = path.read_text()
    lines = text.splitlines()
    for node in statements(text):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                first = node.body[0]
                yield first.lineno, lines[first.lineno - 1 : first.end_lineno]


def test_no_docstring_breaks_its_lines_in_the_middle() -> None:
    """A line that ends early, with no end of a sentence, and whose next word had room on it."""
    found = []
    for path in SOURCES:
        for begin, lines in docstrings(path):
            for number, (one, two) in enumerate(zip(lines, lines[1:], strict=False)):
                same = len(one) - len(one.lstrip()) == len(two) - len(two.lstrip())
                prose = re.search(r"[a-z,`)]$", one.rstrip()) and re.match(r"\s*[`a-z]", two)
                code = re.search(r"\S  |[()=]$|<\w+>|\{\"|--\w", one)
                code = code or re.match(r"\s*\w+[(:.=]|\s*(for|torchrun) |\s*\S+   ", two)
                if same and prose and not code and len(one) + 1 + len(two.split()[0]) <= 100:
                    found.append(f"{path.relative_to(ROOT)}:{begin + number}: {one.strip()[-40:]} / {two.strip()[:30]}")
    assert found == []


# Not what a native speaker would write: "after", "whose", "forever", "times out", "checks whether", "passed to".
_TRANSLATED = re.compile(r"behind the|\bof which\b|\bfor ever\b|is given up|looks whether|what is told")


def test_texts_read_as_if_written_in_english() -> None:
    """README, pages and all that a source says: docstrings, messages, comments."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*PAGES, *SOURCES, ROOT / "CONTRIBUTING.md"]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _TRANSLATED.search(line)
    ]
    assert found == []


def test_readme_and_pages_can_be_read_in_an_hour() -> None:
    """At most 15,000 words, as `wc -w README.md docs/*.md` counts them. What is looked up is in folders below docs."""
    words = sum(len(page.read_text().split()) for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert words <= 15_000


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_what_the_pages_link_to_is_there() -> None:
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", page.read_text()):
            name, _, part = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if "://" in target:
                continue
            if not path.exists() or (part and part not in [anchor(each) for each in headings(path)]):
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert missing == []


def test_what_docstrings_and_comments_point_at_is_there() -> None:
    """Pages with their headings, files, and names of this package in backquotes."""
    missing = []
    for path in SOURCES:
        text = path.read_text()
        flat = re.sub(r"\s*\n\s*#?\s*", " ", text)
        for page, heading in re.findall(r"(docs/[\w/-]+\.md)(?:, \"([^\"]+)\")?", flat):
            if not (ROOT / page).exists() or (heading and heading not in headings(ROOT / page)):
                missing.append(f"{path.relative_to(ROOT)}: {page} {heading}")
        for file in re.findall(r"(?<![\w/])((?:tests|launch|examples|csrc)/[\w/.-]+\.(?:py|sh|h|cc|json))", flat):
            if not (ROOT / file).exists():
                missing.append(f"{path.relative_to(ROOT)}: {file}")
        for module, name in re.findall(r"`((?:\w+\.)*[a-z_]+)\.([A-Z]\w+)(?:\.\w+)?(?:\(\))?`", text):
            if not points_at(path, module, name):
                missing.append(f"{path.relative_to(ROOT)}: {module}.{name}")
    assert missing == []


def points_at(path: Path, module: str, name: str) -> bool:
    """Whether a module of this package, named from its root or from a room on the way to it, has such a class."""
    parts = module.split(".")
    if parts[0] == "layerwise_dist":
        parts = parts[1:]
    candidates = [*(ROOT / "layerwise_dist").rglob("/".join(parts) + ".py")]
    candidates += [*(ROOT / "layerwise_dist").rglob("/".join(parts) + "/__init__.py")]
    if not candidates:
        return True  # another package's, or an object's
    return any(re.search(rf"\b{name}\b", each.read_text()) for each in candidates)


def test_every_source_file_names_its_license() -> None:
    kinds = (".py", ".pyi", ".sh", ".sbatch", ".cc", ".h", ".inc")
    folders = ("layerwise_dist", "csrc", "launch", "examples", "tests")
    sources = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in kinds]
    assert len(sources) > 400
    heads = {path: path.read_text().split("\n", 2)[:2] for path in sources if path.stat().st_size}
    lacking = [
        path for path, head in heads.items() if not any("SPDX-License-Identifier: Apache-2.0" in h for h in head)
    ]
    assert [str(path.relative_to(ROOT)) for path in lacking] == []
