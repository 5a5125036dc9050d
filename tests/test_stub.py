# SPDX-License-Identifier: Apache-2.0
"""The stubs of the native core (`_native.pyi`, and of its testing library) name what it has, no more and no less.

What is made for tests is in no wheel.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import layerwise_native_testing
import pytest

import layerwise_dist
from layerwise_dist import _native

pytestmark = pytest.mark.quick

ROOT = Path(layerwise_dist.__file__).parent.parent
STUBS = {
    _native: ROOT / "layerwise_dist" / "_native.pyi",
    layerwise_native_testing: Path(__file__).with_name("layerwise_native_testing.pyi"),
}

# Names of classes of csrc/testing, as type information in a binary spells them.
TESTING = (b"8FaultEnv", b"9MemoryEnv", b"10LoggedDisk")


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


@pytest.mark.parametrize("module", STUBS, ids=lambda module: module.__name__)
def test_the_stub_and_the_native_core_have_the_same_members_and_arguments(module: ModuleType) -> None:
    assert _differences(module.__name__.rpartition(".")[2], ast.parse(STUBS[module].read_text()), module) == []


def test_the_core_itself_has_nothing_that_is_for_tests() -> None:
    assert all(name in _binary(layerwise_native_testing) for name in TESTING)
    assert [name for name in TESTING if name in _binary(_native)] == []


def _binary(module: ModuleType) -> bytes:
    assert module.__file__ is not None
    return Path(module.__file__).read_bytes()


def test_a_wheel_has_nothing_that_is_for_tests(tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("builds the native core once more: --long")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    built = subprocess.run([*pip, "-w", str(tmp_path), str(ROOT)], capture_output=True, text=True, timeout=1800)
    assert built.returncode == 0, built.stderr
    [path] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        assert [Path(name).stem.partition(".")[0] for name in names if name.endswith(".so")] == ["_native"]
        assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"layerwise_dist"}
        assert [(name, each) for name in names for each in TESTING if each in wheel.read(name)] == []
