# SPDX-License-Identifier: Apache-2.0
"""The processes of `bench commit`: rank 0 and all the others of a simulated job, or a real job of light ranks.

    python -m layerwise_dist.bench.commit_worker root|crowd|job JSON

One JSON line out for each thing that the other side needs to know; the last one is the result.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from layerwise_dist import _native
from layerwise_dist.bench.light import LightRank, LightWrite, Switchboard
from layerwise_dist.commit.ledger import Ledger, Post
from layerwise_dist.commit.merging import merge
from layerwise_dist.commit.messages import ToRanks
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import Place
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.start import Rules, start_coordinator
from layerwise_dist.commit.transports import Message
from layerwise_dist.commit.transports.calls import accept, connect, listen
from layerwise_dist.commit.transports.frames import decode, encode
from layerwise_dist.commit.transports.links import Links
from layerwise_dist.commit.transports.rendezvous import Met, meet
from layerwise_dist.commit.transports.store import over_tcp
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.reports import ShardReport
from layerwise_dist.supervision import background

_WARM_UP = 2  # commits before the first that counts
_DEADLINE_S = 120.0


def connections(ranks: int, on_node: int) -> dict[int, list[int]]:
    """Who connects to rank 0 and speaks for whom, with `on_node` ranks on each node."""
    own = {rank: [rank] for rank in range(1, min(on_node, ranks))}
    others = {rank: list(range(rank, min(rank + on_node, ranks))) for rank in range(on_node, ranks, on_node)}
    return own | others


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


class RootWrite(LightWrite):
    """Rank 0's shard of a simulated checkpoint: none. The folder is there, for the manifest."""

    def persist(self, timeout_s: float) -> ShardReport:
        return ShardReport(0, filenames.shard_file(0), 4096, 4096, 0)


def root(ranks: int, on_node: int, commits: int, folder: str) -> None:
    """Rank 0 as it is, but for its shard: transport, participant, coordinator, manifests, retention."""
    expected = connections(ranks, on_node)
    token = secrets.token_hex(16)
    (server,) = listen(["127.0.0.1"], len(expected))
    say(port=server.getsockname()[1], token=token)
    lines = accept([server], set(expected), token, time.monotonic() + _DEADLINE_S)
    server.close()
    transport = over_tcp(0, ranks, Met(lines, expected))
    env = _native.PosixEnv()
    manager = CheckpointMetadataManager(env, folder)
    place = Place(env, folder, manager, ranks=range(ranks), file_mode=0o600, dir_mode=0o700, who="bench")
    plan = merge([place.look()], folder, fresh=True)
    place.settle(plan, {})
    assert place.owner is not None
    info = plan.info([list(range(ranks))])
    rules = Rules(
        framework="light", software={}, keep_last=2, keep_every_n_steps=None, timeout_s=_DEADLINE_S,
        on_failure="raise", raise_after=1,
    )  # fmt: skip
    _, coordinator = start_coordinator(transport, manager, place.owner, info, rules)
    # Only now, since it starts the transport: the others speak at once, and agree on nothing.
    participant = Participant(transport, timeout_s=_DEADLINE_S, coordinator=coordinator)
    participant.recycle(lambda attempt: LightWrite(env, folder, attempt, 0).discard())
    links = transport._connections
    clocks = {"all": time.CLOCK_PROCESS_CPUTIME_ID}
    for thread in threading.enumerate():
        if thread.name in ("layerwise-messages", "layerwise-coordinator"):
            assert thread.ident is not None, "it has begun"
            clocks[thread.name] = time.pthread_getcpuclockid(thread.ident)

    def counters() -> dict[str, float]:
        traffic = {name: getattr(links, name) for name in ("frames_in", "frames_out", "bytes_in", "bytes_out")}
        return {name: time.clock_gettime(clock) for name, clock in clocks.items()} | traffic

    before = counters()
    for number in range(1, commits + _WARM_UP + 1):
        write = RootWrite(env, folder, AttemptId(info.epoch, info.first_seq + number - 1, number), 0)
        write.begin()
        participant.began(write.attempt)
        participant.staged(write)
        participant.boundary(number)
        participant.wait(number, "committed", _DEADLINE_S)
        if number == _WARM_UP:
            before = counters()
    after = counters()
    participant.close(10.0)
    coordinator.close(10.0)
    say(**{name: (after[name] - before[name]) / commits for name in after})


class _Sealed:
    """What `Ledger` asks of a shard: its attempt."""

    def __init__(self, attempt: AttemptId) -> None:
        self.attempt = attempt


class Crowd:
    """All ranks but 0, as the processes that are connected to rank 0 would pass on what they say."""

    def __init__(self, ranks: int, on_node: int, port: int, token: str, epoch: int, first_seq: int) -> None:
        self._epoch, self._first_seq = epoch, first_seq
        serves = connections(ranks, on_node)
        deadline = time.monotonic() + _DEADLINE_S
        lines = {key: connect(key, [("127.0.0.1", port)], token, deadline) for key in serves}
        self._ledgers = {key: [Ledger(rank, ranks) for rank in served] for key, served in serves.items()}
        self._body = b""
        self._messages: list[ToRanks] = []
        self._heard = dict.fromkeys(serves, 0)
        self._waiting = set(serves)
        self._step = 0
        self._done = threading.Event()
        self.links = Links(lines)
        self.links.start(self._hear, lambda key, why: None, background.log_only)

    def checkpoint(self, step: int) -> tuple[float, float]:
        """Seconds until all have heard of the commit: from the first word, and from the last report."""
        attempt = AttemptId(self._epoch, self._first_seq + step - 1, step)
        self._step, self._waiting = step, set(self._ledgers)
        self._done.clear()
        began = time.perf_counter()
        self.links.call(lambda: self._say_all("staged", attempt, step))
        reported: list[float] = []
        self.links.call(lambda: self._say_all("durable", attempt, step))
        self.links.call(lambda: reported.append(time.perf_counter()))
        if not self._done.wait(_DEADLINE_S):
            raise SystemExit(f"step {step} was not committed in {_DEADLINE_S:g} s")
        ended = time.perf_counter()
        return ended - began, ended - reported[0]

    def _say_all(self, what: str, attempt: AttemptId, step: int) -> None:
        for key, ranks in self._ledgers.items():
            messages: list[Message] = []
            for rank in ranks:
                if what == "staged":
                    actions = [*rank.sealed(_Sealed(attempt)), *rank.boundary(step)]  # type: ignore[arg-type]
                else:
                    report = ShardReport(
                        rank.rank, filenames.shard_file(rank.rank), 1 << 30, 65536, hash(attempt) & (1 << 64) - 1
                    )
                    actions = rank.persisted(attempt, report)
                messages += [action.message for action in actions if isinstance(action, Post)]
            self.links.send(key, encode(messages))

    def _hear(self, key: int, body: bytes) -> None:
        if body != self._body:  # every node hears the same
            self._body, self._messages = body, decode(body)
        for message in self._messages:
            for rank in self._ledgers[key]:
                rank.receive(message)
            if message["t"] == "committed" and message["step"] == self._step:
                self._waiting.discard(key)
                if not self._waiting:
                    self._done.set()

    def close(self) -> None:
        def leave() -> None:
            for key, ranks in self._ledgers.items():
                self.links.send(key, encode({"t": "closed", "rank": rank.rank} for rank in ranks))

        self.links.call(leave)
        self.links.close(30.0)


def crowd(ranks: int, on_node: int, commits: int, port: int, token: str) -> None:
    others = Crowd(ranks, on_node, port, token, 1, 1)
    times = [others.checkpoint(step) for step in range(1, commits + _WARM_UP + 1)][_WARM_UP:]
    others.close()
    say(checkpoint_s=[first for first, _ in times], decide_s=[last for _, last in times])


def job(ranks: int, on_node: int, commits: int, folder: str) -> None:
    """Real processes, forked from this one."""
    board = Switchboard(ranks)
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _rank(rank, board, on_node, commits, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    try:
        board.serve()
        codes = []
        while pids:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]))
            del pids[0]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def _rank(rank: int, board: Switchboard, on_node: int, commits: int, folder: str) -> None:
    gather = board.of(rank)
    met = meet(rank, gather, _DEADLINE_S, where=str(rank // on_node))
    transport = over_tcp(rank, len(gather({})), met)
    light = LightRank(transport, folder, timeout_s=_DEADLINE_S)
    times = []
    cpu = time.process_time()
    for number in range(commits + _WARM_UP):
        began = time.perf_counter()
        step = light.checkpoint()
        light.participant.wait(step, "committed", _DEADLINE_S)
        times.append(time.perf_counter() - began)
        if number + 1 == _WARM_UP:
            cpu = time.process_time()
    cpu = (time.process_time() - cpu) / commits
    light.close()
    if rank == 0:
        say(checkpoint_s=times[_WARM_UP:], all=cpu)


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"root": root, "crowd": crowd, "job": job}
    roles[sys.argv[1]](**json.loads(sys.argv[2]))
