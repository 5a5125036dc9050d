# SPDX-License-Identifier: Apache-2.0
"""Messages over an MPI communicator of the session's own, for jobs that mpirun started (mpi4py, extra ``[mpi]``).

The ranks are a tree (`relay`), each with at most eight below it. After the start every MPI call is made by one thread,
and none of them waits: messages are probed for, sends and receives are tested. So a deadline is never inside MPI. The
training script may call MPI at the same time, which is why MPI must have been built with MPI_THREAD_MULTIPLE.

MPI does not tell of a rank that died. mpirun ends the whole job then.
"""

from __future__ import annotations

import heapq
import importlib
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from layerwise_dist.commit.transports.frames import OnEnd, OnFrame, encode
from layerwise_dist.commit.transports.relay import ABOVE, RelayTransport
from layerwise_dist.errors import ConfigError, DeadlineError
from layerwise_dist.supervision import background
from layerwise_dist.supervision.background import Failed

FANOUT = 8
_TAG = 1
_LENGTH_BYTES = len(encode([])) - 2
_LAST_WORDS_S = 2.0
_SHORTEST_S, _LONGEST_S = 50e-6, 3e-3  # between two looks; the longest while nothing happens


def launched() -> int:
    """How many processes mpirun says that it started; 1 without it."""
    if "mpi4py.MPI" in sys.modules:
        return _mpi().COMM_WORLD.Get_size()
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("MV2_COMM_WORLD_SIZE") or 1)


def _mpi() -> Any:
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"commit.transport = 'mpi' needs mpi4py and an MPI library ({error}): pip install 'layerwise_dist[mpi]', "
            "or call torch.distributed.init_process_group() before attach() and use 'store'"
        ) from None


def open_mpi(rank: int | None, world_size: int | None, timeout_s: float) -> RelayTransport:
    """Collective. `rank` and `world_size` are torch.distributed's where it is initialized, else MPI's.

    Raises ConfigError where MPI cannot be used, DeadlineError when not all ranks call it in `timeout_s` seconds.
    """
    mpi = _mpi()
    levels = {mpi.THREAD_SINGLE: "SINGLE", mpi.THREAD_FUNNELED: "FUNNELED", mpi.THREAD_SERIALIZED: "SERIALIZED"}
    if (found := levels.get(mpi.Query_thread())) is not None:
        raise ConfigError(
            f"commit.transport = 'mpi': MPI runs with MPI_THREAD_{found}, and MPI_THREAD_MULTIPLE is needed, since "
            "checkpoint messages have a thread of their own: use an MPI that was built with it (mpi4py asks for it "
            "unless mpi4py.rc.thread_level says otherwise), or use 'store'"
        )
    world = mpi.COMM_WORLD
    if world_size is not None and world_size != world.Get_size():
        raise ConfigError(
            f"commit.transport = 'mpi': torch.distributed has {world_size} ranks, MPI_COMM_WORLD {world.Get_size()}"
        )
    deadline = time.monotonic() + timeout_s
    own, request = world.Idup()
    _complete(request, deadline, timeout_s)
    own.Set_errhandler(mpi.ERRORS_RETURN)
    places = bytearray(8 * own.Get_size())
    mine = own.Get_rank() if rank is None else rank
    _complete(own.Iallgather([mine.to_bytes(8, "little"), mpi.BYTE], [places, mpi.BYTE]), deadline, timeout_s)
    of_rank = {int.from_bytes(places[8 * at : 8 * at + 8], "little"): at for at in range(own.Get_size())}
    if sorted(of_rank) != list(range(own.Get_size())):
        raise ConfigError("commit.transport = 'mpi': torch.distributed's ranks are not one for each of MPI's")
    serves = ranks_below(mine, own.Get_size())
    peers = {other: of_rank[other] for other in serves}
    above = (mine - 1) // FANOUT
    if mine:
        peers[ABOVE] = of_rank[above]
    return RelayTransport(mine, own.Get_size(), MpiConnections(mpi, own, peers), serves, f"rank {above}")


def ranks_below(rank: int, world_size: int) -> dict[int, list[int]]:
    """The ranks right below this one in the tree, and who speaks through each of them."""

    def subtree(top: int) -> list[int]:
        found: list[int] = []
        level = range(top, top + 1)
        while level.start < world_size:
            found += range(level.start, min(level.stop, world_size))
            level = range(FANOUT * level.start + 1, FANOUT * (level.stop - 1) + FANOUT + 1)
        return found

    children = range(FANOUT * rank + 1, min(FANOUT * rank + FANOUT + 1, world_size))
    return {child: subtree(child) for child in children}


def _complete(request: Any, deadline: float, timeout_s: float) -> None:
    while not request.Test():
        if time.monotonic() > deadline:
            raise DeadlineError(f"attach: waited {timeout_s:g} s for all ranks of MPI_COMM_WORLD to call it")
        time.sleep(1e-4)


class MpiConnections:
    """`relay.Connections` to other ranks of one communicator, which nobody else uses."""

    def __init__(self, mpi: Any, comm: Any, peers: dict[int, int]) -> None:
        """`peers`: the rank in `comm` by key."""
        self._mpi, self._comm, self._peers = mpi, comm, peers
        self._keys = {place: key for key, place in peers.items()}
        self._sending: deque[tuple[Any, bytes]] = deque()
        self._receiving: deque[tuple[int, Any, bytearray]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._wake = threading.Event()
        self._closing: float | None = None
        self._ended: set[int] = set()  # keys from which nothing more comes
        self._on_frame: OnFrame = _ignore
        self._on_end: OnEnd = _ignore
        self._on_broken: Failed = background.log_only
        self._thread: threading.Thread | None = None

    def start(self, on_frame: OnFrame, on_end: OnEnd, on_broken: Failed) -> None:
        self._on_frame, self._on_end, self._on_broken = on_frame, on_end, on_broken
        self._thread = background.start("layerwise-messages", self._run, background.log_only)

    def call(self, action: Callable[[], None]) -> None:
        self._calls.append(action)
        self._wake.set()

    def close(self, timeout_s: float) -> None:
        """The communicator is freed if all others have said the end too; else MPI keeps it until the process ends."""
        deadline = time.monotonic() + timeout_s

        def begin() -> None:
            self._closing = deadline
            for key in list(self._peers):
                self._say_end(key)

        if self._thread is not None and self._thread.is_alive():
            self.call(begin)
            self._thread.join(timeout_s + 1.0)

    # -- on the thread ------------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))

    def send(self, key: int, frame: bytes) -> None:
        if key in self._peers:
            self._sending.append((self._comm.Isend([frame, self._mpi.BYTE], self._peers[key], _TAG), frame))

    def broadcast(self, frame: bytes, *, but: int | None = None) -> None:
        for key in list(self._peers):
            if key != but:
                self.send(key, frame)

    def drop(self) -> None:
        for key in list(self._peers):
            self._say_end(key)

    def _say_end(self, key: int) -> None:
        """An empty message: nothing is sent to that rank any more."""
        self.send(key, b"")
        del self._peers[key]

    def _run(self) -> None:
        pause = _SHORTEST_S
        try:
            while not self._over():
                self._wake.clear()
                busy = self._turn()
                pause = _SHORTEST_S if busy else min(_LONGEST_S, 2 * pause)
                if not self._calls:
                    self._wake.wait(pause)
            if self._ended.issuperset(self._keys.values()) and not self._sending:
                self._comm.Free()
        except BaseException as error:  # whoever waits for messages, here and at the other ends, has to know
            if self._closing is None:
                self._on_broken(f"thread layerwise-messages: {background.describe(error)}")
                self._flush()
            raise

    def _flush(self) -> None:
        """The last words of a thread that ends."""
        deadline = time.monotonic() + _LAST_WORDS_S
        self.drop()
        while self._sending and time.monotonic() < deadline:
            if self._sending[0][0].Test():
                self._sending.popleft()
            else:
                time.sleep(_SHORTEST_S)

    def _over(self) -> bool:
        if self._closing is None:
            return False
        done = not self._sending and self._ended.issuperset(self._keys.values())
        return done or time.monotonic() > self._closing

    def _turn(self) -> bool:
        """Whether anything happened."""
        busy = bool(self._calls)
        while self._calls:
            self._calls.popleft()()
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            busy = True
            heapq.heappop(self._later)[2]()
        while self._sending and self._sending[0][0].Test():
            busy = True
            self._sending.popleft()
        return self._receive() or busy

    def _receive(self) -> bool:
        status, busy = self._mpi.Status(), False
        while (message := self._comm.Improbe(self._mpi.ANY_SOURCE, _TAG, status)) is not None:
            body = bytearray(status.Get_count(self._mpi.BYTE))
            request = message.Irecv([body, self._mpi.BYTE])
            self._receiving.append((self._keys[status.Get_source()], request, body))
        # In the order in which they were matched, which is that in which each rank sent them.
        while self._receiving and self._receiving[0][1].Test():
            busy = True
            key, _, body = self._receiving.popleft()
            if body:
                self._on_frame(key, bytes(memoryview(body)[_LENGTH_BYTES:]))
            else:
                self._end(key)
        return busy

    def _end(self, key: int) -> None:
        self._ended.add(key)
        if key in self._peers:
            self._say_end(key)
            self._on_end(key, "it has ended")


def _ignore(key: int, what: object) -> None:
    return None
