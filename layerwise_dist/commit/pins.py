# SPDX-License-Identifier: Apache-2.0
"""A pin keeps a checkpoint, whatever retention would do: an empty file in its folder, which anyone may put there.

It is put there while the manifest is held, and retention looks for it while it holds the manifest alone: a checkpoint
that was pinned is not removed a moment later. With a disk in each node, that is so on the node of rank 0; at a start
with rank 0 on another node the pins go there (`opening.Place`).
"""

from __future__ import annotations

from layerwise_dist.commit.holding import held
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.owner import read_owner
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DirectoryError, NotFoundError, shown


def pin(manager: CheckpointMetadataManager, manifest: Manifest) -> bool:
    """Keeps the checkpoint until `unpin`; when this returns, no crash undoes it. Whether it was not pinned before.

    Raises NotFoundError if it was removed meanwhile, DirectoryError where a pin would hold nothing, DeadlineError or
    OSError.
    """
    env, attempt = manager.env, manifest.attempt_id
    if manifest.places is not None and (host := read_owner(env, manager.root).get("decided_on")) is not None:
        raise DirectoryError(
            f"{manager.root} is the directory of one of several nodes, and what is removed on all of them is decided "
            f"by rank 0, which was last on {shown(str(host), 200)}: pin step {manifest.step} there"
        )
    try:
        with held(manager, attempt):
            return manager.pin(attempt)
    except FileNotFoundError:
        raise NotFoundError(f"step {manifest.step} is no longer in {manager.root}: retention has removed it") from None


def unpin(manager: CheckpointMetadataManager, manifest: Manifest) -> bool:
    """The checkpoint goes when its time comes, as others do. Whether it was pinned. Raises OSError."""
    return manager.unpin(manifest.attempt_id)
