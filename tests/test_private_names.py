# SPDX-License-Identifier: Apache-2.0
"""The list of private names of torch and DeepSpeed is whole, true of what is installed, and checked by `attach()`."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import layerwise_dist as lwd
from layerwise_dist.errors import UnsupportedError
from layerwise_dist.frameworks import private_names
from layerwise_dist.frameworks.private_names import DEEPSPEED, RECOGNIZED, TORCH, TORCH_IF_IMPORTED

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).parents[1] / "layerwise_dist"
LIST = PACKAGE / "frameworks" / "private_names.py"
# Of Python itself; of formats of files, which are no part of the torch that is installed; and of this package: marks on
# what is others', parts of names, and what its benchmark looks at.
NOT_OF_TORCH = {
    "_exit", "_getframe", "_asdict", "_fields", "_StorageInfo", "_MEM_FORMAT_ENCODING", "_get_layout",
    "_layerwise_watched", "_layerwise_checkpoints", "_s", "_total", "_optimizer_", "_connections",
    "_get_lr_called_within_step", "_is_initial",  # keys of a scheduler's state that a rehearsal leaves out
}  # fmt: skip


def listed() -> set[str]:
    kinds = (*TORCH.values(), TORCH_IF_IMPORTED, DEEPSPEED, RECOGNIZED)
    return {name for names in kinds for several in names.values() for each in several for name in each.split("|")}


@functools.cache
def texts(package: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(package.rglob("*.py")) if path != LIST}


@functools.cache
def modules(package: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(text) for path, text in texts(package).items()}


def is_private(name: object) -> bool:
    return (
        isinstance(name, str) and name[:1] == "_" and name[1:2].isalpha() and name[-2:] != "__" and name.isidentifier()
    )


def is_self(node: ast.expr) -> bool:
    own_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return own_call or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


@dataclass
class Module:
    """Private names that it gives to what is its own, and those that it uses: of `self`, of others, in quotes."""

    own: set[str] = field(default_factory=set)
    of_self: set[str] = field(default_factory=set)
    of_others: set[str] = field(default_factory=set)
    quoted: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, without what only a type checker runs."""
    left = [node]
    while left:
        node = left.pop()
        yield node
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            left.extend(ast.iter_child_nodes(node))


def read(tree: ast.AST) -> Module:
    found = Module()
    for node in walk(tree):
        if isinstance(node, ast.Attribute):
            if is_private(node.attr):
                own = is_self(node.value)
                (found.of_self if own else found.of_others).add(node.attr)
                if own and isinstance(node.ctx, ast.Store):
                    found.own.add(node.attr)
        elif isinstance(node, ast.Constant):
            if is_private(node.value):
                found.quoted.add(node.value)
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store) and is_private(node.id):
                found.own.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if is_private(node.name):
                found.own.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(PACKAGE.name):
            private_module = any(map(is_private, node.module.split(".")))
            found.imported.update(each.name for each in node.names if private_module or is_private(each.name))
    return found


def unlisted(package: Path, known: set[str]) -> dict[str, list[str]]:
    """Private names of others that are not in `known`, by module. No room reaches into another's privates."""
    found = {path.relative_to(package): read(tree) for path, tree in modules(package).items()}
    rooms: dict[str, set[str]] = defaultdict(set)
    for path, module in found.items():
        rooms[path.parts[0]] |= module.own
    everywhere = set().union(*rooms.values())
    used = {
        path: each.imported | (each.of_others - rooms[path.parts[0]]) | ((each.of_self | each.quoted) - everywhere)
        for path, each in found.items()
    }
    return {str(path): sorted(names - known) for path, names in used.items() if names - known}


def of_hosts() -> set[str]:
    """What the integrations check themselves: strings in their functions and lists that say so."""
    lists = ("_relied_on", "relied_on_by_state", "_MADE", "_CONNECTOR", "METHODS", "KEPT", "READ")
    found: set[str] = set()
    for tree in modules(PACKAGE / "integrations").values():
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                name = ast.unparse(target)
            else:
                name = getattr(node, "name", "")
            if name in lists:
                found |= {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
    return set(filter(is_private, found))


@pytest.mark.slow
def test_every_private_name_that_is_used_is_listed() -> None:
    found = unlisted(PACKAGE, listed() | NOT_OF_TORCH)
    hosts = of_hosts()  # what integrations need of their hosts they check themselves
    for path in [path for path in found if path.startswith("integrations/")]:
        found[path] = [name for name in found[path] if name not in hosts]
    assert {path: names for path, names in found.items() if names} == {}


def test_everything_listed_is_used() -> None:
    words = set(re.findall(r"\w+", "\n".join(texts(PACKAGE).values())))
    quoted = set(re.findall(r"\"([^\"\n]+)\"", "\n".join(texts(PACKAGE).values())))
    by_case = {name for names in DEEPSPEED.values() for name in names}  # which the code takes from the list
    assert sorted(listed() - by_case - words) == []
    assert sorted({*TORCH, *DEEPSPEED} - {"engine, layerwise bench"} - quoted) == []


@pytest.mark.parametrize(
    "line",
    [
        "model._hidden",
        "getattr(model, '_hidden')",
        "from torch.optim import _hidden",
        "from torch._hidden import public",
    ],
)
def test_mutation_a_name_that_is_not_listed_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "odd.py").write_text(f"def late(model):\n    {line}\n")
    assert unlisted(tmp_path, listed()) == {"odd.py": ["public" if "public" in line else "_hidden"]}


# Its class compiles scripts when it is imported.
SLOW = "ZeroRedundancyOptimizer"


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case == SLOW)) for case in TORCH])
def test_this_torch_has_what_is_listed(case: str) -> None:
    assert private_names.missing(case) == []


def test_each_name_is_really_looked_for() -> None:
    for case in TORCH.keys() - {SLOW}:
        for place, several in TORCH[case].items():
            lacking = private_names._lacking(place, tuple(f"{name.partition('|')[0]}_gone" for name in several))
            assert len(lacking) == len(several), (case, place)
    assert private_names._lacking("torch.nn:Gone", ("_a", "_b")) == ["torch.nn.Gone"]
    assert private_names._lacking("torch.gone", ("_a",)) == ["torch.gone"]


@pytest.fixture
def anew() -> Iterator[None]:
    """What was found before is forgotten, now and at the end."""
    private_names._lacking.cache_clear()
    yield
    private_names._lacking.cache_clear()


@pytest.mark.slow
def test_mutation_attach_names_what_was_taken_away(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    monkeypatch.delattr("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
    with pytest.raises(UnsupportedError) as caught:
        lwd.attach(model, optimizer, dir=str(tmp_path))
    assert str(caught.value).removeprefix("rank 0: ") == (
        f"torch {torch.__version__} has no torch.utils._python_dispatch.is_traceable_wrapper_subclass, which any model "
        f"needs here. Tested with torch {', '.join(private_names.TORCH_TRIED)}: install one of these, or a newer "
        "layerwise_dist"
    )
    assert [*tmp_path.iterdir()] == []


def test_mutation_a_case_names_its_own_only(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DistributedDataParallel, "_get_ddp_logging_data")
    private_names.require("any model")
    with pytest.raises(UnsupportedError, match="no torch.nn.parallel.DistributedDataParallel._get_ddp_logging_data"):
        private_names.require("DistributedDataParallel")


def test_what_the_script_has_imported_is_checked_for_any_model(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    monkeypatch.setitem(sys.modules, other, SimpleNamespace())
    with pytest.raises(UnsupportedError, match="ActivationWrapper"):
        private_names.require("any model")
