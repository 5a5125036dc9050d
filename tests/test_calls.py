# SPDX-License-Identifier: Apache-2.0
"""Strangers at the ports: they learn nothing, hold nobody up, and what they send is never taken for a rank's."""

from __future__ import annotations

import errno
import json
import os
import resource
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from kit.threads import Gathering, in_threads

from layerwise_dist.commit.transports import calls, proof, rendezvous
from layerwise_dist.commit.transports.calls import accept, connect, listen
from layerwise_dist.commit.transports.frames import decode, encode
from layerwise_dist.commit.transports.links import Links
from layerwise_dist.commit.transports.proof import MAC_BYTES, Caller, Host, Line, Seals
from layerwise_dist.errors import CommitError

pytestmark = pytest.mark.quick

TOKEN = secrets.token_hex(16)
HERE = "127.0.0.1"


@pytest.fixture
def things() -> Iterator[ExitStack]:
    """Whatever is to be closed."""
    with ExitStack() as stack:
        yield stack


def server(things: ExitStack) -> tuple[socket.socket, int]:
    (found,) = listen([HERE], 4)
    things.enter_context(found)
    return found, found.getsockname()[1]


def pair(things: ExitStack) -> tuple[Line, Line]:
    """Two ends that have proved who they are: the host's, and the caller's."""
    door, port = server(things)
    host, caller = in_threads(
        2,
        lambda end: (
            connect(1, [(HERE, port)], TOKEN, time.monotonic() + 10)
            if end
            else accept([door], {1}, TOKEN, time.monotonic() + 10)[1]
        ),
    )
    things.callback(host.close)
    things.callback(caller.close)
    return host, caller


# -- who it is ------------------------------------------------------------------------------------------------------


def test_both_ends_prove_the_token_and_neither_sends_it(things: ExitStack) -> None:
    """All that goes over the wire is written down by somebody in between."""
    door, port = server(things)
    between, entry = server(things)
    between.setblocking(True)
    said: list[bytes] = []

    def pass_on() -> None:
        here, there = between.accept()[0], socket.create_connection((HERE, port))
        things.enter_context(here)
        things.enter_context(there)
        for sender, taker in ((here, there), (there, here)) * 2:
            data = sender.recv(4096)
            said.append(data)
            taker.sendall(data)

    threading.Thread(target=pass_on, daemon=True).start()
    ends = in_threads(
        2,
        lambda end: (
            connect(1, [(HERE, entry)], TOKEN, time.monotonic() + 10)
            if end
            else accept([door], {1}, TOKEN, time.monotonic() + 10)[1]
        ),
    )
    assert ends[0].keys.sending == ends[1].keys.receiving != ends[0].keys.receiving == ends[1].keys.sending
    assert [len(data) for data in said] == [
        proof.CALL_BYTES, proof.ANSWER_BYTES, proof.PROOF_BYTES, proof.PROOF_BYTES
    ]  # fmt: skip
    assert len({*said}) == 4 and TOKEN.encode() not in b"".join(said)


def test_a_host_of_another_session_gets_no_proof_from_a_caller(things: ExitStack) -> None:
    door, port = server(things)
    door.setblocking(True)
    heard: list[bytes] = []

    def pose() -> None:
        while True:
            try:
                sock, _ = door.accept()
            except OSError:
                return
            with sock:
                heard.append(sock.recv(4096))
                sock.sendall(Host(secrets.token_hex(16), heard[-1]).answer())
                sock.settimeout(5)
                heard.append(sock.recv(4096))

    threading.Thread(target=pose, daemon=True).start()
    with pytest.raises(CommitError, match="something else answers there"):
        connect(1, [(HERE, port)], TOKEN, time.monotonic() + 0.3)
    assert heard[1] == b"", "it hung up"


def test_no_proof_is_good_for_another_part_rank_token_or_connection() -> None:
    caller, other = Caller(TOKEN, 1), Caller(TOKEN, 1)
    host, stranger = Host(TOKEN, caller.call()), Host(secrets.token_hex(16), caller.call())
    told = caller.prove(host.answer())
    assert told is not None and host.welcome(told) is not None
    assert other.prove(host.answer()) is None, "another nonce"
    assert Caller(TOKEN, 2).prove(host.answer()) is None
    assert caller.prove(stranger.answer()) is None
    again = Host(TOKEN, caller.call())
    assert again.welcome(told) is None, "the same call, later: another nonce of the host's"
    nonce, proved = host.answer().split()
    assert host.welcome(proved + b"\n") is None, "the host's own"
    for wrong in (b"", b"\n", b"x" * 54, caller.call()[:-1], b"\xff" * 54, caller.call().replace(b"layer", b"LAYER")):
        with pytest.raises(ValueError, match="not a call"):
            Host(TOKEN, wrong)
    for wrong in (b"", b"x" * 98, host.answer()[:-1], host.answer().upper(), nonce + b" " + nonce + b"\n"):
        assert caller.prove(wrong) is None


# -- who holds whom up -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_strangers_without_number_and_without_end_do_not_keep_a_rank_out(
    things: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_GUESTS", 8)
    door, port = server(things)
    open_now: list[int] = []
    real = calls.Door.wait

    def wait(self: Any, expected: set[int], deadline: float) -> Any:
        found = real(self, expected, deadline)
        open_now.append(len(self.guests))
        return found

    monkeypatch.setattr(calls.Door, "wait", wait)
    said = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 200, Caller(TOKEN, 7).call(), Caller("other", 1).call(), b"layer"]

    def call(end: int) -> Line:
        if not end:
            return accept([door], {1}, TOKEN, time.monotonic() + 20)[1]
        for number in range(60):
            stranger = things.enter_context(socket.create_connection((HERE, port), timeout=5))
            stranger.sendall(said[number % len(said)])
        return connect(1, [(HERE, port)], TOKEN, time.monotonic() + 20)

    host, caller = in_threads(2, call)
    things.callback(host.close)
    things.callback(caller.close)
    assert max(open_now) <= 8
    assert caller.keys.sending == host.keys.receiving


def test_a_guest_that_proves_nothing_is_sent_away_in_time(things: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "HELLO_S", 0.2)
    door, port = server(things)
    slow = things.enter_context(socket.create_connection((HERE, port), timeout=5))
    slow.sendall(b"lay")
    began = time.monotonic()
    with pytest.raises(CommitError, match="rank\\(s\\) 1 did not connect in time"):
        accept([door], {1}, TOKEN, time.monotonic() + 1.0)
    assert time.monotonic() - began < 15
    try:
        assert slow.recv(1) == b""
    except ConnectionResetError:
        pass


def test_a_process_without_files_left_takes_the_rank_in_once_it_has_one(
    things: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, port = server(things)
    made = threading.Event()
    real = calls.Door.__init__

    def opened(self: Any, *args: Any) -> None:
        real(self, *args)
        made.set()

    monkeypatch.setattr(calls.Door, "__init__", opened)
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    caller = things.enter_context(socket.socket())  # before there are no files
    caller.settimeout(10)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(accept([door], {1}, TOKEN, time.monotonic() + 20)))
    thread.start()
    assert made.wait(10)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        caller.connect((HERE, port))
        clock = time.pthread_getcpuclockid(thread.ident)
        spent = time.clock_gettime(clock)
        time.sleep(0.3)
        assert time.clock_gettime(clock) - spent < 0.1, "it does not spin"
        for file in taken:
            os.close(file)
        taken.clear()
        mine = Caller(TOKEN, 1)
        caller.sendall(mine.call())
        with caller.makefile("rb") as answer:
            told = mine.prove(answer.read(proof.ANSWER_BYTES))
        assert told is not None
        caller.sendall(told)
        thread.join(20)
    finally:
        for file in taken:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(results[0]) == [1]
    things.callback(results[0][1].close)


@pytest.mark.parametrize("sent", [b"x", b""], ids=["a byte now and then", "nothing"])
def test_a_host_that_answers_slowly_does_not_stretch_the_deadline(things: ExitStack, sent: bytes) -> None:
    door, port = server(things)
    door.setblocking(True)

    def drip() -> None:
        while True:
            try:
                sock, _ = door.accept()
                while True:
                    sock.sendall(sent)
                    time.sleep(0.1)
            except OSError:
                return

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(CommitError, match=f"{HERE} port {port}: timed out"):
        connect(1, [(HERE, port)], TOKEN, time.monotonic() + 1.0)
    assert time.monotonic() - began < 8


def test_a_rank_listens_on_the_addresses_that_it_tells_and_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_own_addresses", lambda far: ["127.0.0.2", "203.0.113.1"])
    bound: list[list[str]] = []
    real = rendezvous.listen

    def watched(hosts: list[str], expected: int) -> list[socket.socket]:
        servers = real(hosts, expected)
        bound.append([each.getsockname()[0] for each in servers])
        return servers

    monkeypatch.setattr(rendezvous, "listen", watched)
    gathering = Gathering(3)
    met = in_threads(3, lambda rank: rendezvous.meet(rank, gathering.of(rank), 10.0, where=str(rank // 2)))
    assert bound == [[HERE, "127.0.0.2"]], "not on the one that is not this machine's"
    assert met[1].lines[-1].sock.getpeername()[0] == HERE
    assert met[2].lines[-1].sock.getpeername()[0] == "127.0.0.2"
    for each in met:
        for line in each.lines.values():
            line.close()


def test_a_port_needs_an_address_of_this_machine_and_a_file_for_each_connection(
    things: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="no address to listen on"):
        listen([], 1)
    with pytest.raises(OSError) as raised:
        listen(["203.0.113.1"], 1)
    assert raised.value.errno == errno.EADDRNOTAVAIL
    limits, asked = [8, 64], list[tuple[int, int]]()
    monkeypatch.setattr(calls.resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(calls.resource, "setrlimit", lambda which, both: asked.append(both))
    with pytest.raises(OSError, match=r"132 connections need \d+ open files, and the hard limit \(ulimit -Hn\) is 64"):
        listen([HERE], 4)
    limits[1] = 1 << 20
    server(things)
    ((soft, hard),) = asked
    assert 132 + 64 < soft < 1 << 20 and hard == 1 << 20


def test_a_rank_that_is_not_waited_for_or_not_welcome_is_told_so(things: ExitStack) -> None:
    door, port = server(things)
    taken = threading.Thread(target=lambda: host.append(accept([door], {1}, TOKEN, time.monotonic() + 20)[1]))
    host: list[Line] = []
    taken.start()
    socket.create_connection((HERE, port), timeout=5).close()  # who hangs up at once is no rank
    with pytest.raises(OSError, match="it hung up"):
        calls._call(2, (HERE, port), TOKEN, time.monotonic() + 20)
    things.callback(connect(1, [(HERE, port)], TOKEN, time.monotonic() + 20).close)
    taken.join(20)
    things.callback(host[0].close)

    def refuse() -> None:
        with door.accept()[0] as sock:
            sock.sendall(Host(TOKEN, sock.recv(proof.CALL_BYTES)).answer())
            sock.recv(proof.PROOF_BYTES)
            sock.sendall(b"0" * proof.PROOF_BYTES)

    door.setblocking(True)
    threading.Thread(target=refuse, daemon=True).start()
    with pytest.raises(OSError, match="it rejects this rank"):
        calls._call(1, (HERE, port), TOKEN, time.monotonic() + 20)


# -- what it sends ---------------------------------------------------------------------------------------------------


def framed(seals: Seals, *messages: Any) -> bytes:
    frame = encode(messages)
    return frame + seals.next(frame[4:])


def forged(seals: Seals) -> bytes:
    return framed(Seals(secrets.token_bytes(32)), {"t": "durable"})


def altered(seals: Seals) -> bytes:
    return framed(seals, {"t": "durable", "rank": 1}).replace(b'"rank":1', b'"rank":2')


def repeated(seals: Seals) -> bytes:
    return 2 * framed(seals, {"t": "durable"})


def left_out(seals: Seals) -> bytes:
    framed(seals, {"t": "failed"})
    return framed(seals, {"t": "durable"})


def swapped(seals: Seals) -> bytes:
    first, second = framed(seals, {"t": "one"}), framed(seals, {"t": "two"})
    return second + first


def bare(seals: Seals) -> bytes:
    return 2 * encode([{"t": "durable"}])


FORGERIES: dict[str, tuple[Callable[[Seals], bytes], int]] = {
    "another key": (forged, 0),
    "another rank in the body": (altered, 0),
    "the same again": (repeated, 1),
    "the one before was left out": (left_out, 0),
    "in another order": (swapped, 0),
    "without a proof": (bare, 0),
}


def heard(things: ExitStack, forgery: Callable[[Seals], bytes]) -> tuple[list[Any], list[str]]:
    """What a host takes of it, and why it ended."""
    host, caller = pair(things)
    taken: list[Any] = []
    ended: list[str] = []
    done = threading.Event()

    def on_end(key: int, why: str) -> None:
        ended.append(why)
        done.set()

    links = Links({1: host})
    links.start(lambda key, body: taken.extend(decode(body)), on_end, lambda why: None)
    assert caller.keys is not None
    seals = Seals(caller.keys.sending)
    caller.sock.sendall(framed(seals, {"t": "hello"}) + forgery(seals))
    caller.sock.shutdown(socket.SHUT_WR)
    assert done.wait(10)
    links.close(1.0)
    assert taken[0] == {"t": "hello"}
    return taken[1:], ended


@pytest.mark.parametrize(("forgery", "right"), FORGERIES.values(), ids=FORGERIES.keys())
def test_what_the_other_rank_did_not_send_next_is_not_taken_and_ends_the_connection(
    things: ExitStack, forgery: Callable[[Seals], bytes], right: int
) -> None:
    taken, ended = heard(things, forgery)
    assert len(taken) == right and "MAC" in ended[0], (taken, ended)


def test_mutation_frames_whose_number_is_not_in_their_proof_are_found(
    things: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Seals.next

    def unnumbered(self: Any, body: Any) -> bytes:
        self._number = 0
        return real(self, body)

    monkeypatch.setattr(Seals, "next", unnumbered)
    with pytest.raises(AssertionError):
        test_what_the_other_rank_did_not_send_next_is_not_taken_and_ends_the_connection(things, repeated, 1)


def test_mutation_proofs_that_nobody_compares_are_found(things: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise_dist.commit.transports.frames.hmac.compare_digest", lambda one, other: True)
    with pytest.raises(AssertionError):
        test_what_the_other_rank_did_not_send_next_is_not_taken_and_ends_the_connection(things, altered, 0)


def test_messages_of_any_size_arrive_between_ends_that_know_each_other(things: ExitStack) -> None:
    host, caller = pair(things)
    taken: list[Any] = []
    enough = threading.Event()
    messages = [{"t": "any", "n": number, "text": "x" * (number**3 % 50_000)} for number in range(200)]

    def take(key: int, body: bytes) -> None:
        taken.extend(decode(body))
        if len(taken) == len(messages):
            enough.set()

    there, here = Links({1: caller}), Links({1: host})
    here.start(take, lambda key, why: None, lambda why: None)
    there.start(lambda key, body: None, lambda key, why: None, lambda why: None)
    for message in messages:
        there.call(lambda message=message: there.send(1, encode([message])))
    assert enough.wait(20) and taken == messages
    assert there.bytes_out == sum(len(encode([each])) + MAC_BYTES for each in messages)
    for links in (there, here):
        threading.Thread(target=links.close, args=(2.0,)).start()
    assert json.dumps(taken[0]) == json.dumps(messages[0])
