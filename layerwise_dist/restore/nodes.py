# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on node-local disks: which shards the present nodes hold, and which ranks see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.votes import tried, values
from layerwise_dist.errors import DamageError
from layerwise_dist.restore.sight import Sight
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.tensors.slices import ranks_text


@dataclass(frozen=True, slots=True)
class Held:
    """Of one commit, by ranks that wrote it: what frozen parameters their shards refer to is as good as in these.

    Attributes:
        step: as it was committed.
        framework: that wrote it.
        gone: for each node, the ranks whose shards no node that is here holds, and all that had their shards there.
        sight: who sees those that are here.
    """

    step: int
    framework: str
    gone: list[tuple[list[int], list[int]]]
    sight: Sight

    def __str__(self) -> str:
        """What is gone."""
        each = [
            f"{_ranks(gone)}" + (f" (a disk had those of {_ranks(node)})" if node != gone else " (all of one disk)")
            for gone, node in self.gone
        ]
        return f"step {self.step}: no node that is here holds the shards of {' and of '.join(each)}"


def look(
    participant: Participant, manager: CheckpointMetadataManager, attempts: Sequence[AttemptId]
) -> dict[AttemptId, Held]:
    """Of these commits, those whose manifest rank 0 can read. All ranks together; each looks at its own disk."""

    def seen() -> list[list[int]]:
        return [_seen(manager, attempt) for attempt in attempts]

    def decide(votes: list[Any]) -> list[Any]:
        found: list[list[list[int]]] = values(votes)
        return [_merged(_manifest(manager, attempt), [each[n] for each in found]) for n, attempt in enumerate(attempts)]

    mine = tried(participant.disk_s, "the search for shards", seen)
    decided = participant.agree("which node has which shards", mine, decide)
    return {
        attempt: _held(attempt.step, each, participant.world_size)
        for attempt, each in zip(attempts, decided, strict=True)
        if each is not None
    }


def _held(step: int, told: dict[str, Any], world_size: int) -> Held:
    saved = told["world_size"]
    seen = [frozenset[int]()] * world_size
    for ranks, theirs in told["views"]:
        for rank in ranks:
            seen[rank] = frozenset(theirs)
    everything = all(len(each) == saved for each in seen)
    sight = Sight(world_size, saved, None if everything else seen)
    return Held(step, told["framework"], [(gone, node) for gone, node in told["gone"]], sight)


def _manifest(manager: CheckpointMetadataManager, attempt: AttemptId) -> Manifest | None:
    try:
        return manager.read_manifest(attempt)
    except (FileNotFoundError, DamageError):
        return None  # found damaged, and said to be, when it is checked


def _seen(manager: CheckpointMetadataManager, attempt: AttemptId) -> list[int]:
    """Ranks whose files of that commit are here, as far as their names say it."""
    manifest = _manifest(manager, attempt)
    if manifest is None:
        return []
    paths = {
        record.rank: [
            manager.shard_path(manifest, record.rank),
            *([manager.base_path(record.base.attempt, record.rank)] if record.base is not None else []),
        ]
        for record in manifest.shards
    }
    return [rank for rank, files in paths.items() if all(_is_there(manager, path) for path in files)]


def _is_there(manager: CheckpointMetadataManager, path: str) -> bool:
    try:
        manager.env.stat(path)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def _merged(manifest: Manifest | None, seen: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    if manifest is None:
        return None
    have = {rank for each in seen for rank in each}
    everyone = list(range(manifest.world_size))
    places = [
        [rank for rank in everyone if rank not in have and rank in place] for place in manifest.places or [everyone]
    ]
    views: dict[tuple[int, ...], list[int]] = {}  # ranks of one node see the same
    for rank, theirs in enumerate(seen):
        views.setdefault(tuple(theirs), []).append(rank)
    return {
        "world_size": manifest.world_size,
        "framework": manifest.framework,
        "gone": [[gone, place] for gone, place in zip(places, manifest.places or [everyone], strict=True) if gone],
        "views": [[ranks, list(theirs)] for theirs, ranks in views.items()],
    }


def _ranks(ranks: Sequence[int]) -> str:
    return f"ranks {ranks_text(ranks)}" if len(ranks) > 1 else f"rank {ranks[0]}"
