"""The files that a manifest names, opened: each is what the manifest says, or it is damage."""

from __future__ import annotations

from typing import Any

from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError
from layerwise_dist.storage.reader import Shard


def open_shard(manager: CheckpointMetadataManager, pool: Any, manifest: Manifest, rank: int) -> Shard:
    """A rank's shard, its header checked against the manifest. Raises DamageError or OSError."""
    record = manifest.shards[rank]
    shard = Shard(
        manager.env, pool, manager.shard_path(manifest, rank),
        nbytes=record.nbytes, header_bytes=record.header_bytes, header_hash=int(record.header_hash, 16),
    )  # fmt: skip
    _check(shard, manifest, manifest.attempt, rank)
    if shard.index.step != manifest.step:
        raise DamageError(
            f"shard {shard.index.path}: is of step {shard.index.step}, the manifest of step {manifest.step}"
        )
    return shard


def open_base(manager: CheckpointMetadataManager, pool: Any, manifest: Manifest, rank: int) -> Shard | None:
    """The frozen parameters that a rank's shard refers to, as a shard; None if it refers to none.

    Raises as `open_shard`.
    """
    record = manifest.shards[rank].base
    if record is None:
        return None
    base = Shard(
        manager.env, pool, manager.base_path(record.attempt, rank),
        nbytes=record.nbytes, header_bytes=record.header_bytes, header_hash=int(record.header_hash, 16),
    )  # fmt: skip
    _check(base, manifest, record.attempt, rank)
    return base


def _check(shard: Shard, manifest: Manifest, attempt: str, rank: int) -> None:
    found, expected = shard.index, (attempt, rank, manifest.world_size)
    if (found.attempt, found.rank, found.world_size) != expected:
        raise DamageError(
            f"shard {found.path}: its header is of attempt {found.attempt}, rank {found.rank} of "
            f"{found.world_size}; the "
            f"manifest is of attempt {attempt}, rank {rank} of {manifest.world_size}"
        )
