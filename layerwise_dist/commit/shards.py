# SPDX-License-Identifier: Apache-2.0
"""Opens the files that a manifest names. Anything that is not as the manifest says is damage."""

from __future__ import annotations

from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.records import BaseRecord, Manifest, ShardRecord
from layerwise_dist.errors import DamageError
from layerwise_dist.storage.reader import Shard


def open_shard(manager: CheckpointMetadataManager, pool: _native.WriterPool, manifest: Manifest, rank: int) -> Shard:
    """A rank's shard, its header checked against the manifest. Raises DamageError or OSError."""
    record = manifest.shards[rank]
    of = (manifest.attempt, rank, manifest.world_size)
    shard = _open(manager, pool, manager.shard_path(manifest, rank), record, of)
    if shard.index.step != manifest.step:
        raise DamageError(
            f"shard {shard.index.path}: is of step {shard.index.step}, the manifest of step {manifest.step}"
        )
    return shard


def open_base(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, manifest: Manifest, rank: int
) -> Shard | None:
    """The frozen parameters that a rank's shard refers to, as a shard; None if it refers to none.

    Raises as `open_shard`.
    """
    record = manifest.shards[rank].base
    if record is None:
        return None
    of = (record.attempt, rank, manifest.world_size)
    return _open(manager, pool, manager.base_path(record.attempt, rank), record, of)


def _open(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, path: str, record: ShardRecord | BaseRecord,
    of: tuple[str, int, int],
) -> Shard:  # fmt: skip
    env = manager.env
    assert isinstance(env, _native.Env), "the native core reads shards"
    return Shard(
        env, pool, path, nbytes=record.nbytes, header_bytes=record.header_bytes,
        header_hash=int(record.header_hash, 16), of=of,
    )  # fmt: skip
