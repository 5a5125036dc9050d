# SPDX-License-Identifier: Apache-2.0
"""Calls between ranks at the start of a session: one listens, others connect, both prove who they are (`proof.py`).

Strangers may call too, and answer in a rank's place. They are sent away; they neither hold up those who belong here nor
fill the process with their connections.
"""

from __future__ import annotations

import errno
import os
import resource
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from layerwise_dist.commit.transports.proof import ANSWER_BYTES, CALL_BYTES, PROOF_BYTES, Caller, Host, Line
from layerwise_dist.errors import CommitError, named

HELLO_S = 10.0  # from a connection to the last word of its proof
_GUESTS = 128  # that have proved nothing yet; for one more the oldest goes
_BREATH_S = 0.05  # without files for another guest

Address = tuple[str, int]


def listen(hosts: Sequence[str], expected: int) -> list[socket.socket]:
    """One server on each of these addresses that is this machine's. Raises OSError if none is."""
    _allow_files(expected + _GUESTS)
    servers: list[socket.socket] = []
    failure: OSError | None = None
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            server = socket.create_server((host, 0), family=family, backlog=max(expected, _GUESTS))
        except OSError as error:
            failure = error
            continue
        server.setblocking(False)
        servers.append(server)
    if not servers:
        raise failure or OSError(errno.EADDRNOTAVAIL, "no address to listen on")
    return servers


def _allow_files(connections: int) -> None:
    """Raises the soft limit of open files where it must be. Raises OSError where the hard one is too low for that."""
    needed = len(os.listdir("/proc/self/fd")) + connections + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise OSError(
                errno.EMFILE,
                f"{connections} connections need {needed} open files, and the hard limit (ulimit -Hn) is {hard}",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def connect(rank: int, addresses: Sequence[Address], token: str, deadline: float) -> Line:
    """Tries the addresses in turn until one proves to be of this session. Raises CommitError at the deadline."""
    failures: dict[Address, str] = {}
    pause = 0.05
    while True:
        for address in addresses:
            left = deadline - time.monotonic()
            if left <= 0:
                tried = "; ".join(f"{host} port {port}: {why}" for (host, port), why in failures.items())
                raise CommitError(f"cannot reach the rank that takes its messages ({tried or 'no time was left'})")
            try:
                return _call(rank, address, token, time.monotonic() + min(left, HELLO_S))
            except OSError as error:
                failures[address] = error.strerror or str(error)
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(1.0, 2 * pause)


def _call(rank: int, address: Address, token: str, deadline: float) -> Line:
    """Raises OSError: nobody answers, not in time, or not as one of this session."""
    sock = socket.create_connection(address, timeout=max(0.001, deadline - time.monotonic()))
    try:
        caller = Caller(token, rank)
        sock.sendall(caller.call())
        proof = caller.prove(_exactly(sock, ANSWER_BYTES, deadline))
        if proof is None:
            raise OSError("something else answers there")
        sock.sendall(proof)
        if not caller.is_welcome(_exactly(sock, PROOF_BYTES, deadline)):
            raise OSError("it rejects this rank")
        return Line(sock, caller.keys())
    except BaseException:
        sock.close()
        raise


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """So many bytes, not one more: what follows is frames. The deadline is that of all of them."""
    found = b""
    while len(found) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        data = sock.recv(count - len(found))
        if not data:
            raise OSError("it hung up")
        found += data
    return found


@dataclass
class _Guest:
    """A connection that has proved nothing yet. `host`: it has called as a rank."""

    sock: socket.socket
    until: float
    said: bytearray = field(default_factory=bytearray)
    host: Host | None = None

    def hear(self, token: str, expected: set[int]) -> Line | None:
        """Takes what has arrived. A line, once it has proved that it is one of the ranks expected; None: not yet.

        Raises OSError or ValueError for whoever is not.
        """
        wanted = CALL_BYTES if self.host is None else PROOF_BYTES
        try:
            data = self.sock.recv(wanted - len(self.said))
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionError("it hung up")
        self.said += data
        if len(self.said) < wanted:
            return None
        said, self.said = bytes(self.said), bytearray()
        if self.host is None:
            self.host = Host(token, said)
            self._say(self.host.answer())
            return None
        welcome = self.host.welcome(said)
        if welcome is None or self.host.rank not in expected:
            raise ValueError("not an expected rank")
        self._say(welcome)
        return Line(self.sock, self.host.keys())

    def _say(self, text: bytes) -> None:
        if self.sock.send(text) < len(text):  # a few bytes into an empty buffer
            raise ConnectionError("it reads nothing")


class Door:
    """Servers and guests, while ranks are waited for.

    Attributes:
        guests: callers that have not proved that they are of this session, the oldest first.
    """

    def __init__(self, servers: Sequence[socket.socket], token: str) -> None:
        self._servers, self._token = servers, token
        self.guests: dict[socket.socket, _Guest] = {}
        self._selector = selectors.DefaultSelector()
        self._closed_until = 0.0
        for server in servers:
            self._selector.register(server, selectors.EVENT_READ)

    def close(self) -> None:
        for sock in list(self.guests):
            self._show_out(sock)
        self._selector.close()

    def wait(self, expected: set[int], deadline: float) -> dict[int, Line]:
        """Whoever of the expected ranks has come by then, or before."""
        found: dict[int, Line] = {}
        now = time.monotonic()
        times = [deadline, *(guest.until for guest in list(self.guests.values())[:1])]
        if self._closed_until:
            times.append(self._closed_until)
        for key, _ in self._selector.select(max(0.0, min(times) - now)):
            if key.fileobj in self._servers:
                self._let_in(key.fileobj)  # type: ignore[arg-type]
            elif (guest := self.guests.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                try:
                    line = guest.hear(self._token, expected - set(found))
                except (OSError, ValueError):
                    self._show_out(guest.sock)
                    continue
                if line is not None and guest.host is not None:
                    del self.guests[guest.sock]
                    self._selector.unregister(guest.sock)
                    found[guest.host.rank] = line
        self._tidy()
        return found

    def _let_in(self, server: socket.socket) -> None:
        try:
            sock, _ = server.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._take_breath()
            return
        if len(self.guests) >= _GUESTS:
            self._show_out(next(iter(self.guests)))
        sock.setblocking(False)
        self.guests[sock] = _Guest(sock, time.monotonic() + HELLO_S)
        self._selector.register(sock, selectors.EVENT_READ)

    def _take_breath(self) -> None:
        """The process has no files left: a guest is sent away, if there is one, and who calls waits for a moment."""
        if self.guests:
            self._show_out(next(iter(self.guests)))
        if not self._closed_until:
            self._closed_until = time.monotonic() + _BREATH_S
            for server in self._servers:
                self._selector.unregister(server)

    def _tidy(self) -> None:
        now = time.monotonic()
        for guest in [guest for guest in self.guests.values() if guest.until <= now]:
            self._show_out(guest.sock)
        if self._closed_until and self._closed_until <= now:
            self._closed_until = 0.0
            for server in self._servers:
                self._selector.register(server, selectors.EVENT_READ)

    def _show_out(self, sock: socket.socket) -> None:
        del self.guests[sock]
        self._selector.unregister(sock)
        sock.close()


def accept(servers: Sequence[socket.socket], expected: set[int], token: str, deadline: float) -> dict[int, Line]:
    """Waits for every expected rank. Raises CommitError at the deadline."""
    met: dict[int, Line] = {}
    door = Door(servers, token)
    try:
        while missing := expected - set(met):
            if time.monotonic() >= deadline:
                raise CommitError(f"rank(s) {named(sorted(missing), 8)} did not connect in time")
            met |= door.wait(missing, deadline)
    except BaseException:
        for line in met.values():
            line.close()
        raise
    finally:
        door.close()
    return met
