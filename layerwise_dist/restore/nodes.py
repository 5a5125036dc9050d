# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on node-local disks: which shards the present nodes hold, and which ranks see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import BaseRecord, Manifest, ShardRecord
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
        return f"step {self.step}: no node of this job holds the shards of {' and of '.join(each)}"


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


def sound(participant: Participant, manager: CheckpointMetadataManager, attempt: AttemptId, held: Held) -> Held:
    """The same, but a file that is not the one that was committed, as another job may have left it under its name, is
    as one that is not there: if some other node has the right one. All ranks together; each reads the headers of files
    that others have too.
    """
    sight = held.sight
    ranks = range(participant.world_size)
    doubtful = [saved for saved in range(sight.saved) if sum(sight.sees(rank, saved) for rank in ranks) > 1]

    def wrong() -> list[int]:
        manifest = _manifest(manager, attempt)
        if manifest is None:
            return []
        return [
            saved
            for saved in doubtful
            if sight.sees(participant.rank, saved)
            and not all(is_as_committed(manager, path, record) for path, record in _files(manager, manifest, saved))
        ]

    def decide(votes: list[Any]) -> list[list[int]]:
        found: list[list[int]] = values(votes)
        right = {saved for saved in doubtful for rank in ranks if sight.sees(rank, saved) and saved not in found[rank]}
        return [[saved for saved in each if saved in right] for each in found]

    mine = tried(participant.disk_s, "the search for shards", wrong)
    unseen = participant.agree(f"which node has the shards of step {held.step} as committed", mine, decide)
    if not any(unseen):
        return held
    everyone = frozenset(range(sight.saved))
    seen = [(everyone if sight.seen is None else sight.seen[rank]) - set(unseen[rank]) for rank in ranks]
    return replace(held, sight=Sight(sight.world_size, sight.saved, seen))


def is_as_committed(manager: CheckpointMetadataManager, path: str, record: ShardRecord | BaseRecord) -> bool:
    """Whether a file has the length and the header that the manifest says. What cannot be read has not."""
    assert isinstance(manager.env, _native.Env), "the native core reads shards"
    try:
        file = manager.env.open(path)
        try:
            header = file.pread(record.header_bytes, 0) if file.size == record.nbytes else b""
        finally:
            file.close()
    except OSError:
        return False
    return f"{_native.xxh3_64(header):016x}" == record.header_hash


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
    return [
        record.rank
        for record in manifest.shards
        if all(_is_there(manager, path) for path, _ in _files(manager, manifest, record.rank))
    ]


def _files(
    manager: CheckpointMetadataManager, manifest: Manifest, rank: int
) -> list[tuple[str, ShardRecord | BaseRecord]]:
    """A rank's shard, and its base if it has one."""
    record = manifest.shards[rank]
    found: list[tuple[str, ShardRecord | BaseRecord]] = [(manager.shard_path(manifest, rank), record)]
    if record.base is not None:
        found.append((manager.base_path(record.base.attempt, rank), record.base))
    return found


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
