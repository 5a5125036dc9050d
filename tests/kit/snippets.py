# SPDX-License-Identifier: Apache-2.0
"""The blocks of code in README and docs, by page and number within it: ``docs/guide.md 2``."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))


@cache
def snippets(language: str = "python") -> dict[str, str]:
    """All blocks of one language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return {
        f"{page} {number}": code
        for page in PAGES
        for number, code in enumerate(fence.findall((ROOT / page).read_text()), 1)
    }


def members(name: str) -> dict[str, Any]:
    """What a block of JSON has: the members of an object, whose braces are left out."""
    return json.loads("{" + snippets("json")[name] + "}")


def run(name: str, held: dict[str, Any], **changes: str) -> dict[str, Any]:
    """Runs a block of Python among the names of `held`, which then has what the block made too. Each change puts
    another text in place of one of `LEFT`.
    """
    code = snippets()[name]
    for key, new in changes.items():
        assert LEFT[key] in code, f"{name} has no {LEFT[key]!r}"
        code = code.replace(LEFT[key], new)
    exec(compile(code, name, "exec"), held)
    return held


# What pages leave to their readers, or have more of than a test takes.
LEFT = {"many": "20_000", "body": "...  # forward, backward, optimizer.step(): unchanged"}
