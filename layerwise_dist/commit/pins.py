# SPDX-License-Identifier: Apache-2.0
"""A pin keeps a checkpoint, whatever retention would do: an empty file in its folder, which anyone may put there.

It is put there while the manifest is held, and retention looks for it while it holds the manifest alone: a checkpoint
that was pinned is not removed a moment later.
"""

from __future__ import annotations

from layerwise_dist.commit.holding import held
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DirectoryError, NotFoundError
from layerwise_dist.storage.odd import kind_at


def pin(manager: CheckpointMetadataManager, manifest: Manifest) -> bool:
    """Keeps the checkpoint until `unpin`; when this returns, no crash undoes it. Whether it was not pinned before.

    Raises NotFoundError if it was removed meanwhile, DirectoryError where a pin would hold nothing, DeadlineError or
    OSError.
    """
    env, attempt = manager.env, manifest.attempt_id
    if manifest.places is not None and kind_at(env, manager.shard_path(manifest, 0)) is None:
        raise DirectoryError(
            f"{manager.root} has no shard of rank 0, whose node decides what is removed on all nodes: pin step "
            f"{manifest.step} there"
        )
    path = manager.pin_path(attempt)
    try:
        with held(manager, attempt):
            kind = kind_at(env, path)
            if kind not in (None, "file"):
                raise DirectoryError(f"{path} is not a regular file, so it is not a pin: move it away")
            if kind is None:
                env.write_file(path, b"", 0o600)
            env.sync_dir(manager.folder(attempt))  # of an earlier pin too, which may have died before
            return kind is None
    except FileNotFoundError:
        raise NotFoundError(f"step {manifest.step} is no longer in {manager.root}: retention has removed it") from None


def unpin(manager: CheckpointMetadataManager, manifest: Manifest) -> bool:
    """The checkpoint goes when its time comes, as others do. Whether it was pinned. Raises OSError."""
    try:
        manager.env.unlink(manager.pin_path(manifest.attempt_id))
    except FileNotFoundError:
        return False
    manager.env.sync_dir(manager.folder(manifest.attempt_id))
    return True
