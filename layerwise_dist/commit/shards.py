# SPDX-License-Identifier: Apache-2.0
"""Opens the files that a manifest names. Anything that is not as the manifest says is damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from layerwise_dist import _native
from layerwise_dist.commit import lost
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.records import BaseRecord, Manifest, ShardRecord
from layerwise_dist.errors import DamageError
from layerwise_dist.storage.plain_header import Recent
from layerwise_dist.storage.reader import Shard, ShardElsewhere


def open_shard(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, manifest: Manifest, rank: int,
    recent: Recent | None = None,
) -> Shard:  # fmt: skip
    """A rank's shard, its header checked against the manifest. `recent` as `parse_header` takes it. Raises DamageError
    or OSError.
    """
    shard = _open_shard(manager, pool, manifest, rank, recent, describe=True)
    try:
        _check_step(manifest, shard)
    except DamageError:
        shard.close()
        raise
    return shard


def _open_shard(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, manifest: Manifest, rank: int,
    recent: Recent | None = None, *, describe: bool = False,
) -> Shard:  # fmt: skip
    """`describe`: an error about one that is not there says what it held."""
    of = (manifest.attempt, rank, manifest.world_size)
    said = partial(lost.contents, manifest, rank, "shard", partial(_open_shard, manager, pool, manifest))
    path = manager.shard_path(manifest, rank)
    return _open(manager, pool, path, manifest.shards[rank], of, recent, said if describe else None)


def _check_step(manifest: Manifest, shard: Shard) -> None:
    if shard.index.step != manifest.step:
        raise DamageError(
            f"shard {shard.index.path}: is of step {shard.index.step}, the manifest of step {manifest.step}"
        )


def open_base(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, manifest: Manifest, rank: int
) -> Shard | None:
    """The frozen parameters that a rank's shard refers to, as a shard; None if it refers to none.

    Raises as `open_shard`.
    """
    return _open_base(manager, pool, manifest, rank, describe=True)


def _open_base(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, manifest: Manifest, rank: int, *,
    describe: bool = False,
) -> Shard | None:  # fmt: skip
    record = manifest.shards[rank].base
    if record is None:
        return None
    of = (record.attempt, rank, manifest.world_size)
    said = partial(lost.contents, manifest, rank, "base", partial(_open_base, manager, pool, manifest))
    return _open(manager, pool, manager.base_path(record.attempt, rank), record, of, None, said if describe else None)


def open_shards(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, manifest: Manifest, rank: int,
    recent: Recent | None = None,
) -> list[Shard]:  # fmt: skip
    """A rank's shard, and after it its base if it has one. `recent` and what it raises as `open_shard`."""
    base = open_base(manager, pool, manifest, rank)
    try:
        shard = open_shard(manager, pool, manifest, rank, recent)
    except BaseException:
        if base is not None:
            base.close()
        raise
    return [shard, base] if base is not None else [shard]


def shards_elsewhere(
    manager: CheckpointMetadataManager, manifest: Manifest, rank: int, headers: Sequence[bytes], state: bytes | None
) -> list[Shard]:
    """The same for files that lie in another directory than this rank's, by their headers; `state` is that of the
    shard, or None if nobody needs it. Raises DamageError where they are not what the manifest names.
    """
    record = manifest.shards[rank]
    texts = [state, None]
    files: list[tuple[str, ShardRecord | BaseRecord, str]] = [
        (manager.shard_path(manifest, rank), record, manifest.attempt)
    ]
    if record.base is not None:
        files.append((manager.base_path(record.base.attempt, rank), record.base, record.base.attempt))
    found: list[Shard] = [
        ShardElsewhere(
            path, header, text, nbytes=each.nbytes, header_bytes=each.header_bytes,
            header_hash=int(each.header_hash, 16), of=(attempt, rank, manifest.world_size),
        )
        for (path, each, attempt), header, text in zip(files, headers, texts[: len(files)], strict=True)
    ]  # fmt: skip
    _check_step(manifest, found[0])
    return found


def _open(
    manager: CheckpointMetadataManager, pool: _native.WriterPool, path: str, record: ShardRecord | BaseRecord,
    of: tuple[str, int, int], recent: Recent | None, said: Callable[[], str] | None,
) -> Shard:  # fmt: skip
    env = manager.env
    assert isinstance(env, _native.Env), "the native core reads shards"
    return Shard(
        env, pool, path, nbytes=record.nbytes, header_bytes=record.header_bytes,
        header_hash=int(record.header_hash, 16), of=of, recent=recent, lost=said,
    )  # fmt: skip
