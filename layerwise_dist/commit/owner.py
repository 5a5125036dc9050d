# SPDX-License-Identifier: Apache-2.0
"""Who may write here: one live session per directory, identified by its lock and its epoch."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypedDict, cast

from layerwise_dist.errors import OwnerError, shown
from layerwise_dist.storage import filenames, strict_json
from layerwise_dist.storage.protocols import Env, FileLock

log = logging.getLogger("layerwise_dist")

_CAP = 4096
# The file is a multiple of this long, so that it keeps its length when it is rewritten: a power failure in between may
# leave new bytes and the old length, and half a text names no epoch.
_SECTOR = 512  # bytes
# A monitor notices at once that its training process died, and says so in the file. Until then it looks like the
# monitor of a live job.
_GRACE_S = 2.0
_FINISHES = "finishes the last checkpoints of a job that has ended"
_MEMBERS = {"epoch": int, "session": str, "who": str}
_LOOK_S = 0.02


class OwnerNote(TypedDict, total=False):
    """What the file says: whose the directory is. `monitor`: a monitor's; `ends`: its job has ended, and it finishes.
    `does`: what else it is that ends by itself, as it is told to who waits. `decided_on`: with a disk in each node, the
    host of rank 0, which decides what goes; not there on that host itself.

    Nothing of it is there, or the first three at least.
    """

    epoch: int
    session: str
    who: str
    monitor: bool
    ends: bool
    does: str
    decided_on: str


class Owner:
    """The writing session's hold on a directory: an OFD lock on `<dir>/owner`, and the epoch written in it.

    The lock keeps other live sessions out. The epoch catches a process that lost its lock without noticing (stopped
    and woken on a network file system): `check` before each commit finds that the file names another epoch.
    """

    def __init__(
        self, env: Env, root: str, *, file_mode: int, who: str, patience_s: float = 0.0, monitored: bool = False
    ) -> None:
        """Takes the lock; `previous` is the epoch of the session before.

        A monitor that holds it, and whose job has ended, is waited for, at most `patience_s` seconds. `monitored`: this
        process is a monitor.

        Raises OwnerError naming the holder, or OSError.
        """
        self._root, self._path = root, os.path.join(root, filenames.OWNER)
        self._env, self._who, self._monitored = env, who, monitored
        self.epoch, self._session = 0, ""
        self._writing = threading.Lock()  # `end` may come while another thread checks
        self._lock = _take(env, root, self._path, file_mode, patience_s, _GRACE_S if monitored else 0.0, who)
        try:
            self.previous: int = self._read().get("epoch", 0)
        except BaseException:
            self._lock.release()
            raise

    def begin(self, session: str, epoch: int, *, decided_on: str | None = None) -> None:
        """From here on commits are `session`'s, under `epoch`, which is durable when this returns. `decided_on` is the
        host of rank 0, if it has another directory. Raises OSError.
        """
        more: OwnerNote = {"monitor": True} if self._monitored else {}
        if decided_on is not None:
            more["decided_on"] = decided_on
        self._write(epoch, session, more)
        self._env.sync_dir(self._root)
        self.epoch, self._session = epoch, session

    def end(self, does: str = _FINISHES) -> None:
        """This session only finishes what it has begun: who waits for the lock will get it. Any thread.

        Raises OSError.
        """
        if self._session:
            self._write(self.epoch, self._session, {"monitor": True, "ends": True, "does": does})

    def _write(self, epoch: int, session: str, more: OwnerNote) -> None:
        note: OwnerNote = {"epoch": epoch, "session": session, "who": self._who, **more}
        text = json.dumps(note, separators=(",", ":")).encode()
        with self._writing:
            self._lock.write(text + b" " * (-len(text) % _SECTOR))

    def check(self) -> None:
        """Raises OwnerError when the directory has a newer owner."""
        if not self._lock.held_path_is_mine():
            raise OwnerError(
                f"{self._path} was replaced: this session (epoch {self.epoch}) no longer owns the directory"
            )
        with self._writing:
            found = self._read()
        if found.get("epoch") != self.epoch or found.get("session") != self._session:
            raise OwnerError(
                f"{self._path} names epoch {found.get('epoch')}, this session has epoch {self.epoch}: "
                "a newer job took over; nothing more is committed here"
            )

    def _read(self) -> OwnerNote:
        return _parsed(lambda: self._lock.read(_CAP))

    def release(self) -> None:
        """Raises OSError; the directory is then held until this process ends."""
        self._lock.release()

    def let_go(self) -> None:
        """Releases, where something else ends or fails already: raises nothing, and warns instead."""
        try:
            self.release()
        except OSError as error:
            log.warning("%s is held until this process ends: %s", self._root, error)


def _parsed(read: Callable[[], bytes]) -> OwnerNote:
    """What `read` gives, as `begin` writes it; nothing if it is anything else: empty, or torn by a crash before the
    epoch was flushed. Epochs in the names of folders still count then, and the next session rewrites it.
    """
    try:
        tree = strict_json.loads(read())
    except ValueError:
        return {}
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        return {}
    if type(tree) is not dict or any(type(tree.get(name)) is not kind for name, kind in _MEMBERS.items()):
        return {}
    return cast(OwnerNote, tree) if filenames.is_number(tree["epoch"]) else {}


def _take(
    env: Env, root: str, path: str, file_mode: int, patience_s: float, grace_s: float, asker: str
) -> FileLock:  # fmt: skip
    """The lock. `grace_s`: how long a holder is waited for that does not say what it is."""
    began = time.monotonic()
    told = False
    while True:
        try:
            return env.lock(path, file_mode)
        except BlockingIOError:
            pass
        holder = _holder(env, root)
        limit = patience_s if holder.get("ends") else min(patience_s, _GRACE_S if holder.get("monitor") else grace_s)
        who, does = (shown(str(each), 200) for each in (holder.get("who", "unknown"), holder.get("does", _FINISHES)))
        if time.monotonic() - began >= limit:
            if holder.get("ends"):
                raise OwnerError(
                    f"{root}: waited {limit:g} s for {who}, which {does} and still holds the directory: kill it, "
                    "or start again later"
                )
            if holder.get("who") == asker:
                raise OwnerError(
                    f"{root} is owned by another engine of this process ({who}): close() that one first, or use "
                    "another dir"
                )
            raise OwnerError(f"{root} is owned by another live job ({who}): stop it, or use another dir")
        if holder.get("ends") and not told:
            told = True
            log.warning("%s: waiting at most %g s for %s, which %s", root, limit, who, does)
        time.sleep(_LOOK_S)


def read_owner(env: Env, root: str) -> OwnerNote:
    """What the file says, without the lock; nothing if it is torn, or not there. Raises OSError if it can't be read."""
    try:
        return _parsed(lambda: env.read_file(os.path.join(root, filenames.OWNER), _CAP))
    except FileNotFoundError:
        return {}


def _holder(env: Env, root: str) -> OwnerNote:
    try:
        return read_owner(env, root)
    except OSError as error:
        return {"who": f"unreadable: {error}"}
