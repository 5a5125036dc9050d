# SPDX-License-Identifier: Apache-2.0
"""What is built is whole: the wheel runs alone in an empty virtual environment, and the source archive builds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from layerwise_dist import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path, long: bool) -> Path:
    """What a clone has, without anything that was built. With --long alone, since it builds the native core."""
    if not long:
        pytest.skip("builds the native core: --long")
    tree = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(bytes.decode, tracked)):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


def run(*command: str, cwd: Path, timeout: float = 600, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source: str, cwd: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "wheels", source, cwd=cwd)
    (wheel,) = (cwd / "wheels").iterdir()
    return wheel


def needed(library: Path) -> set[str]:
    """Names of the shared libraries that it asks for."""
    told = run("readelf", "-d", str(library), cwd=library.parent)
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", told))


def tagged_wheel(clone: Path) -> Path:
    env = {**os.environ, "LAYERWISE_VENV": sys.prefix}
    run("bash", "launch/wheel.sh", "-o", "wheels", cwd=clone, env=env)
    (wheel,) = (clone / "wheels").iterdir()
    return wheel


def newest_glibc(library: Path) -> int:
    """Of the versions of glibc's symbols that it asks for, the minor number."""
    return max(
        int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", run("readelf", "-V", str(library), cwd=library.parent))
    )


@pytest.mark.timeout(1200)
def test_the_wheel_trains_is_killed_and_resumes_in_an_empty_environment(clone: Path, tmp_path: Path) -> None:
    wheel = tagged_wheel(clone)
    assert wheel.name.startswith(f"layerwise_dist-{__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    tag = re.search(r"-manylinux_2_(\d+)_\w+\.whl$", wheel.name)
    assert tag is not None, wheel.name
    (about,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
    assert f"-manylinux_2_{tag[1]}_" in zipfile.ZipFile(wheel).read(about).decode()
    assert not [name for name in names if "layerwise_native_testing" in name or name.startswith("tests")], (
        "what only tests import"
    )
    assert {name for name in names if name.endswith(".py")} >= {
        str(path.relative_to(clone)) for path in (clone / "layerwise_dist").rglob("*.py")
    }

    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", str(venv), cwd=tmp_path)
    (packages,) = venv.glob("lib/python*/site-packages")
    run(str(venv / "bin/python"), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    # Its dependencies are this environment's, since torch is gigabytes; the package that is installed there as editable
    # is found by a .pth file, and those count in a directory of its own only.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    told = run(str(venv / "bin/python"), "-c", "import layerwise_dist; print(layerwise_dist.__file__)", cwd=tmp_path)
    assert Path(told.strip()).is_relative_to(packages)
    (native,) = (packages / "layerwise_dist").glob("_native*.so")
    assert not [name for name in needed(native) if re.match("liburing|libxxhash", name)]
    assert newest_glibc(native) <= int(tag[1]), "it runs where its tag says"

    disk = tmp_path / "disk"
    disk.mkdir()
    told = run(str(venv / "bin/layerwise"), "selftest", str(disk), "--json", cwd=tmp_path)
    assert json.loads(told)["good"]


@pytest.mark.timeout(1200)
def test_the_source_archive_is_whole_and_builds_a_wheel(clone: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from scikit_build_core.build import build_sdist; os.chdir(sys.argv[1]); "
        "print(build_sdist(sys.argv[2]))"
    )
    archive = run(sys.executable, "-c", script, str(clone), str(tmp_path), cwd=tmp_path).split()[-1]
    with tarfile.open(tmp_path / archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("layerwise_dist-*/")
    there = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    tracked = {str(path.relative_to(clone)) for path in clone.rglob("*") if path.is_file()}
    assert {name for name in tracked - there if not name.startswith(".ci/")} == set()
    assert f"Version: {__version__}\n" in (tree / "PKG-INFO").read_text()
    assert wheel_of(".", tree).suffix == ".whl"
