# SPDX-License-Identifier: Apache-2.0
"""Keeps manifests in a directory that rank 0 does not see; run by the lowest rank that shares it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from layerwise_dist.commit.messages import Kept, ToCoordinator, ToKeepers, ToRanks
from layerwise_dist.commit.metadata import Branch, CheckpointMetadataManager, Manifest, decode
from layerwise_dist.commit.opening import SessionInfo
from layerwise_dist.commit.owner import Owner
from layerwise_dist.errors import DamageError, OwnerError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.odd import leave
from layerwise_dist.supervision import background

log = logging.getLogger("layerwise_dist")

HEARS = ("prepare", "publish", "aborted", "withdraw", "retired", "unneeded")


class Keeper:
    """Does what the coordinator asks of keepers, one thing after the other."""

    def __init__(self, rank: int, manager: CheckpointMetadataManager, owner: Owner, info: SessionInfo) -> None:
        self.rank, self.owner = rank, owner
        self._manager, self._info = manager, info
        self._prepared: set[int] = set()
        # A roll-back comes from the training thread, while older records may go. While the newest is in doubt, none
        # goes: after power loss an older one may be all that is left.
        self._branches = threading.Lock()
        self._in_doubt = False

    def handle(self, message: ToRanks) -> Kept | None:
        """The answer, for what is asked; a notice needs none."""
        match message["t"]:
            case "aborted":
                self._drop(message["seq"], message["step"])
            case "retired":
                self._collect(AttemptId(message["epoch"], message["seq"], message["step"]))
            case "unneeded":
                self._remove_bases(message["bases"])
            case "withdraw" as what:
                error = self._tried(message)
                return {"t": "kept", "what": what, "rank": self.rank, "error": error, "batch": message["batch"]}
            case "prepare" | "publish" as what:
                error = self._tried(message)
                return {"t": "kept", "what": what, "rank": self.rank, "error": error, "seq": message["seq"]}
        return None

    def keep_branch(self, text: str) -> None:
        """A roll-back, or a fresh start, as rank 0 wrote it. Raises OSError, InDoubt or OwnerError."""
        branch = decode(text.encode(), Branch, "the branch record of rank 0")
        with self._branches:
            self.owner.check()
            self._in_doubt = True
            self._manager.write_branch(branch)
            self._in_doubt = False

    def _tried(self, message: ToKeepers) -> str | None:
        try:
            self.owner.check()
            if message["t"] == "prepare":
                manifest = decode(message["manifest"].encode(), Manifest, "the manifest of rank 0")
                self._prepared.add(manifest.seq)
                self._manager.prepare(manifest)
            elif message["t"] == "publish":
                self._manager.publish(self._attempt(message["seq"], message["step"]))
                self._prepared.discard(message["seq"])
            else:
                self._withdraw([AttemptId(*each) for each in message["attempts"]])
        except (OSError, OwnerError, DamageError) as error:
            return str(error)[:2000]
        return None

    def _withdraw(self, attempts: list[AttemptId]) -> None:
        for attempt in attempts:
            try:
                self._manager.withdraw(attempt, anyway=True)  # rank 0's is gone: it is no checkpoint
            except OSError as error:
                leave(error, attempt.folder)  # an archive behind a link stays
        with self._branches:
            if not self._in_doubt:
                self._manager.remove_old_branches()

    def _drop(self, seq: int, step: int) -> None:
        """What was prepared is in the way of nothing but the folder's end."""
        if seq in self._prepared:
            self._prepared.discard(seq)
            try:
                self._manager.unprepare(self._attempt(seq, step))
            except OSError as error:
                log.warning("rank %d: leftovers of step %d stay until the next start: %s", self.rank, step, error)

    def _collect(self, attempt: AttemptId) -> None:
        """Ranks look after what they wrote in this session."""
        if attempt.epoch != self._info.epoch:
            try:
                self.owner.check()
                self._manager.collect(attempt)
            except (OSError, OwnerError) as error:
                log.warning("rank %d: leftovers of step %d stay: %s", self.rank, attempt.step, error)

    def _remove_bases(self, bases: list[str]) -> None:
        try:
            for base in bases:
                self.owner.check()
                self._manager.remove_base(base)
        except (OSError, OwnerError) as error:
            log.warning("rank %d: frozen parameters that no checkpoint refers to stay: %s", self.rank, error)

    def _attempt(self, seq: int, step: int) -> AttemptId:
        return AttemptId(self._info.epoch, seq, step)


class KeeperThread:
    """Runs a Keeper; `post` takes its answers. It waits for its disk only."""

    def __init__(self, keeper: Keeper, post: Callable[[ToCoordinator], None], failed: background.Failed) -> None:
        self.keeper, self._post = keeper, post
        self._inbox: queue.SimpleQueue[ToRanks | None] = queue.SimpleQueue()
        self._thread = background.start("layerwise-keeper", self._run, failed)

    def put(self, message: ToRanks) -> None:
        self._inbox.put(message)

    def close(self, timeout_s: float) -> bool:
        """Lets go of the directory after all that it still has to do. Whether that was done in time."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (message := self._inbox.get()) is not None:
                answer = self.keeper.handle(message)
                if answer is not None:
                    self._post(answer)
        finally:
            self.keeper.owner.let_go()
