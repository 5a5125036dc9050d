# SPDX-License-Identifier: Apache-2.0
"""Bytes between ranks arrive whole however large they are, and who fails, ends or gets on with nothing is named."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kit.threads import in_threads

from layerwise_dist.commit import exchange
from layerwise_dist.commit.exchange import Exchange, PeerFailed, jointly
from layerwise_dist.commit.transports.frames import framed
from layerwise_dist.commit.transports.proof import Line
from layerwise_dist.errors import CommitError, DamageError, DeadlineError

pytestmark = pytest.mark.quick


@contextmanager
def ranks(world_size: int, timeout_s: float = 20.0) -> Iterator[list[Exchange]]:
    """Their exchanges, each connected with each other one."""
    lines: list[dict[int, Line]] = [{} for _ in range(world_size)]
    for one in range(world_size):
        for other in range(one):
            here, there = socket.socketpair()
            lines[one][other], lines[other][one] = Line(here), Line(there)
    found = [Exchange(rank, world_size, lines[rank], timeout_s) for rank in range(world_size)]
    try:
        yield found
    finally:
        in_threads(world_size, lambda rank: found[rank].close("over"))


@contextmanager
def facing(timeout_s: float = 20.0) -> Iterator[tuple[Exchange, socket.socket]]:
    """Rank 0 of two, and the socket of the other."""
    here, there = socket.socketpair()
    mine = Exchange(0, 2, {1: Line(here)}, timeout_s)
    try:
        yield mine, there
    finally:
        there.close()
        mine.close("over")


def test_messages_of_many_parts_arrive_whole_through_small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PART_BYTES", 1000)
    monkeypatch.setattr(exchange, "WINDOW_BYTES", 2500)
    monkeypatch.setattr(exchange, "ALL_WINDOWS_BYTES", 4000)

    def said(by: int, to: int) -> bytes:
        return bytes([by, to]) * (0, 1, 500, 3001, 20_000)[by + to]

    with ranks(3) as every:
        found = in_threads(3, lambda me: every[me].all_to_all("say", [said(me, to) for to in range(3)]))
        assert found == [[said(by, me) for by in range(3)] for me in range(3)]


@pytest.mark.slow
def test_a_rank_that_gets_on_with_nothing_is_named_in_time() -> None:
    with facing(timeout_s=0.2) as (mine, _):
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=r"^say: rank\(s\) \[1\] have made no progress for 0.2 s"):
            mine.all_to_all("say", [b"", b"x"])
        assert time.monotonic() - began < 15


def test_a_rank_that_is_gone_and_one_that_has_failed_are_errors_by_name() -> None:
    with ranks(3) as every:
        every[2].close()
        every[2].close()  # once is enough
        with pytest.raises(CommitError, match="say: rank 2: its connection is gone: it has ended"):
            every[0].all_to_all("say", [b""] * 3)
        every[1].fail("its disk is gone")
        every[0].wait_for_blocks(lambda: [1])  # what a failed rank has not sent is not waited for
        with pytest.raises(PeerFailed, match="^rank 1: its disk is gone"):
            every[0].check_others()
        with pytest.raises(PeerFailed, match="say: rank 1: its disk is gone"):
            every[0]._wait("say", lambda: [1])
        every[0].send_block(0, 0, memoryview(b"x"), [1])  # taken by nobody, and no error: it says why where all decide


def test_a_failure_without_words_is_one() -> None:
    with ranks(2) as (one, other):
        other.fail("")
        one.wait_for_blocks(lambda: [1])
        with pytest.raises(PeerFailed, match="^rank 1: it failed"):
            one.check_others()


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"\x01", "a frame of 1 bytes that begins with 01"),
        (bytes([6]) * 16, "a frame of 16 bytes that begins with 06"),
        (b"", "a frame of 0 bytes that begins with "),
        (bytes([1]) + bytes(15) + b"x", "a block before any was asked for"),
    ],
    ids=["too short", "of no kind", "empty", "a block too early"],
)
def test_what_no_rank_sends_ends_the_connection(sent: bytes, says: str) -> None:
    with facing() as (mine, there):
        there.sendall(framed(sent))
        with pytest.raises(CommitError, match=f"say: rank 1: its connection is gone: .*not a message: {says}"):
            mine.all_to_all("say", [b"", b""])


def test_a_thread_that_breaks_is_an_error_of_its_own_rank() -> None:
    def boom() -> None:
        raise RuntimeError("of nobody's")

    with facing() as (mine, _):
        waiting = in_threads(2, lambda which: mine._links.call(boom) if which else mine.wait_until_done())[0]
        says = "rank 0: thread layerwise-messages: RuntimeError: of nobody's"
        assert isinstance(waiting, CommitError) and str(waiting) == f"read the checkpoint: {says}"
        with pytest.raises(CommitError, match=f"^say: {says}"):
            mine.all_to_all("say", [b"", b""])
        with pytest.raises(CommitError, match=f"^take blocks over: {says}"):
            mine.wait_for_blocks(list)


# -- where all decide --------------------------------------------------------------------------------------------------


class Vote:
    """What all ranks decide: with what this rank says and nothing else, or not in time."""

    def __init__(self, late: DeadlineError | None = None) -> None:
        self.late = late

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any]) -> Any:
        if self.late is not None:
            raise self.late
        return decide([payload])


def test_its_own_failure_says_more_than_that_nothing_was_decided() -> None:
    late = DeadlineError("read: waited 1 s for rank 0's decision")
    with ranks(2) as (one, other):

        def slow() -> None:
            raise DeadlineError("read: rank(s) [1] have made no progress for 9 s")

        with pytest.raises(DeadlineError, match="no progress for 9 s"):
            jointly(Vote(late), one, "read", slow)  # type: ignore[arg-type]
        with pytest.raises(DeadlineError, match="waited 1 s for rank 0's decision"):
            jointly(Vote(late), one, "read", lambda: None)  # type: ignore[arg-type]
        other.wait_until_done()
        with pytest.raises(PeerFailed, match="rank 0: read: rank.s. .1. have made no progress"):
            other.check_others()


def test_a_peer_that_failed_is_told_though_nobody_says_so_in_the_vote() -> None:
    with ranks(2) as (one, other):
        other.fail("its disk is gone")
        other.done()
        one.wait_until_done()
        with pytest.raises(PeerFailed, match="rank 1: its disk is gone"):
            jointly(Vote(), one, "read", one.check_others)  # type: ignore[arg-type]
        other.wait_until_done()  # it heard that nothing comes any more


def test_damage_of_a_rank_is_no_error_of_the_others() -> None:
    def damaged() -> None:
        raise DamageError("block 3")

    with ranks(2) as (one, other):
        assert jointly(Vote(), one, "read", damaged) == (False, None)  # type: ignore[arg-type]
        other.wait_until_done()
        with pytest.raises(PeerFailed, match="rank 0: block 3"):
            other.check_others()
