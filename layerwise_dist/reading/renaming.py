# SPDX-License-Identifier: Apache-2.0
"""Maps a checkpoint's names to a model's: of one of several models, and after a `rename`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

from layerwise_dist.errors import MismatchError
from layerwise_dist.frameworks.subclasses import MARK
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore.regrouping import under_names
from layerwise_dist.restore.whole import Whole

# A name in the checkpoint to that in the model, or None for what is to be left out: a function, or prefixes.
Rename = Callable[[str], str | None] | Mapping[str, str | None]


def renamer(rename: Rename | None, model: str | None) -> Callable[[str], str | None]:
    """What becomes of an fqn of the checkpoint. Of prefixes the longest that fits counts, and what has none stays.

    `model` is the one of several whose names are wanted, without its own name and a dot.
    """
    begin = f"{model}." if model is not None else ""
    if callable(rename):
        given = rename
    else:
        prefixes = sorted((rename or {}).items(), key=lambda item: -len(item[0]))

        def given(fqn: str) -> str | None:
            for old, new in prefixes:
                if fqn.startswith(old):
                    return None if new is None else new + fqn[len(old) :]
            return fqn

    def renamed(fqn: str) -> str | None:
        return given(fqn[len(begin) :]) if fqn.startswith(begin) else None

    return renamed


def renamed(whole: Whole, rename: Callable[[str], str | None]) -> Whole:
    """The same commit under other names, without what has none. Raises MismatchError where two become one."""
    tied: dict[str, list[str]] = {}
    for state in whole.sealed:
        for fqn, aliases in state.get("aliases", {}).items():
            tied.setdefault(fqn, [])
            tied[fqn] += [alias for alias in aliases if alias not in tied[fqn]]
    named = _Names(rename, tied)
    made = copy.copy(whole)
    vars(made).pop("state_kinds", None)
    made.tensors = {}
    for name, found in whole.tensors.items():
        kind, fqn = name.split("/", 1)
        if (new := named(fqn, tied=kind != "buffer")) is not None:
            if f"{kind}/{new}" in made.tensors:
                raise MismatchError(f"rename: {name} and another tensor of the checkpoint both become {kind}/{new}")
            made.tensors[f"{kind}/{new}"] = found
    made.sealed = [named.state(state) for state in whole.sealed]
    return made


class _Names:
    def __init__(self, rename: Callable[[str], str | None], tied: Mapping[str, list[str]]) -> None:
        self._rename, self._tied = rename, tied
        self._known: dict[tuple[str, bool], list[str]] = {}

    def __call__(self, fqn: str, *, tied: bool = True) -> str | None:
        """The first of the names that it has now."""
        found = self._all(fqn, tied)
        return found[0] if found else None

    def _all(self, fqn: str, tied: bool) -> list[str]:
        if (fqn, tied) not in self._known:
            outer, mark, inner = fqn.partition(MARK)
            each = [outer, *(self._tied.get(outer, ()) if tied else ())]
            names = [new for old in each if (new := self._rename(old)) is not None]
            self._known[fqn, tied] = [f"{new}{mark}{inner}" for new in dict.fromkeys(names)]
        return self._known[fqn, tied]

    def _keys(self, of: Mapping[str, Any]) -> dict[str, Any]:
        return {new: value for fqn, value in of.items() if (new := self(fqn)) is not None}

    def _list(self, fqns: list[str]) -> list[str]:
        return [new for fqn in fqns if (new := self(fqn)) is not None]

    def state(self, state: SealedState) -> SealedState:
        modules = ((self._rename(name), value) for name, value in state["extra_state"].items())
        found: dict[str, Any] = {
            **state,
            "gradients": self._list(state["gradients"]),
            "extra_state": {name: value for name, value in modules if name is not None},
            "optimizer": under_names(state["optimizer"], self),
            "aliases": {names[0]: names[1:] for fqn in state.get("aliases", {}) if (names := self._all(fqn, True))},
        }
        if "standing" in state:
            found["standing"] = self._keys(state["standing"])
        return cast(SealedState, found)
