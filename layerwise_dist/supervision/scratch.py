# SPDX-License-Identifier: Apache-2.0
"""A folder for the time of a piece of work: whatever ends it, a signal at any moment too, the folder is gone."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise_dist.supervision.processes import undisturbed


def new_name(parent: str | Path, prefix: str) -> Path:
    """A name in `parent` that nothing has: 64 random bits after `prefix`.

    Known before the folder is made, so that it can be made within the `try` whose `finally` removes it. Between
    tempfile.mkdtemp and such a `try` a signal would leave the folder.
    """
    return Path(parent, prefix + secrets.token_hex(8))


@contextmanager
def scratch(parent: str | Path, prefix: str, *, forgiving: bool = False) -> Iterator[Path]:
    """A new folder, open to its owner only. Its removal is not disturbed by a second Ctrl-C.

    Raises OSError where it cannot be made or removed; `forgiving`: what cannot be removed stays, where a killed job's
    last processes may still write in it.
    """
    folder = new_name(parent, prefix)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        with undisturbed():
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=forgiving)
