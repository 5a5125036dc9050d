# SPDX-License-Identifier: Apache-2.0
"""Something else under one of our names: a link, a folder, a pipe, a device. It is named, and left alone."""

from __future__ import annotations

import errno
import logging
import threading

from layerwise_dist.storage.protocols import Env

log = logging.getLogger("layerwise_dist")

# What `Env` says of it (csrc/include/layerwise/env.h).
_WHAT = {
    errno.ELOOP: "a symbolic link", errno.EISDIR: "a directory", errno.EINVAL: "not a regular file",
    errno.ENOTDIR: "the folder above it is not a directory",
}  # fmt: skip
_KINDS = {"link": "a symbolic link", "dir": "a directory", "other": "neither a file nor a directory"}

_lock = threading.Lock()
_named: set[str] = set()  # that a warning was given of


def oddity(error: OSError, path: str) -> str | None:
    """What is wrong with `path` if the error is that something odd lies there, or on the way there."""
    what = _WHAT.get(error.errno or 0)
    if what is None:
        return None
    where = error.filename or path
    if error.errno == errno.ELOOP and error.strerror and "another user" in error.strerror:
        what = "a symbolic link that another user made, which is not followed"
    return f"{where}: is {what}"


def kind_at(env: Env, path: str) -> str | None:
    """What `Env.stat` calls it; None if nothing is there. Raises OSError."""
    try:
        return env.stat(path)[0]
    except FileNotFoundError:
        return None


def is_no_folder(env: Env, path: str) -> str | None:
    """What is wrong with `path` if something lies there that is no folder of its own. Raises OSError."""
    kind = kind_at(env, path)
    if kind in (None, "dir"):
        return None
    return f"{path}: is {_KINDS.get(kind, 'a file')}, so there is no manifest"


def leave(error: OSError, path: str) -> None:
    """Names, once a process, what was to be removed and is odd. Raises the error if it is another one."""
    what = oddity(error, path)
    if what is None:
        raise error
    with _lock:
        new = what not in _named
        _named.add(what)
    if new:
        log.warning("%s: it is left alone, and nothing is written or removed through it", what)
