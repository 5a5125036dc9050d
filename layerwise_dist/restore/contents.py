# SPDX-License-Identifier: Apache-2.0
"""The contents of a commit's shards together, without a model: for restore and `layerwise verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from layerwise_dist.commit.metadata import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.frameworks.described import Standing
from layerwise_dist.frameworks.subclasses import MARK
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore.reslice import first_gap
from layerwise_dist.restore.sealed_state import optimizers_of, read_state
from layerwise_dist.storage.reader import Entry, Shard
from layerwise_dist.tensors import slices
from layerwise_dist.tensors.slices import Slice, ranks_text

OF_MODEL = ("param", "master", "buffer")  # every other kind is of an optimizer's state

Entries = dict[str, tuple[Shard, Entry]]
ranks_of = cache(slices.ranks_of)


@dataclass(frozen=True, slots=True)
class RankPart:
    """One rank's part of a commit: its tensors by name (`<kind>/<fqn>`), and the state that the boundary sealed."""

    entries: Entries
    sealed: SealedState


def state_kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Of tensors called `<kind>/<fqn>`, the kinds of optimizer state, by the parameter's fqn."""
    found: dict[str, list[str]] = {}
    for name in names:
        kind, fqn = name.split("/", 1)
        if kind not in OF_MODEL:
            found.setdefault(fqn, []).append(kind)
    return found


def read(shards: Sequence[Shard], framework: str) -> RankPart:
    """Of a rank's shard and, after it, its base if it has one. Raises DamageError or OSError."""
    return RankPart(entries(shards), read_state(shards[0], framework))


def entries(shards: Sequence[Shard]) -> Entries:
    """The tensors of a rank's shard and base together. Raises DamageError for one that is in both."""
    refuse_repeated(shards)
    return {name: (shard, entry) for shard in shards for name, entry in shard.index.entries.items()}


def refuse_repeated(shards: Sequence[Shard]) -> None:
    """Raises DamageError for a tensor that is in a rank's shard and in its base."""
    for at, shard in enumerate(shards):
        for other in shards[:at]:
            for name in shard.index.entries:
                if name in other.index.entries:
                    raise DamageError(f"shard {shard.index.path}: {name} is also in {other.index.path}")


def has(shards: Sequence[Shard], name: str) -> bool:
    return any(name in shard.index.entries for shard in shards)


def lacking(
    manifest: Manifest, held: Mapping[int, Mapping[str, Entry]], sealed: Mapping[int, SealedState]
) -> list[str]:
    """What all shards together do not have and a restore needs, or have in two shapes: one message a tensor.

    `held` (by name) and `sealed` are those of every rank of the commit. Empty: of each tensor that is in any shard
    all elements are there, and so are all parameters and tensors of optimizer state that the sealed states name.
    """
    parts: dict[str, dict[Sequence[int], list[Slice]]] = {}
    for rank, entries_of in held.items():
        for name, entry in entries_of.items():
            parts.setdefault(name, {}).setdefault(gathered(manifest, rank, entry), []).append(entry.slice)
    problems: dict[str, None] = {}
    for name, among in parts.items():
        for ranks, found in among.items():
            alike: dict[tuple[str, tuple[int, ...]], list[Slice]] = {}
            for part in found:
                alike.setdefault((part.dtype, part.global_shape), []).append(part)
            for (_, shape), each in alike.items():
                try:
                    gap = None if any(part.is_whole for part in each) else first_gap(each)
                except DamageError as error:
                    problems[str(error)] = None
                    continue
                if gap is not None:
                    problems[f"{name} of shape {list(shape)}: no shard has its element {list(gap)}"] = None
            if len(alike) > 1:
                shapes = " and ".join(f"{dtype}{list(shape)}" for dtype, shape in sorted(alike))
                problems[f"{name}: it is one tensor shared by ranks {ranks_text(ranks)}, and shards have {shapes}"] = (
                    None
                )
    for rank, state in sealed.items():

        def has(kind: str, fqn: str, rank: int = rank) -> bool:
            name = f"{kind}/{fqn}"
            return name in held[rank] or any(rank in ranks for ranks in parts.get(name, ()))

        for name in absent(state, has):
            problems[f"{name}: rank {rank} had it at the boundary, but it is in no shard"] = None
    return [f"step {manifest.step}: {problem}" for problem in problems]


def gathered(manifest: Manifest, rank: int, entry: Entry) -> Sequence[int]:
    """The ranks among which a tensor that this rank wrote, or a part of it, is one and the same: their slices under its
    name make it up together. Hashable, and the same for all of them.
    """
    return ranks_of(entry.slice.among, manifest.world_size) or (rank,)


def absent(sealed: SealedState, has: Callable[[str, str], bool]) -> Iterator[str]:
    """Names of the parameters and tensors of optimizer state that a rank's sealed state speaks of, and that are not
    there; `has` says it of a kind and a name.
    """
    standing = sealed.get("standing", {})
    for fqn, description in standing.items():
        yield from (f"param/{name}" for name in _inside(fqn, description) if not has("param", name))
    for optimizer in optimizers_of(sealed):
        for group in optimizer["groups"]:
            for fqn in group["params"]:
                if not (fqn in standing or has("param", fqn) or has("master", fqn)):
                    yield f"param/{fqn}"
    scalars = sealed["optimizer"]["scalars"]
    for fqn, kinds in sealed["optimizer"]["order"].items():
        yield from (f"{kind}/{fqn}" for kind in kinds if kind not in scalars.get(fqn, ()) and not has(kind, fqn))


def _inside(name: str, description: Standing) -> Iterator[str]:
    """Names of the tensors that a parameter stands for, by its description."""
    for inner in description["inner"]:
        nested = description["nested"].get(inner)
        path = f"{name}{MARK}{inner}"
        yield from (path,) if nested is None else _inside(path, nested)
