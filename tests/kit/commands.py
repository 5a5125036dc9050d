# SPDX-License-Identifier: Apache-2.0
"""The commands that README, docs, docstrings and the heads of scripts tell people to type."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_STARTS = re.compile(
    r"(?:(?:\S*/)?(?:python3?|pip|pytest)|torchrun|deepspeed|bash|mpirun|sbatch|srun|sudo|apt-get"
    r"|layerwise(?= (?:ls|show|verify|diff|pin|unpin|prune|cp|export|selftest|rehearse|doctor|tune|bench|import"
    r"|watch|report)\b))\s+\S"
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@cache
def functions_in(file: str) -> frozenset[str]:
    """Names of the functions of tests/`file`; none if there is no such file."""
    path = ROOT / "tests" / file
    return frozenset(re.findall(r"^ *def (\w+)\(", path.read_text() if path.exists() else "", re.MULTILINE))


@cache
def commands(root: Path = ROOT) -> dict[str, list[str]]:
    """Each of them, with the files that tell it."""
    found: dict[str, list[str]] = {}
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        for command in _of_markdown(path.read_text()):
            found.setdefault(command, []).append(str(path.relative_to(root)))
    for folder in ("layerwise_dist", "examples", "launch"):
        for path in sorted((root / folder).rglob("*.py")):
            for docstring in _docstrings(path.read_text()):
                for command in _of_markdown(docstring):
                    found.setdefault(command, []).append(str(path.relative_to(root)))
    for path in sorted([*(root / "launch").glob("*.s*"), *(root / "tests").rglob("*.sh")]):
        for command in _of_head(path.read_text()):
            found.setdefault(command, []).append(str(path.relative_to(root)))
    return found


def _of_markdown(text: str) -> Iterator[str]:
    fences = _FENCE.findall(text)
    rest = _FENCE.sub("", text)
    blocks = [body for language, body in fences if language in ("", "sh", "bash", "console")]
    blocks += [line for line in rest.splitlines() if line.startswith("    ")]
    for line in "\n".join(blocks).splitlines():
        if _STARTS.match(line := line.strip().removeprefix("$ ")):
            yield _clean(re.sub(r"\s+#.*", "", line))
    prose = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    for span in re.findall(r"``?([^`]+)``?", prose):
        if _STARTS.match(span := " ".join(span.split())):
            yield _clean(span)


def _of_head(text: str) -> Iterator[str]:
    """Of a shell script: its comments before anything else."""
    for line in text.splitlines()[1:]:
        if not line.startswith("#"):
            return
        if re.match(r"(?:bash|sbatch) \S", line := line.lstrip("# ")):
            yield _clean(re.sub(r" ?\[[^]]*\]", "", line.partition(": ")[0]))


def _clean(command: str) -> str:
    return re.sub(r"(?<=\w)[.;,]+$", "", " ".join(command.split()))


def _docstrings(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield docstring
