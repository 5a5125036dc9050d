# SPDX-License-Identifier: Apache-2.0
"""The rooms of docs/rooms/imports.md: every import is one that its table allows, and no modules import in a circle."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx
import pytest
from kit.statements import statements

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "layerwise_dist"
ANYBODYS = {"_native", "_version", ""}  # the native core, and the package's own name and version


def stated() -> dict[str, set[str]]:
    """Which rooms each room may import, as docs/rooms/imports.md says."""
    text = (ROOT / "docs" / "rooms" / "imports.md").read_text()
    rows = re.findall(r"^\| `(\w+)/?` \| [^|]+ \|([^|]*)\|$", text, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows}


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """By their names within the package; the package itself is ''."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def import_statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in statements(text) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports anywhere in it, for its types alone too."""
    for node in import_statements(path.read_text()):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in known or alias.name == "_native" else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE.name:
                    yield alias.name.partition(".")[2]


def against(known: Mapping[str, Path]) -> list[str]:
    allowed, found = stated(), []
    for module, path in known.items():
        room = module.partition(".")[0]
        if module in ANYBODYS:
            continue
        if room not in allowed:
            found.append(f"{module}: its room is not in the table")
            continue
        for other in imports(path, known):
            theirs = other.partition(".")[0]
            if theirs not in {room, *allowed[room]} and not (theirs in ANYBODYS or other in ANYBODYS):
                found.append(f"{module} imports {other}")
    return found


def circles(known: Mapping[str, Path]) -> list[list[str]]:
    graph = networkx.DiGraph()
    for module, path in known.items():
        graph.add_edges_from((module, other) for other in imports(path, known) if other in known and other != "")
    return [sorted(each) for each in networkx.strongly_connected_components(graph) if len(each) > 1]


def test_every_import_goes_the_stated_way() -> None:
    assert against(modules()) == []


def test_no_circle() -> None:
    assert circles(modules()) == []


def test_the_table_allows_no_circle_either_and_names_rooms_that_are_there() -> None:
    allowed = stated()
    graph = networkx.DiGraph((room, other) for room, others in allowed.items() for other in others)
    assert networkx.is_directed_acyclic_graph(graph)
    rooms = {module.partition(".")[0] for module in modules()} - ANYBODYS
    assert set(allowed) == rooms


@pytest.mark.slow
def test_every_module_can_be_imported_by_itself() -> None:
    for module in modules():
        optional = module.startswith("integrations.")  # needs its package, which takes seconds: its own tests import it
        if not optional and not module.endswith("__main__"):  # which is a program
            importlib.import_module(f"{PACKAGE.name}.{module}".strip("."))


def test_the_way_to_the_line_that_writes_a_block_is_as_stated() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().split("### From the README", 1)[1].split("\n## ", 1)[0]
    files = [path for path in re.findall(r"`([\w/]+\.(?:py|cc))`", text) if not path.startswith("tests/")]
    paths = [ROOT / path if path.startswith("csrc/") else PACKAGE / path for path in files]
    assert 1 <= len(paths) <= 5 and all(path.is_file() for path in paths)
    assert "->StartBlock(" in paths[-1].read_text() and "->Pwritev(" in paths[-1].read_text()


def test_few_entries_are_no_rooms() -> None:
    assert sum(not path.is_dir() and path.suffix in (".py", ".pyi", ".typed") for path in PACKAGE.iterdir()) <= 12


def too_long(known: Mapping[str, Path], lines: int = 400) -> list[str]:
    return [module for module, path in known.items() if len(path.read_text().splitlines()) > lines]


def test_no_module_has_more_than_400_lines() -> None:
    assert too_long(modules()) == []


def test_mutation_a_long_module_is_found(tmp_path: Path) -> None:
    odd = tmp_path / "odd.py"
    odd.write_text("\n" * 401)
    assert too_long({**modules(), "storage.odd": odd})[-1] == "storage.odd"


@pytest.mark.parametrize("room", ["errors", "storage", "capture"])
def test_mutation_an_import_against_the_direction_is_found(tmp_path: Path, room: str) -> None:
    known = modules()
    odd = tmp_path / "odd.py"
    odd.write_text("def late():\n    from layerwise_dist.engine.engine import LayerwiseEngine\n")
    assert against({**known, f"{room}.odd": odd}) == [f"{room}.odd imports engine.engine"]


def test_mutation_a_circle_for_types_alone_is_found(tmp_path: Path) -> None:
    known = modules()
    odd = tmp_path / "odd.py"
    odd.write_text("if TYPE_CHECKING:\n    from layerwise_dist.config import LayerwiseConfig\n")
    assert circles({**known, "errors": odd}) != []
