# SPDX-License-Identifier: Apache-2.0
"""`layerwise diff`: which tensors of two checkpoints differ, in how many elements, and by how much. Imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import RenderableType

from layerwise_dist.cli.catalogue import WrongUsage
from layerwise_dist.cli.console import Answer, Beneath
from layerwise_dist.cli.progress import bytes_bar
from layerwise_dist.cli.sides import open_side
from layerwise_dist.reading.differing import Pair, differences, nbytes

_LISTED = 50

Choice = tuple[int | None, str | None]


def diff(
    one: str, other: str | None, steps: Sequence[int], tags: Sequence[str], everything: bool, allow_pickle: bool
) -> Answer:  # fmt: skip
    """Bad when any tensor differs. Raises WrongUsage, DamageError or OSError."""
    paths = (one, other if other is not None else one)
    choices = chosen(one, other, steps, tags)
    with ExitStack() as stack:
        a, b = (open_side(path, *choice, allow_pickle, stack) for path, choice in zip(paths, choices, strict=True))
        notes: list[str] = []
        if a.tensors is not None and b.tensors is not None:
            one_has, other_has = a.tensors, b.tensors
        else:
            both = bool(a.state and b.state)
            one_has, other_has = ({**side.weights, **(side.state if both else {})} for side in (a, b))
            what = "parameters, buffers and optimizer state" if both else "parameters and buffers"
            notes.append(f"{what} are compared, by the names of a state_dict")
        names = sorted(one_has.keys() & other_has.keys())
        only = (sorted(one_has.keys() - other_has.keys()), sorted(other_has.keys() - one_has.keys()))
        pairs: list[Pair] = [(name, one_has[name], other_has[name]) for name in names]
        with bytes_bar("comparing", sum(nbytes(tensor) for _, tensor, _ in pairs)) as advance:
            found = list(differences(pairs, advance))
    return _told((a.title, b.title), found, len(names), only, notes, everything)


def chosen(one: str, other: str | None, steps: Sequence[int], tags: Sequence[str]) -> tuple[Choice, Choice]:
    """Which checkpoint of each side: steps first, then tags; one choice is for every directory. Raises WrongUsage."""
    said: list[Choice] = [*((step, None) for step in steps), *((None, tag) for tag in tags)]
    if len(said) > 2:
        raise WrongUsage("two checkpoints are compared: give --step or --tag at most twice in all")
    if other is None and len(said) < 2:
        raise WrongUsage(f"compare {one} with what? Give another directory or file, or --step or --tag twice")
    if not said:
        return (None, None), (None, None)
    if len(said) == 1 and other is not None:
        of_one, of_other = (
            (None, None) if os.path.isfile(os.path.expanduser(path)) else said[0] for path in (one, other)
        )
        return of_one, of_other
    return said[0], said[-1]


def _told(
    titles: tuple[str, str], found: list[dict[str, Any]], common: int, only: tuple[list[str], list[str]],
    notes: list[str], everything: bool,
) -> Answer:  # fmt: skip
    good = not (found or only[0] or only[1])
    data = {
        "a": titles[0], "b": titles[1], "good": good, "compared": common, "equal": common - len(found),
        "differing": found, "only_in_a": only[0], "only_in_b": only[1], "notes": notes,
    }  # fmt: skip
    most = None if everything else _LISTED
    parts: list[RenderableType] = [f"A: {titles[0]}", f"B: {titles[1]}", *notes]
    if found:
        right = ("elements", "of", "max abs", "max ULPs", "NaN")
        shown = Beneath("tensor", *right, right=right, long=("tensor",))
        for each in found[:most]:
            if "elements" in each:
                far = each["max_abs"]
                cells = (each["elements"], each["of"], far if isinstance(far, str | int) else f"{far:.3g}")
                ulps = "-" if each["max_ulps"] is None else each["max_ulps"]
                shown.row(each["name"], *cells, ulps, each["nans"] or "-")
        parts.append(shown)
        kinds = [each for each in found if "elements" not in each]
        parts += [f"{each['name']}: A has {_said(each['a'])}, B {_said(each['b'])}" for each in kinds[:most]]
    for side, names in zip("AB", only, strict=True):
        parts += [f"only in {side}: {name}" for name in names[:most]]
    hidden = max(0, len(found) - _LISTED, len(only[0]) - _LISTED, len(only[1]) - _LISTED)
    if hidden and not everything:
        parts.append("there are more: --all lists them")
    if good:
        parts.append(f"all {common} tensors are bit-for-bit equal")
    else:
        parts.append(f"{len(found)} of {common} tensors differ; {len(only[0])} are only in A, {len(only[1])} only in B")
    return Answer(data, parts, good=good)


def _said(kind: dict[str, Any]) -> str:
    return f"{kind['dtype']} {kind['shape']}"
