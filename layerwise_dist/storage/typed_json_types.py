# SPDX-License-Identifier: Apache-2.0
"""Shared by the writer and the reader of typed JSON: the tag, the limits, the types."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

TAG = "!"
MAX_DEPTH = 100

FACTORIES: dict[str | None, Any] = {None: None} | {t.__name__: t for t in (int, float, str, list, dict, set)}
TORCH_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
DENSE = {name: d for name, d in TORCH_DTYPES.items() if not name.startswith(("qint", "quint"))}
NP_SCALARS = {np.dtype(code).type for code in "?bBhHiIlLqQefdgFDGmM"}
NP_DTYPE = re.compile(r"[<>|](?:[biufc][0-9]{1,2}|[US][0-9]{1,10}|[mM]8(?:\[[0-9]{0,9}[a-zA-Z]{1,2}\])?)")


class Prepared:
    """What `typed_json.prepare` made of a value that is written many times: its JSON text."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Problem(Exception):
    """Something wrong at one place; each level that it passes adds its step, innermost first."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.steps: list[str] = []

    def path(self, root: str) -> str:
        return root + "".join(reversed(self.steps))


def short(v: Any) -> str:
    try:
        text = ascii(v)
    except Exception:
        text = f"<{type(v).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."
