# SPDX-License-Identifier: Apache-2.0
"""An export's output: written beside its place, flushed, then renamed; nothing existing is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise_dist.errors import DamageError
from layerwise_dist.supervision.scratch import scratch


@contextmanager
def beside(out: str | os.PathLike[str], *, folder: bool) -> Iterator[Path]:
    """A new folder, or the path of a new file in one, next to `out`; it becomes `out` when the block ends. After any
    exception, a signal's too, nothing is left.

    Raises FileExistsError if `out` is there, OSError.
    """
    target = Path(os.path.abspath(os.path.expanduser(os.fspath(out))))
    if os.path.lexists(target):
        raise FileExistsError(17, "already exists, and an export overwrites nothing", str(target))
    with scratch(target.parent, f".{target.name}.partial-") as partial:
        made = partial / target.name
        if folder:
            made.mkdir()
        yield made
        for each in sorted(made.iterdir()) if folder else [made]:
            flush(each)
        if folder:
            flush(made)
            os.rename(made, target)  # fails where something has come there meanwhile that is no empty folder
        else:
            os.link(made, target)  # as this does where anything has
        flush(target.parent)


def flush(path: Path) -> None:
    """The content of a file, or the names in a folder, to the disk; what is read of it from now on comes from there."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        if not path.is_dir():
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def not_what_was_written(path: Path, what: str) -> DamageError:
    return DamageError(f"{path}: {what} reads back otherwise than it was written; nothing is exported")
