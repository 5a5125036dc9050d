# SPDX-License-Identifier: Apache-2.0
"""What a file of a commit held that is not there any more, as far as the other ranks' headers say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import prod

from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, named, shown
from layerwise_dist.storage.reader import Shard
from layerwise_dist.tensors.slices import ranks_of

_LOOKED_AT = 64  # headers of other ranks, at most
_NAMED = 16  # of each kind


@dataclass
class _Shared:
    """A tensor that several ranks hold together, and how many of its elements the others have."""

    shape: tuple[int, ...]
    found: int = 0

    @property
    def lacking(self) -> int:
        return prod(self.shape) - self.found


def contents(manifest: Manifest, rank: int, kind: str, open_other: Callable[[int], Shard | None]) -> str:
    """In words: whose it was, and which tensors. `kind` is "shard" or "base"; `open_other(rank)` gives another rank's
    file of that kind, None if it has none. Where that raises DamageError or OSError it says nothing.
    """
    world_size = manifest.world_size
    others = sorted((other for other in range(world_size) if other != rank), key=lambda other: abs(other - rank))
    shared: dict[tuple[str, str, tuple[int, ...]], _Shared] = {}
    own: dict[str, None] = {}
    held_here = cache(lambda among: rank in ranks_of(among, world_size))
    seen: set[str] = set()  # parameters that another file has something of
    trained: set[str] = set()
    heard = 0
    for other in others[:_LOOKED_AT]:
        try:
            shard = open_other(other)
        except (DamageError, OSError):
            continue
        heard += 1
        if shard is None:
            continue
        entries = shard.index.entries
        for at, (name, among, shape) in enumerate(zip(entries.names, entries.among, entries.shapes, strict=True)):
            if not among:
                own[name] = None
            elif held_here(among):
                each = shared.setdefault((name, among, shape), _Shared(shape))
                each.found += prod(entries.lengths[at])
        seen.update(name.split("/", 1)[1] for name in entries.names)
        if kind == "shard" and not manifest.bases:
            trained |= _trained(shard)
    whose = f"rank {rank}'s {kind}, of {world_size} rank{'s' if world_size > 1 else ''}"
    if heard < len(others):  # what the others have is not all known
        return _said(whose, "with its part of", (name for name, *_ in shared), own)
    lacking = [
        f"{name} ({each.lacking} of {prod(each.shape)} elements)" for (name, *_), each in shared.items() if each.lacking
    ]
    return _said(whose, "with", lacking, own, sorted(trained - seen))


def _trained(shard: Shard) -> set[str]:
    """Parameters in the groups of its rank's optimizers. What no file has anything of was in the one that is gone."""
    from layerwise_dist.storage import typed_json  # imports torch, which what only lists checkpoints does without

    try:
        optimizer = typed_json.loads(*shard.state())["optimizer"]
        every = optimizer.get("optimizers", {"": optimizer}).values()
        return {str(name) for each in every for group in each["groups"] for name in group["params"]}
    except (DamageError, OSError, LookupError, TypeError, AttributeError):
        return set()  # it is damaged, too, or of something that is not trained


def _said(whose: str, verb: str, shared: Iterable[str], own: Iterable[str], whole: Iterable[str] = ()) -> str:
    parts = [("", shared), ("probably, as the others, its own ", own), ("all of ", whole)]
    found = [before + text for before, names in parts if (text := named((shown(name, 200) for name in names), _NAMED))]
    return f"{whose}, {verb} {' and '.join(found)}" if found else f"{whose}; no other file says what it held"
