# SPDX-License-Identifier: Apache-2.0
"""A rank without a model: real commits around one small file for each shard.

For what is measured and tested of commits with more ranks, or more commits, than models could be trained for.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

from layerwise_dist import _native
from layerwise_dist.commit.metadata import CheckpointMetadataManager, ParentRef
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.session import follow
from layerwise_dist.commit.start import Rules, start_session
from layerwise_dist.commit.transports import Transport
from layerwise_dist.commit.transports.rendezvous import Gather
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import Env
from layerwise_dist.storage.removal import remove
from layerwise_dist.storage.reports import ShardReport


def shard_bytes(attempt: AttemptId, rank: int) -> bytes:
    """What a light rank's shard holds: it says whose it is, so that a reader can tell."""
    return f"shard of rank {rank} of attempt {attempt.text}\n".encode()


class LightWrite:
    """One rank's shard of one attempt, with the flushes of a real one. `at(stage)` is called before each of them."""

    def __init__(
        self, env: Env, root: str, attempt: AttemptId, rank: int, at: Callable[[str], None] = lambda stage: None
    ) -> None:
        self.attempt = attempt
        self._env, self._root, self._rank, self._at = env, root, rank, at
        self._folder = os.path.join(root, attempt.folder)
        self._final = os.path.join(self._folder, filenames.shard_file(rank))

    def begin(self) -> None:
        self._at("open")
        try:
            self._env.make_dir(self._folder, 0o700)
        except FileExistsError:
            pass

    def persist(self, timeout_s: float) -> ShardReport:
        data = shard_bytes(self.attempt, self._rank)
        self._at("write")
        self._env.write_file(self._final + filenames.PARTIAL, data, 0o600)
        self._at("rename")
        self._env.rename(self._final + filenames.PARTIAL, self._final)
        self._at("flush")
        self._env.sync_dir(self._folder)
        self._env.sync_dir(self._root)
        self._at("report")
        return ShardReport(self._rank, filenames.shard_file(self._rank), len(data), 4096, _native.xxh3_64(data))

    def abort(self) -> None:
        return None

    def discard(self) -> None:
        name = os.path.basename(self._final)
        remove(self._env, self._folder, (name + filenames.PARTIAL, name))


class LightRank:
    """One rank's session. Collective: all ranks make theirs, and close them, together."""

    def __init__(
        self, transport: Transport, root: str, *, env: Env | None = None, timeout_s: float = 60.0,
        on_failure: str = "raise", raise_after: int = 5, keep_last: int = 2,
        at: Callable[[str], None] = lambda stage: None,
    ) -> None:  # fmt: skip
        self.env = env if env is not None else _native.PosixEnv()
        self.root, self._timeout_s, self._at = root, timeout_s, at
        self.rank = transport.rank
        self.participant = Participant(transport, timeout_s=timeout_s)
        self.participant.recycle(self._remove)
        rules = Rules(
            framework="light", software={}, keep_last=keep_last, keep_every_n_steps=None, timeout_s=timeout_s,
            on_failure=on_failure, raise_after=raise_after,
        )  # fmt: skip
        session = start_session(
            self.env, root, transport, self.participant, rules, file_mode=0o600, dir_mode=0o700,
            who=f"pid {os.getpid()}",
        )  # fmt: skip
        self.info, self.committer, self.coordinator = session.info, session.committer, session.coordinator
        self._seq, self._count = self.info.first_seq, 0
        self.start = self._follow(session.manager)

    def _follow(self, manager: CheckpointMetadataManager) -> int:
        """The lineage continues from its newest commit. Its step, 0 if there is none."""

        def newest(_: list[Any]) -> list[int] | None:
            lineage = manager.inventory().lineage()
            return [lineage[0].epoch, lineage[0].seq, lineage[0].step] if lineage else None

        found = self.participant.agree("choose a checkpoint", None, newest)
        head = AttemptId(*found) if found else None
        follow(self.participant, self.committer, ParentRef(seq=head.seq, attempt=head.text) if head else None, None)
        return head.step if head else 0

    def checkpoint(self) -> int:
        """One iteration that is checkpointed, up to its boundary; raises as a boundary does. Returns the step."""
        self._count += 1
        attempt = AttemptId(self.info.epoch, self._seq, self.start + self._count)
        self._seq += 1
        write = LightWrite(self.env, self.root, attempt, self.rank, self._at)
        self.participant.began(attempt)
        try:
            write.begin()
        except OSError as error:
            self.participant.failed(attempt, str(error), None)
        else:
            self.participant.staged(write)
        self.participant.boundary(self._count)
        return attempt.step

    def _remove(self, attempt: AttemptId) -> None:
        # On the thread that takes messages, where a real rank would only make a note: it is one small file.
        LightWrite(self.env, self.root, attempt, self.rank).discard()

    def close(self) -> None:
        """Raises as `LayerwiseEngine.close`."""
        try:
            self.participant.drain(self._timeout_s)
            self.participant.ended()
        finally:
            self.participant.close(self._timeout_s)
            if self.coordinator is not None:
                self.coordinator.close(self._timeout_s)


class Switchboard:
    """The gather of processes that share no process group: each sends its record to one that knows all of them."""

    def __init__(self, world_size: int) -> None:
        self._pairs = [socket.socketpair() for _ in range(world_size)]

    def of(self, rank: int) -> Gather:
        """For the process of that rank. To be called there, after the fork."""
        mine = self._pairs[rank][1]
        for number, (here, there) in enumerate(self._pairs):
            here.close()
            if number != rank:
                there.close()
        file = mine.makefile("rwb")

        def gather(record: dict[str, Any]) -> list[dict[str, Any]]:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            return json.loads(file.readline())

        return gather

    def serve(self) -> None:
        """Until no process gathers any more; a process that ended early ends the others' gathers with an error."""
        for _, there in self._pairs:
            there.close()
        files = [here.makefile("rwb") for here, _ in self._pairs]
        while all(lines := [file.readline() for file in files]):
            answer = b"[" + b",".join(line.strip() for line in lines) + b"]\n"
            for file in files:
                file.write(answer)
                file.flush()
        for file, (here, _) in zip(files, self._pairs, strict=True):
            file.close()
            here.close()
