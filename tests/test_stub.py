"""The stub of the native core (`_native.pyi`) names what the core has, no more and no less."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import layerwise_dist
from layerwise_dist import _native

STUB = Path(layerwise_dist.__file__).with_name("_native.pyi")


def _differences(where: str, stub: ast.Module | ast.ClassDef, live: Any) -> list[str]:
    told: dict[str, ast.stmt] = {n.name: n for n in stub.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    told |= {n.target.id: n for n in stub.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    own = vars(live) if isinstance(live, type) else {name: getattr(live, name) for name in dir(live)}
    there = {name for name in own if not name.startswith("_")}
    public = {name for name in told if not name.startswith("_")}
    found = [f"{where}.{name} is not in the stub" for name in sorted(there - public)]
    found += [f"{where}.{name} is not in the core" for name in sorted(public - there)]
    for name in sorted(there & public):
        if isinstance(node := told[name], ast.ClassDef):
            found += _differences(f"{where}.{name}", node, own[name])
        elif isinstance(node, ast.FunctionDef) and (signature := _arguments(own[name])):
            arguments = [each.arg for each in node.args.args]
            if signature != arguments:
                found.append(f"{where}.{name} takes {signature}, the stub says {arguments}")
    return found


def _arguments(function: Any) -> list[str]:
    """Names of the arguments as the core itself tells them; empty for what is no function, such as a property."""
    first = (getattr(function, "__doc__", None) or "").partition("\n")[0]
    if not callable(function) or " -> " not in first:
        return []
    tree = ast.parse(f"def {first.partition(' -> ')[0]}: ...")
    assert isinstance(tree.body[0], ast.FunctionDef)
    return [each.arg for each in tree.body[0].args.args]


def test_the_stub_and_the_native_core_have_the_same_members_and_arguments() -> None:
    assert _differences("_native", ast.parse(STUB.read_text()), _native) == []
