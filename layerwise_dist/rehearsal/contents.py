# SPDX-License-Identifier: Apache-2.0
"""What two checkpoints of one step hold: tensor by tensor, and all else that was sealed, rank by rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise_dist.errors import NotFoundError
from layerwise_dist.reading.checkpoint import Checkpoint, open_checkpoint
from layerwise_dist.reading.differing import differences, single
from layerwise_dist.tensors.values import alike

_GENERATORS = {"torch", "cuda", "numpy", "python"}
_BOOKKEEPING = {
    "boundary.kind",
    "boundary.at",
    "boundary.starts",
}  # how a boundary was known; nothing is computed from it
# What may differ between runs without affecting training.
_WITHOUT_EFFECT = ("objects", "client_state")

Restless = Callable[[str], bool]


@dataclass(frozen=True)
class Contents:
    """What differs.

    Attributes:
        tensors: `<kind>/<fqn>`, as text with by how much.
        sealed: paths of what is no tensor, by rank.
        missing: which of the two has no such checkpoint, if one lacks it.
    """

    tensors: dict[str, str]
    sealed: dict[int, list[str]]
    missing: str | None = None

    @property
    def same(self) -> bool:
        return not (self.tensors or self.sealed or self.missing)

    @property
    def rank(self) -> int | None:
        """The first rank whose sealed state differs."""
        return min(self.sealed, default=None)

    @property
    def paths(self) -> list[str]:
        """All that differs beside tensors, once each."""
        return list(dict.fromkeys(path for each in self.sealed.values() for path in each))

    def names(self) -> list[str]:
        """All of it, as a person reads it."""
        missing = [] if self.missing is None else [f"there is no checkpoint of it in the {self.missing} run"]
        tensors = [f"{name} ({how})" for name, how in self.tensors.items()]
        return missing + tensors + [f"rank {rank}: {path}" for rank, each in self.sealed.items() for path in each]

    def without(self, restless: Restless) -> Contents:
        """Except what differs between runs without effect."""
        left = {rank: [path for path in each if not restless(path)] for rank, each in self.sealed.items()}
        return Contents(self.tensors, {rank: each for rank, each in left.items() if each}, self.missing)

    @property
    def effectless(self) -> set[str]:
        """Of two runs that were never interrupted: what differs, and is none of what is computed."""
        return {
            path
            for path in self.paths
            if path.startswith(_WITHOUT_EFFECT) or path.endswith(("['numpy']", "['python']"))
        }


def restless(paths: set[str]) -> Restless:
    """Whether a path is one of these. A generator that nothing seeds differs where a loader began, too."""
    unseeded = {path.rpartition("[")[2] for path in paths if path.startswith("boundary.rng[")}
    return lambda path: path in paths or (path.startswith("boundary.") and path.rpartition("[")[2] in unseeded)


def compare(one: str, other: str, step: int, titles: tuple[str, str]) -> Contents:
    """The checkpoints of `step` in two directories. Raises DamageError or OSError."""
    opened: list[Checkpoint | None] = []
    try:
        for directory in (one, other):
            try:
                opened.append(open_checkpoint(directory, step))
            except NotFoundError:
                opened.append(None)
        if opened[0] is None or opened[1] is None:
            lacking = [title for title, each in zip(titles, opened, strict=True) if each is None]
            return Contents({}, {}, lacking[0] if len(lacking) == 1 else None)
        return _compared(opened[0], opened[1])
    finally:
        for each in opened:
            if each is not None:
                each.close()


def _compared(one: Checkpoint, other: Checkpoint) -> Contents:
    mine, theirs = dict(single(one)), dict(single(other))
    tensors = dict.fromkeys(sorted(mine.keys() ^ theirs.keys()), "in one of them only")
    pairs = [(name, mine[name], theirs[name]) for name in sorted(mine.keys() & theirs.keys())]
    for each in differences(pairs, lambda nbytes: None):
        if "elements" in each:
            tensors[each["name"]] = f"{each['elements']} of {each['of']} elements, by {each['max_abs']} at most"
        else:
            tensors[each["name"]] = "of another dtype or shape"
    sealed = {
        rank: found for rank in range(min(one.world_size, other.world_size))
        if (found := [path for path in _unlike(one.sealed(rank), other.sealed(rank), "") if path not in _BOOKKEEPING])
    }  # fmt: skip
    if one.world_size != other.world_size:
        sealed.setdefault(0, []).append("the number of ranks")
    return Contents(tensors, sealed)


def _unlike(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping) and type(one) is type(other):
        generators = _GENERATORS >= one.keys() >= {"torch", "python"}
        for key in [*one, *(each for each in other if each not in one)]:
            at = f"{path}[{key!r}]" if generators else _member(path, key)
            if key not in one or key not in other:
                yield at
            elif generators:
                if not alike(one[key], other[key]):
                    yield at
            else:
                yield from _unlike(one[key], other[key], at)
        if path.startswith("objects") and one.keys() == other.keys() and list(one) != list(other):
            yield f"{path} (the order of its keys)"
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _unlike(mine, theirs, f"{path}[{number}]")
    elif not alike(one, other):
        yield path


def _member(path: str, key: Any) -> str:
    """Names of this format's own members with a dot, others in brackets."""
    own = path in ("", "boundary", "optimizer") or path.startswith("boundary.loaders[")
    if own and isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"
