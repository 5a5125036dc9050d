# SPDX-License-Identifier: Apache-2.0
"""What every transport promises: once, in order, or an error; and nothing that waits for ever."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch.distributed as dist
from kit.threads import Gathering, in_threads

from layerwise_dist.commit.transports import Transport, rendezvous
from layerwise_dist.commit.transports.frames import decode, encode, take_frames
from layerwise_dist.commit.transports.links import Links
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.commit.transports.proof import Line
from layerwise_dist.commit.transports.relay import ABOVE, RelayTransport
from layerwise_dist.commit.transports.rendezvous import Met, meet, meet_each
from layerwise_dist.errors import CommitError

pytestmark = pytest.mark.quick


def all_meet(nodes: list[int], timeout_s: float = 20.0) -> list[Met]:
    """`nodes` says on which pretended node each rank is."""
    gathering = Gathering(len(nodes))
    met = in_threads(len(nodes), lambda rank: meet(rank, gathering.of(rank), timeout_s, where=str(nodes[rank])))
    assert all(isinstance(each, Met) for each in met), met
    return met


class Ears:
    """What one rank hears."""

    def __init__(self, transport: Transport, links: Links | None = None, lines: Iterable[Line] = ()) -> None:
        """`links` and `lines` are what a transport over TCP works with."""
        self.transport, self.links, self.lines = transport, links, list(lines)
        self.heard: list[Any] = []
        self.coordinator: list[Any] = []
        self.errors: list[str] = []
        self.changed = threading.Condition()
        transport.start(
            self._into(self.heard),
            self._into(self.coordinator) if transport.rank == 0 else None,
            self._into(self.errors),
        )

    def _into(self, place: list[Any]) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            with self.changed:
                place.append(message)
                self.changed.notify_all()

        return take

    def wait(self, what: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(what, 20), (self.heard[-3:], self.coordinator[-3:], self.errors)


NODES = {"one node": [0, 0, 0], "each its own": [0, 1, 2], "two nodes": [0, 0, 1, 1, 1], "mixed up": [0, 1, 0, 2, 1, 2]}


def stores(nodes: list[int]) -> list[Ears]:
    ranks = []
    for rank, met in enumerate(all_meet(nodes)):
        links = Links(met.lines)
        transport = RelayTransport(rank, len(nodes), links, met.serves, met.above)
        ranks.append(Ears(transport, links, met.lines.values()))
    return ranks


def locals_(nodes: list[int]) -> list[Ears]:
    hub = LocalHub(len(nodes))
    return [Ears(LocalTransport(hub, rank)) for rank in range(len(nodes))]


def leave(ranks: list[Ears]) -> None:
    """As participants do: rank 0 stays until all have said that they closed."""
    for ears in ranks:
        ears.transport.post({"t": "closed", "rank": ears.transport.rank})
    root = ranks[0]
    closers = [threading.Thread(target=ears.transport.close, args=(10.0,)) for ears in ranks[1:]]
    for closer in closers:
        closer.start()
    root.wait(lambda: sum(message["t"] == "closed" for message in root.coordinator) == len(ranks))
    root.transport.close(10.0)
    for closer in closers:
        closer.join(15)
        assert not closer.is_alive()


@pytest.mark.parametrize("make", [stores, locals_], ids=["store", "local"])
@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES.keys())
def test_what_is_posted_and_announced_arrives_once_and_in_order(
    make: Callable[[list[int]], list[Ears]], nodes: list[int]
) -> None:
    threads, began = threading.active_count(), time.monotonic()
    ranks, count = make(nodes), 300

    def post(ears: Ears) -> None:
        for number in range(count):
            ears.transport.post(
                {"t": "post", "rank": ears.transport.rank, "n": number, "text": "x" * (number % 50) ** 2}
            )

    def announce() -> None:
        for number in range(count):
            ranks[0].transport.announce({"t": "said", "n": number, "text": "y" * (number % 40) ** 2})

    senders = [threading.Thread(target=post, args=(ears,)) for ears in ranks] + [threading.Thread(target=announce)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(20)
    ranks[0].wait(lambda: len(ranks[0].coordinator) >= count * len(nodes))
    for rank, ears in enumerate(ranks):
        assert [m["n"] for m in ranks[0].coordinator if m["rank"] == rank] == list(range(count))
        ears.wait(lambda ears=ears: len(ears.heard) >= count)
        assert [m["n"] for m in ears.heard] == list(range(count))
    leave(ranks)
    assert not any(ears.errors for ears in ranks)
    assert not [m for m in ranks[0].coordinator if m["t"] == "gone"]
    assert threading.active_count() == threads
    assert time.monotonic() - began < 15


def test_a_rank_that_ends_without_a_word_is_told_to_the_coordinator_with_those_that_speak_through_it() -> None:
    ranks = stores([0, 0, 1, 1, 1])

    def gone() -> list[int]:
        return sorted(message["rank"] for message in ranks[0].coordinator if message["t"] == "gone")

    ranks[3].transport.close(0.1)  # no word before it
    ranks[0].wait(lambda: gone() == [3])
    ranks[0].transport.announce({"t": "said"})
    ranks[4].wait(lambda: len(ranks[4].heard) == 1)
    for line in ranks[2].lines:  # the node's lowest rank dies
        if line.sock.fileno() >= 0:
            line.sock.shutdown(socket.SHUT_RDWR)
    ranks[0].wait(lambda: gone() == [2, 3, 4])
    ranks[4].wait(lambda: len(ranks[4].errors) == 1)
    assert "rank 2, through which this node speaks to rank 0, is gone" in ranks[4].errors[0]
    ranks[1].transport.post({"t": "post", "rank": 1})
    ranks[0].wait(lambda: ranks[0].coordinator[-1] == {"t": "post", "rank": 1})
    ranks[0].transport.close(0.1)
    ranks[1].wait(lambda: len(ranks[1].errors) == 1)
    for ears in ranks:
        ears.transport.close(0.2)


def test_a_stranger_on_the_port_is_sent_away_and_everybody_still_meets() -> None:
    ports: list[int] = []
    gathering = Gathering(2)
    strangers: list[socket.socket] = []

    def rank(number: int) -> Met:
        real = gathering.of(number)

        def gather(record: dict[str, Any]) -> list[dict[str, Any]]:
            found = real(record)
            if "ports" in found[0] and number == 1:
                ports.append(found[0]["ports"][0][1])
                for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"0" * 32 + b" 00000001\n", b"\xff" * 42):
                    strangers.append(socket.create_connection(("127.0.0.1", ports[0]), timeout=5))
                    strangers[-1].sendall(said)
            return found

        return meet(number, gather, 10.0, where="here")

    first, second = in_threads(2, rank)
    assert list(first.lines) == [1] and list(second.lines) == [ABOVE]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", ports[0]), timeout=5)  # nobody listens any more
    for sock in [*strangers, *first.lines.values(), *second.lines.values()]:
        sock.close()


@pytest.mark.slow
@pytest.mark.parametrize("missing", [1, 2], ids=["the rank itself", "another"])
def test_a_rank_that_cannot_connect_is_an_error_on_all_ranks_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    real = rendezvous.connect

    def connect(rank: int, addresses: list[tuple[str, int]], token: str, deadline: float) -> Line:
        return real(rank, [("127.0.0.1", 1)] if rank == missing else addresses, token, deadline)

    monkeypatch.setattr(rendezvous, "connect", connect)
    gathering = Gathering(3)
    began = time.monotonic()
    results = in_threads(3, lambda rank: meet(rank, gathering.of(rank), 1.0, where="here"))
    assert all(isinstance(error, CommitError) for error in results)
    assert len({str(error) for error in results}) == 1
    assert f"rank(s) {missing} did not connect" in str(results[0])
    assert 0.9 < time.monotonic() - began < 15


@pytest.mark.parametrize("meeting", [meet, meet_each])
def test_a_port_that_cannot_be_opened_is_an_error_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, meeting: Callable[..., Any]
) -> None:
    def refuse(hosts: list[str], expected: int) -> list[socket.socket]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(rendezvous, "listen", refuse)
    gathering = Gathering(2)
    results = in_threads(2, lambda rank: meeting(rank, gathering.of(rank), 1.0, where="here"))
    assert ["rank 0 could not open a port" in str(error) for error in results] == [True, True]


def test_a_rank_that_one_other_cannot_reach_is_an_error_on_all_and_ends_what_was_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where each two ranks are connected: the last one reaches rank 0, and not rank 1."""
    real = rendezvous.connect
    met: list[Line] = []

    def connect(rank: int, addresses: list[tuple[str, int]], token: str, deadline: float) -> Line:
        if rank == 2 and met:
            raise CommitError("cannot reach the rank that takes its messages")
        line = real(rank, addresses, token, deadline)
        met.extend([line] * (rank == 2))
        return line

    monkeypatch.setattr(rendezvous, "connect", connect)
    gathering = Gathering(3)
    results = in_threads(3, lambda rank: meet_each(rank, gathering.of(rank), 0.3, where="here"))
    assert {type(each) for each in results} == {CommitError} and len(set(map(str, results))) == 1
    assert str(results[0]) == "rank 1: rank(s) 2 did not connect in time"
    assert met[0].sock.fileno() < 0


def test_only_addresses_of_this_machine_that_others_may_reach_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"here": ["203.0.113.9", "127.0.0.1"], rendezvous._ANYWHERE: ["127.0.0.1"]}

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        if host not in names:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (address, port)) for address in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for master in ("here", "gone"):
        monkeypatch.setenv("MASTER_ADDR", master)
        assert rendezvous._own_addresses(["gone"]) == []
    assert rendezvous._addresses_of("here") == names["here"] and rendezvous._toward("gone") == []
    monkeypatch.setattr(rendezvous, "_is_own", lambda host: True)
    assert rendezvous._own_addresses(["gone"]) == ["127.0.0.1"]


def test_where_the_kernel_does_not_tell_machines_apart_their_names_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str, **_: Any) -> Any:
        raise FileNotFoundError(path)

    assert rendezvous.place() == rendezvous.place()
    monkeypatch.setattr(rendezvous, "open", missing, raising=False)
    places = []
    for name in ("one", "one", "other"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        places.append(rendezvous.place())
    assert places[0] == places[1] != places[2]


def test_a_record_that_is_too_long_for_a_gather_is_refused_before_anything_is_sent() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        gather = rendezvous.over_default_group(32)
        assert gather({"rank": 0}) == [{"rank": 0}]
        with pytest.raises(ValueError, match="a record of 42 bytes"):
            gather({"rank": "0" * 30})
    finally:
        dist.destroy_process_group()


def test_frames_are_found_however_the_bytes_arrive() -> None:
    messages = [[{"t": "x", "text": "é" * n}] for n in (0, 1, 1000)] + [[{"n": n} for n in range(50)], []]
    stream = b"".join(map(encode, messages))
    for size in (1, 3, 7, 1000, len(stream)):
        bodies: list[bytes] = []
        received = bytearray()
        for begin in range(0, len(stream), size):
            received += stream[begin : begin + size]
            bodies += take_frames(received)
        assert [encode([])[4:] if not body else body for body in bodies] == [encode(each)[4:] for each in messages]


@pytest.mark.slow
@pytest.mark.parametrize("which", range(5))
def test_a_thread_that_serves_connections_and_breaks_is_named_to_all_ranks(which: int) -> None:
    ranks = stores(NODES["two nodes"])

    def boom() -> None:
        raise RuntimeError("of nobody's")

    links = ranks[which].links
    assert links is not None
    links.call(boom)
    named = f"rank {which}: thread layerwise-messages: RuntimeError: of nobody's"
    alone = named.removeprefix(f"rank {which}: ")  # as the rank itself says it
    ranks[which].wait(lambda: any(text == alone for text in ranks[which].errors))
    if which:
        # Rank 0 hears of all that spoke through the thread, and announces why.
        through = [ears for ears in ranks[1:] if which == 2 and ears.transport.rank > 2]
        gone = {which, *(ears.transport.rank for ears in through)}
        ranks[0].wait(lambda: {m["rank"] for m in ranks[0].coordinator if m["t"] == "gone"} == gone)
        assert all(m["why"].endswith(named) for m in ranks[0].coordinator if m["t"] == "gone")
    else:
        through = ranks[1:]
    for ears in through:
        ears.wait(lambda ears=ears: bool(ears.errors))
        assert ears.errors[0].endswith(named), ears.errors
    for ears in ranks:
        ears.transport.post({"t": "closed", "rank": ears.transport.rank})
    for ears in reversed(ranks):
        ears.transport.close(1.0)


@pytest.mark.parametrize(
    "sent",
    [b"\xff\xff\xff\xff", b"\0\0\0\x03abc", b"\0\0\0\x02{}", b"\0\0\0\x04[{}]"],
    ids=["too long", "no JSON", "no array", "no kind"],
)
def test_what_is_no_message_ends_the_connection(sent: bytes) -> None:
    left, right = socket.socketpair()
    ended: list[str] = []
    done = threading.Event()

    def on_end(key: int, why: str) -> None:
        ended.append(why)
        done.set()

    links = Links({1: Line(left)})
    links.start(lambda key, body: decode(body) and None, on_end, ended.append)
    right.sendall(sent)
    assert done.wait(10) and "not a message" in ended[0]
    links.close(1.0)
    right.close()


def test_a_peer_that_reads_nothing_neither_blocks_nor_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise_dist.commit.transports.links._MOST_UNSENT", 1 << 20)
    deaf, there = socket.socketpair()
    ended = threading.Event()
    links = Links({1: Line(there)})
    links.start(lambda key, body: None, lambda key, why: ended.set(), lambda why: None)
    frame = encode([{"text": "x" * 100_000}])
    began = time.monotonic()
    for _ in range(100):
        links.call(lambda: links.send(1, frame))
    assert ended.wait(10) and time.monotonic() - began < 5
    links.close(1.0)
    deaf.close()
