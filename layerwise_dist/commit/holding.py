# SPDX-License-Identifier: Apache-2.0
"""Holds a checkpoint while it is read or written to, so that retention skips it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from layerwise_dist.commit.metadata import NO_LOCKS, CheckpointMetadataManager
from layerwise_dist.errors import DeadlineError, DirectoryError
from layerwise_dist.storage.filenames import AttemptId

_PATIENCE_S, _LOOK_S = 10.0, 0.01


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
