# SPDX-License-Identifier: Apache-2.0
"""The files of an open checkpoint: holds them, reads them, and checks that all are here."""

from __future__ import annotations

import os
from functools import partial

from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.shards import open_shards
from layerwise_dist.errors import MismatchError
from layerwise_dist.restore.planner import ShardSet
from layerwise_dist.storage.protocols import FileLock
from layerwise_dist.tensors.slices import ranks_text

_READERS = 4  # threads


class HeldFiles:
    """The shards of a commit, and the hold on its manifest, until `end`."""

    def __init__(self, manager: CheckpointMetadataManager, manifest: Manifest, hold: FileLock) -> None:
        self._manager, self._manifest, self._hold = manager, manifest, hold
        self._pool: _native.WriterPool | None = None
        self._shards: ShardSet | None = None

    def shards(self) -> ShardSet:
        """Opened when first needed. Raises MismatchError where some lie in the directories of other nodes."""
        manager, manifest = self._manager, self._manifest
        there = (os.path.lexists(manager.shard_path(manifest, rank)) for rank in range(manifest.world_size))
        lacking = [rank for rank, here in enumerate(there) if not here] if manifest.places is not None else []
        if lacking:
            raise MismatchError(
                f"{manager.root}: each node has a directory of its own, and the shards of rank(s) "
                f"{ranks_text(lacking) or lacking[0]} of step {manifest.step} are not here: copy all of them into one"
            )
        self._pool = _native.WriterPool(_READERS, reads="auto")
        self._shards = ShardSet(0, partial(open_shards, manager, self._pool, manifest))
        return self._shards

    @property
    def ended(self) -> bool:
        return self._pool is None

    def end(self) -> None:
        """Nothing reads from now on. Safe to call twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        if self._shards is not None:
            self._shards.close()  # space of a checkpoint that retention removes is free only then
        self._hold.release()
        self._manager.env.let_go()
