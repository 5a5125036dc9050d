# SPDX-License-Identifier: Apache-2.0
"""Retired shard files are overwritten by later checkpoints: faster than extending new ones and removing old ones.

The protocol (docs/format/flushes.md, "Reuse"): rank 0 durably removes the retired manifest and announces it; then each
rank takes its own shard out of the retired folder, makes sure that nobody has it open, and blanks and flushes its
header; only then may a new attempt write into it.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections import deque
from typing import Literal

from layerwise_dist.storage import filenames, mounts
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.odd import leave, oddity
from layerwise_dist.storage.protocols import Env
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")


def recycles(env: Env, root: str, wanted: Literal["auto", True, False]) -> bool:
    """What `writer.recycle` means for this directory: "auto" is on unless its file system is shared by a network."""
    if wanted != "auto":
        return wanted
    kind = mounts.network_at(env, root)
    if kind is not None:
        log.info("%s is on %s: files of retired checkpoints are removed, not reused (writer.recycle)", root, kind)
    return kind is None


class Recycler:
    """This rank's retired shards, on their way to the next attempts or out of the directory.

    Thread-safe. `take` never waits; unlinking and flushing is done on a thread of its own, which neither the training
    nor a commit waits for. Only shards that `published` named to this object are ever reused: those of earlier
    sessions may still get writes that were queued when their process was killed.
    """

    def __init__(
        self, env: Env, root: str, rank: int, *, limit: int, file_mode: int,
        failed: background.Failed = background.log_only,
    ) -> None:  # fmt: skip
        """At most `limit` files wait for an attempt; what is more is unlinked. 0: nothing is reused."""
        self._env, self._root, self._rank = env, root, rank
        self._limit, self._file_mode = limit, file_mode
        self._lock = threading.Lock()
        self._published: dict[AttemptId, int] = {}
        self._spares: deque[str] = deque()
        self._jobs: queue.SimpleQueue[tuple[AttemptId, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failed = failed

    def published(self, attempt: AttemptId, header_bytes: int) -> None:
        """This rank's shard of `attempt` is durable under its name, and closed. `header_bytes` is its header region."""
        with self._lock:
            self._published[attempt] = header_bytes

    def forget(self, attempt: AttemptId) -> None:
        """The attempt was aborted: its file is removed by who wrote it, and never reused."""
        with self._lock:
            self._published.pop(attempt, None)

    def retire(self, attempt: AttemptId) -> None:
        """Rank 0 announced: the attempt's manifest is gone for good. Returns at once."""
        with self._lock:
            header_bytes = self._published.pop(attempt, None)
            if header_bytes is None or self._closed:
                return
            if self._thread is None:
                self._thread = background.start("layerwise-recycle", self._run, self._failed)
            self._jobs.put((attempt, header_bytes))

    def take(self) -> str | None:
        """The path of a file to write the next shard into, given away for good; None: make a new one."""
        with self._lock:
            return self._spares.popleft() if self._spares else None

    def waiting(self) -> int:
        """How many files wait for an attempt."""
        with self._lock:
            return len(self._spares)

    def close(self, timeout_s: float) -> bool:
        """Unlinks what waits. Whether that was done in time: else it stays for the next start to collect."""
        with self._lock:
            self._closed, self._limit = True, 0
        if self._thread is None:
            return True
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- background ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            attempt, header_bytes = job
            folder = os.path.join(self._root, attempt.folder)
            shard = os.path.join(folder, filenames.shard_file(self._rank))
            if self.waiting() >= self._limit or not self._prepare(shard, attempt, header_bytes):
                self._remove(shard)
            try:
                self._env.remove_dir(folder)
            except OSError:
                pass  # other ranks' shards are still in it: the last to leave removes it
        while self._closed and (spare := self.take()) is not None:
            self._remove(spare)

    def _prepare(self, shard: str, attempt: AttemptId, header_bytes: int) -> bool:
        """Whether the shard now waits as a spare. Its header is durably blank then, and nobody else has it open."""
        spare = os.path.join(self._root, filenames.spare_file(attempt, self._rank))
        try:
            file = self._env.reuse(shard, spare, self._file_mode)
            try:
                file.pwrite(bytes(header_bytes), 0)
                file.sync()
            finally:
                file.close()
        except OSError as error:
            self._explain(error, shard)
            self._remove(spare)
            return False
        with self._lock:
            if self._limit:
                self._spares.append(spare)
                return True
        self._remove(spare)
        return True

    def _explain(self, error: OSError, shard: str) -> None:
        if error.errno == errno.EOPNOTSUPP:
            log.info(
                "rank %d: %s cannot tell who has a file open: retired files are removed, not reused",
                self._rank,
                self._root,
            )
            with self._lock:
                self._limit = 0
        elif oddity(error, shard) is not None:
            leave(error, shard)
        elif error.errno not in (errno.EBUSY, errno.ENOENT):  # a reader has it open, or somebody removed it
            log.warning("rank %d: %s is removed instead of reused: %s", self._rank, shard, error)

    def _remove(self, path: str) -> None:
        try:
            self._env.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if oddity(error, path) is not None:
                leave(error, path)
            else:
                log.warning("rank %d: a file of an old checkpoint could not be removed: %s", self._rank, error)
