# SPDX-License-Identifier: Apache-2.0
"""A rank's disk thread: makes sealed shards durable, and removes failed ones."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from functools import partial

from layerwise_dist.commit.ledger import Action, Discard, GiveUp, Ledger, Persist
from layerwise_dist.commit.waits import Waits
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import Leftover, Write
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")


class Persisting:
    """From the constructor until `close`. One job after the other, in the order in which they are put."""

    def __init__(
        self, ledger: Ledger, waits: Waits, do: Callable[[list[Action]], None],
        written: Callable[[AttemptId, int], None], *, timeout_s: float, failed: background.Failed,
    ) -> None:  # fmt: skip
        """`do` takes what the ledger says to how a job ended, `written` which shards are durable and their bytes; both
        with the lock of `waits` held. `timeout_s`: the longest that a shard may take.
        """
        self._ledger, self._waits, self._do, self._written = ledger, waits, do, written
        self._timeout_s, self._failed = timeout_s, failed
        self._work: queue.SimpleQueue[Persist | GiveUp | Discard | None] = queue.SimpleQueue()
        self._thread = background.start("layerwise-persist", self._run, failed)

    def put(self, job: Persist | GiveUp | Discard) -> None:
        self._work.put(job)

    def close(self, timeout_s: float) -> None:
        """Waits for what was put, at most so many seconds."""
        self._work.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            # What comes after one that failed may be to remove what it left.
            background.guarded("layerwise-persist", partial(self._take_up, job), self._failed)

    def _take_up(self, job: Persist | GiveUp | Discard) -> None:
        if isinstance(job, Persist):
            self._persist(job.write)
        elif isinstance(job, GiveUp):
            self._give_up(job)
        else:
            self._discard(job.write)

    def _persist(self, write: Write) -> None:
        with self._waits.changed:
            if not self._ledger.wanted(write):
                return  # aborted meanwhile; its clean-up is queued after this
        try:
            report = write.persist(self._timeout_s)
        except (OSError, LayerwiseError) as error:
            self._give_up(GiveUp(write.attempt, str(error), write, False))
            return
        except BaseException as error:
            self._give_up(GiveUp(write.attempt, background.describe(error), write, False))
            raise
        with self._waits.changed:
            if report is not None:
                self._written(write.attempt, report.nbytes)
                self._do(self._ledger.persisted(write.attempt, report))
            self._waits.changed.notify_all()

    def _give_up(self, job: GiveUp) -> None:
        if not job.told:
            log.warning("rank %d: checkpoint of step %d failed: %s", self._ledger.rank, job.attempt.step, job.error)
        if job.write is not None:
            job.write.abort()
        with self._waits.changed:
            self._do(self._ledger.gave_up(job))
            self._waits.changed.notify_all()

    def _discard(self, write: Leftover) -> None:
        try:
            write.abort()
            write.discard()
        except OSError as error:
            log.warning(
                "rank %d: leftovers of step %d stay until the next start: %s",
                self._ledger.rank, write.attempt.step, error,
            )  # fmt: skip
        finally:
            with self._waits.changed:
                self._ledger.discarded(write)
                self._waits.changed.notify_all()
