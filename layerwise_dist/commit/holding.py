# SPDX-License-Identifier: Apache-2.0
"""Holds a checkpoint while it is read or written to, so that retention skips it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from layerwise_dist.commit.inventory import Inventory
from layerwise_dist.commit.metadata import NO_LOCKS, CheckpointMetadataManager
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DeadlineError, DirectoryError, NotFoundError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import FileLock

LOOKS = 100  # at a directory whose checkpoints are retired between the look and the hold
_PATIENCE_S, _LOOK_S = 10.0, 0.01


def hold_chosen(
    manager: CheckpointMetadataManager, choose: Callable[[Inventory], Manifest], known: Inventory | None = None
) -> tuple[Manifest, FileLock]:
    """What `choose` takes of the directory's records, and the hold on it. It is chosen anew where retention has removed
    it in between: there is something newer then. `known` is what was read of the directory before.

    Raises what `choose` raises, NotFoundError if each that was chosen was gone, or OSError with one of `NO_LOCKS` where
    the file system has no locks.
    """
    for _ in range(LOOKS):
        manifest = choose(known if known is not None else manager.inventory())
        try:
            return manifest, manager.hold(manifest.attempt_id)
        except (FileNotFoundError, BlockingIOError):
            known = None
    raise NotFoundError(
        f"{manager.root}: each checkpoint that was seen in {LOOKS} looks was removed before it was held"
    )


@contextmanager
def held(manager: CheckpointMetadataManager, attempt: AttemptId, *, needed: bool = True) -> Iterator[None]:
    """Nothing removes the checkpoint as long as this lasts. Raises FileNotFoundError if it is gone, DirectoryError
    where the file system has no locks and one is `needed`, DeadlineError if whoever holds it alone does not let go, or
    OSError.
    """
    deadline = time.monotonic() + _PATIENCE_S
    lock = None
    while True:
        try:
            lock = manager.hold(attempt)
            break
        except BlockingIOError:  # it is being removed, or retention is checking whether it may be
            if time.monotonic() >= deadline:
                path = manager.manifest_path(attempt)
                raise DeadlineError(f"{path}: somebody has locked it for {_PATIENCE_S:g} s: see fuser {path}") from None
            time.sleep(_LOOK_S)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if not needed:
                break
            raise DirectoryError(
                f"{manager.root}: its file system has no file locks ({error.strerror}), so nothing would stop a "
                "running job from removing the checkpoint meanwhile"
            ) from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
