"""Who may write here: one live session a directory, known by its lock and its epoch."""

from __future__ import annotations

import json
import os
from typing import Any

from layerwise_dist.errors import OwnerError
from layerwise_dist.storage import layout

_CAP = 4096


class Owner:
    """The writing session's hold on a directory: an OFD lock on `<dir>/owner`, and the epoch written in it.

    The lock keeps other live sessions out. The epoch catches a process that lost its lock without noticing (stopped
    and woken on a network file system): `check` before each commit finds that the file names another epoch.
    """

    def __init__(self, env: Any, root: str, *, file_mode: int, who: str) -> None:
        """Takes the lock; `previous` is the epoch of the session before.

        Raises OwnerError naming the holder, or OSError.
        """
        self._root, self._path = root, os.path.join(root, layout.OWNER)
        self._env, self._who = env, who
        self.epoch, self._session = 0, ""
        try:
            self._lock = env.lock(self._path, file_mode)
        except BlockingIOError:
            raise OwnerError(
                f"{root} is owned by another live job ({_holder(env, self._path)}): stop it, or use another dir"
            ) from None
        try:
            self.previous: int = _parse(self._lock.read(_CAP)).get("epoch", 0)
        except BaseException:
            self._lock.release()
            raise

    def begin(self, session: str, epoch: int) -> None:
        """From here on commits are `session`'s, under `epoch`, which is durable when this returns. Raises OSError."""
        text = json.dumps({"epoch": epoch, "session": session, "who": self._who}, separators=(",", ":"))
        self._lock.write(text.encode())
        self._env.sync_dir(self._root)
        self.epoch, self._session = epoch, session

    def check(self) -> None:
        """Raises OwnerError when the directory has a newer owner."""
        if not self._lock.held_path_is_mine():
            raise OwnerError(f"{self._path} was replaced: this session (epoch {self.epoch}) owns the directory no more")
        found = _parse(self._lock.read(_CAP))
        if found.get("epoch") != self.epoch or found.get("session") != self._session:
            raise OwnerError(
                f"{self._path} names epoch {found.get('epoch')}, this session has epoch {self.epoch}: "
                "a newer job took over; nothing more is committed here"
            )

    def release(self) -> None:
        self._lock.release()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except ValueError:
        return {}  # empty, or torn by a crash before the epoch was flushed: epochs in folder names still count
    epoch = tree.get("epoch") if isinstance(tree, dict) else None
    return tree if type(epoch) is int and 0 <= epoch < 1 << 32 else {}


def _holder(env: Any, path: str) -> str:
    try:
        return str(_parse(env.read_file(path, _CAP)).get("who", "unknown"))[:200]
    except OSError as error:
        return f"unreadable: {error}"
