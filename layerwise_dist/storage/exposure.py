# SPDX-License-Identifier: Apache-2.0
"""Who else may change the contents of a checkpoint directory. Changes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from layerwise_dist.storage import filenames

_GROUP_OR_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def exposed(root: str) -> list[str]:
    """What of the directory and its folders others may write to, or owns another user than this one and root; each
    with how. A folder that is a link is its target's business. Raises OSError.
    """
    found = []
    for path in _folders(root):
        try:
            how = _how(os.stat(path), sticky=False)
        except FileNotFoundError:
            continue  # a job that runs retired it meanwhile
        if how is not None:
            found.append(f"{path} {how}")
    return found


def listed(found: list[str]) -> str:
    """In a message: the first of them."""
    return "; ".join(found[:4] + [f"and {len(found) - 4} more"] * (len(found) > 4))


def exposed_above(root: str) -> list[str]:
    """Of the directories above it, those whose users may put another one in its place. Raises OSError."""
    found, path = [], os.path.realpath(root)
    while path != (path := os.path.dirname(path)):
        if (how := _how(os.stat(path), sticky=True)) is not None:
            found.append(f"{path} {how}")
    return found


def _folders(root: str) -> Iterator[str]:
    yield root
    for folder in (root, os.path.join(root, filenames.BASES)):
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_folder_of_ours(entry.name) and entry.is_dir(follow_symlinks=False):
                        yield entry.path
        except (FileNotFoundError, NotADirectoryError):
            pass  # there is no base, or the directory is still to be made


def _is_folder_of_ours(name: str) -> bool:
    return name == filenames.BASES or filenames.parse_folder(name) is not None or filenames.parse_base(name) is not None


def _how(info: os.stat_result, *, sticky: bool) -> str | None:
    """`sticky`: the sticky bit is enough. It keeps others from what is there, not from putting more there."""
    if info.st_mode & _GROUP_OR_OTHERS and not (sticky and info.st_mode & stat.S_ISVTX):
        who = "everybody" if info.st_mode & stat.S_IWOTH else "its group"
        return f"may be written to by {who} (mode {stat.S_IMODE(info.st_mode):o})"
    if info.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {info.st_uid})"
    return None
