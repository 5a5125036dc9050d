# SPDX-License-Identifier: Apache-2.0
"""Bytes from any rank to any other, straight, for as long as something takes that all of them do together.

The session's own messages (`transports`) are small and pass through rank 0. This has one connection between each two
ranks, of the same kind and with the same proofs. A rank has a bounded number of bytes on their way, and every wait ends
when a rank that is waited for has made no progress for a time: it need not end soon while all of them get on.

A frame is one byte that says what it is, 15 bytes that belong to it, and a payload:

    message   u32 round, u8 whether it is the last part                     part of what one rank has for another
    block     u32 file, u64 offset                                          bytes of a file, as the caller numbers it
    taken     u64 bytes                                                     of messages and blocks, taken in
    beat                                                                    this rank has got on, or waits for others
    done                                                                    no block comes any more
    failed                                                                  the same, and why: UTF-8
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from types import TracebackType
from typing import TypeVar

from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.transports.frames import framed
from layerwise_dist.commit.transports.links import Links
from layerwise_dist.commit.transports.proof import Line
from layerwise_dist.commit.transports.rendezvous import meet_each
from layerwise_dist.errors import CommitError, DeadlineError, LayerwiseError
from layerwise_dist.supervision.patience import stuck_calls

T = TypeVar("T")

PART_BYTES = 1 << 20  # of one frame, at most
WINDOW_BYTES = 8 << 20  # on their way to one rank
ALL_WINDOWS_BYTES = 64 << 20  # on their way to all of them
_BEAT_S = 2.0
_FAREWELL_S = 5.0
_WORDS = 4000  # characters of a failure

_HEAD = struct.Struct("<B15x")
_MESSAGE = struct.Struct("<BIB10x")
_BLOCK = struct.Struct("<BIQ3x")
_TAKEN = struct.Struct("<BQ7x")
_IS_MESSAGE, _IS_BLOCK, _IS_TAKEN, _IS_BEAT, _IS_DONE, _IS_FAILED = range(6)

OnBlock = Callable[[int, int, memoryview], None]
"""Of a file, an offset in it, and the bytes that are there. On the exchange's thread, one at a time."""


class PeerFailed(CommitError):
    """Another rank has failed, which says so itself where all decide."""


class Exchange:
    """One rank's end of all connections. What waits belongs to one thread.

    Attributes:
        bytes_read: what this rank has read of files; whoever reads counts it here. While it grows, others wait.
        bytes_received: payloads of blocks.
    """

    def __init__(self, rank: int, world_size: int, lines: dict[int, Line], timeout_s: float) -> None:
        """`timeout_s` seconds are how long a rank that is waited for may get on with nothing."""
        self.rank, self.world_size, self._timeout_s = rank, world_size, timeout_s
        self._links = Links(lines)
        self._changed = threading.Condition()
        self._on_their_way = dict.fromkeys(lines, 0)
        self._heard = dict.fromkeys(lines, time.monotonic())
        self._over: dict[int, str | None] = {}  # ranks that send nothing more, and why if they failed
        self._gone: dict[int, str] = {}
        self._broken: str | None = None
        self._rounds = 0
        self._parts: dict[tuple[int, int], bytearray] = {}  # by round and rank
        self._whole: set[tuple[int, int]] = set()
        self._on_block: OnBlock | None = None
        self._told = -1
        self._waiting = self._closed = False
        self.bytes_read = self.bytes_received = 0
        self._links.start(self._arrived, self._ended, self._failed)
        self._links.call(self._beat)

    @classmethod
    def open(cls, participant: Participant, timeout_s: float) -> Exchange:
        """Collective. Raises CommitError on all ranks, naming the one that could not be reached."""
        lines: dict[int, Line] = {}
        if participant.world_size > 1:
            lines = meet_each(
                participant.rank,
                lambda record: participant.agree("connect all ranks", record, lambda records: records),
                timeout_s,
            )
        return cls(participant.rank, participant.world_size, lines, timeout_s)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else str(error) or type(error).__name__)

    @property
    def others(self) -> list[int]:
        return sorted(self._on_their_way)

    # -- messages ------------------------------------------------------------------------------------------------

    def all_to_all(self, what: str, payloads: Sequence[bytes]) -> list[bytes]:
        """Each rank's payload for each other; returns what each rank has for this one, by rank. All ranks together.

        Raises DeadlineError for a rank that gets on with nothing, CommitError for one that is gone and PeerFailed for
        one that has called `fail`. They name it, and `what` was waited for.
        """
        self._rounds += 1
        number = self._rounds
        for other in self.others:
            payload = memoryview(payloads[other])
            for begin in range(0, max(1, len(payload)), PART_BYTES):
                part = payload[begin : begin + PART_BYTES]
                last = begin + PART_BYTES >= len(payload)
                self._send(what, other, _MESSAGE.pack(_IS_MESSAGE, number, last), part)
        self._wait(what, lambda: [other for other in self.others if (number, other) not in self._whole])
        with self._changed:
            found = {other: bytes(self._parts.pop((number, other), b"")) for other in self.others}
            self._whole -= {(number, other) for other in self.others}
        return [payloads[self.rank] if other == self.rank else found[other] for other in range(self.world_size)]

    # -- blocks --------------------------------------------------------------------------------------------------

    def take_blocks(self, on_block: OnBlock) -> None:
        """From now on blocks that arrive are given to `on_block`.

        REQUIRES: no rank sends one before all have called.
        """
        self._on_block = on_block

    def send_block(self, file: int, offset: int, content: memoryview, to: Iterable[int]) -> None:
        """In parts of at most `PART_BYTES`; returns when all are on their way. Raises as `all_to_all`."""
        for other in to:
            for begin in range(0, len(content), PART_BYTES):
                part = content[begin : begin + PART_BYTES]
                self._send("hand blocks over", other, _BLOCK.pack(_IS_BLOCK, file, offset + begin), part)

    def done(self) -> None:
        """This rank sends no block any more."""
        self._tell(_HEAD.pack(_IS_DONE))

    def fail(self, why: str) -> None:
        """The same, and all that wait for this rank hear why."""
        self._tell(_HEAD.pack(_IS_FAILED) + why[:_WORDS].encode())

    def wait_for_blocks(self, lacks: Callable[[], Collection[int]]) -> None:
        """Until `lacks()`, the ranks whose blocks are missing, has none that still sends. Raises as `all_to_all`, but
        not for a rank that has failed.
        """

        def missing() -> list[int]:
            return [other for other in lacks() if other not in self._over]

        self._wait("take blocks over", missing, also_failed=True)

    def check_others(self) -> None:
        """Raises PeerFailed once another rank has failed: all that this one does is of no use any more."""
        with self._changed:
            for other, why in self._over.items():
                if why is not None:
                    raise PeerFailed(f"rank {other}: {why}")

    def wait_until_done(self) -> None:
        """Until no rank reads any more, be it that it failed. Raises as `all_to_all`."""
        self._wait(
            "read the checkpoint", lambda: [other for other in self.others if other not in self._over], also_failed=True
        )

    def close(self, why: str | None = None) -> None:
        """Ends all connections. `why`: it ends before its time, and the others hear that."""
        if self._closed:
            return
        self._closed = True
        if why is not None:
            self.fail(why)
        self._links.close(_FAREWELL_S if why is None else 1.0)

    # -- inside --------------------------------------------------------------------------------------------------

    def _tell(self, body: bytes) -> None:
        frame = framed(body)
        self._links.call(lambda: self._links.broadcast(frame))

    def _send(self, what: str, other: int, head: bytes, part: memoryview) -> None:
        size = len(part)

        def full() -> list[int]:
            if self._over.get(other) is not None:
                return []
            mine, every = self._on_their_way[other], sum(self._on_their_way.values())
            if not mine or (mine + size <= WINDOW_BYTES and every + size <= ALL_WINDOWS_BYTES):
                return []
            return [other]

        self._wait(what, full, also_failed=True)
        with self._changed:
            if self._over.get(other) is not None:
                return  # it takes nothing any more, and says why where all decide
            self._on_their_way[other] += size
        frame = framed(b"".join((head, part)))
        self._links.call(lambda: self._links.send(other, frame))

    def _wait(self, what: str, missing: Callable[[], Collection[int]], *, also_failed: bool = False) -> None:
        """Until `missing()` is empty. `also_failed`: a rank that has failed is no error here."""
        with self._changed:
            began = time.monotonic()
            self._waiting = True
            try:
                while waited := missing():
                    self._check(what, waited, also_failed)
                    now = time.monotonic()
                    since = {other: max(began, self._heard[other]) for other in waited}
                    oldest = min(since.values())
                    if now >= oldest + self._timeout_s:
                        late = sorted(other for other in waited if now >= since[other] + self._timeout_s)
                        raise DeadlineError(
                            f"{what}: rank(s) {late} have made no progress for {self._timeout_s:g} s{stuck_calls()}"
                        )
                    self._changed.wait(oldest + self._timeout_s - now)
                if self._broken is not None:
                    raise CommitError(f"{what}: rank {self.rank}: {self._broken}")
            finally:
                self._waiting = False

    def _check(self, what: str, waited: Collection[int], also_failed: bool) -> None:
        if self._broken is not None:
            raise CommitError(f"{what}: rank {self.rank}: {self._broken}")
        for other in waited:
            if other in self._gone and self._over.get(other) is None:
                raise CommitError(f"{what}: rank {other}: its connection is gone: {self._gone[other]}")
            if not also_failed and (why := self._over.get(other)) is not None:
                raise PeerFailed(f"{what}: rank {other}: {why}")

    # -- on the connections' thread ------------------------------------------------------------------------------

    def _arrived(self, other: int, body: bytes) -> None:
        if len(body) < _HEAD.size or body[0] > _IS_FAILED:
            raise ValueError(f"a frame of {len(body)} bytes that begins with {body[:1].hex()}")
        kind, payload = body[0], memoryview(body)[_HEAD.size :]
        if kind == _IS_BLOCK:
            _, file, offset = _BLOCK.unpack_from(body)
            if self._on_block is None:
                raise ValueError("a block before any was asked for")
            self._on_block(file, offset, payload)
        with self._changed:
            self._heard[other] = time.monotonic()
            if kind == _IS_MESSAGE:
                _, number, last = _MESSAGE.unpack_from(body)
                self._parts.setdefault((number, other), bytearray()).extend(payload)
                if last:
                    self._whole.add((number, other))
            elif kind == _IS_BLOCK:
                self.bytes_received += len(payload)
            elif kind == _IS_TAKEN:
                self._on_their_way[other] -= _TAKEN.unpack_from(body)[1]
            elif kind == _IS_DONE:
                self._over.setdefault(other, None)
            elif kind == _IS_FAILED:
                self._over[other] = bytes(payload).decode(errors="replace") or "it failed"
            self._changed.notify_all()
        if kind in (_IS_MESSAGE, _IS_BLOCK):
            self._links.send(other, framed(_TAKEN.pack(_IS_TAKEN, len(payload))))

    def _ended(self, other: int, why: str) -> None:
        with self._changed:
            self._gone[other] = why
            self._changed.notify_all()

    def _failed(self, why: str) -> None:
        with self._changed:
            self._broken = why
            self._changed.notify_all()

    def _beat(self) -> None:
        """Every few seconds others hear whether this rank gets on. One that waits for others is not to be named."""
        if self._waiting or self.bytes_read != self._told:
            self._told = self.bytes_read
            self._links.broadcast(framed(_HEAD.pack(_IS_BEAT)))
        self._links.later(min(_BEAT_S, self._timeout_s / 4), self._beat)


def jointly(
    participant: Participant, exchange: Exchange, what: str, action: Callable[[], T]
) -> tuple[bool, T | None]:  # fmt: skip
    """As `agreement.together`, of an action in which ranks wait for each other over the exchange: where it fails on
    one, the others wait no longer.
    """
    met: list[PeerFailed] = []
    own: list[LayerwiseError] = []

    def act() -> T | None:
        try:
            return action()
        except PeerFailed as failed:
            met.append(failed)
            exchange.done()  # others may wait for what this rank does not send any more
            return None
        except Exception as error:
            exchange.fail(str(error) or type(error).__name__)
            if isinstance(error, LayerwiseError):
                own.append(error)
            raise

    try:
        sound, value = together(participant, what, act)
    except DeadlineError as error:
        if own and error is not own[0]:
            raise own[0] from None  # it says more than that nothing was decided
        raise
    if sound and met:
        raise met[0]
    return sound, value
