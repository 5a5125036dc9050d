# SPDX-License-Identifier: Apache-2.0
"""Makes docs/configuration.md from the model in layerwise_dist/config/: the text of a key stands there only.

.venv/bin/python tests/configuration_page.py > docs/configuration.md
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.config.ranks import OWN, SAME

_BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
}


def _kind(field: dict[str, Any]) -> str:
    """What a value may be: its type or its choices, and its bounds."""
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return " or ".join(f"`{json.dumps(each)}`" for each in field["enum"])
    bounds = [text.format(f"{field[name]:g}") for name, text in _BOUNDS.items() if name in field]
    return ", ".join([{"integer": "int", "boolean": "bool"}.get(field["type"], field["type"]), *bounds])


def rows(schema: dict[str, Any], prefix: str = "", root: dict[str, Any] | None = None) -> Iterator[str]:
    root = root or schema
    for name, field in schema["properties"].items():
        if "$ref" in field:
            yield from rows(root["$defs"][field["$ref"].rpartition("/")[2]], f"{prefix}{name}.", root)
        else:
            cells = f"`{prefix}{name}`", _kind(field), f"`{json.dumps(field['default'])}`", field["description"]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def own_keys() -> str:
    """Those that ranks may set differently; an object in which that is every key is named as a whole."""
    found = set()
    for key in OWN:
        part, dot, _ = key.partition(".")
        found.add(f"{part}.*" if dot and not any(each.startswith(part + dot) for each in SAME) else key)
    return ", ".join(f"`{key}`" for key in sorted(found))


def page() -> str:
    """The whole of docs/configuration.md."""
    here = Path(__file__).parent
    head, tail = ((here / f"configuration_{part}.md").read_text() for part in ("head", "tail"))
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows(LayerwiseConfig.model_json_schema())]
    same = f"Every rank must set the same, or `attach()` raises a `ConfigError`; each may have its own {own_keys()}."
    return "\n\n".join([head.rstrip(), "\n".join(table), textwrap.fill(same, 120), tail])


if __name__ == "__main__":
    print(page(), end="")
