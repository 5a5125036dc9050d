"""How ranks find each other at the start of a session, and connect.

The only use of the job's process groups: three gathers over the default group, on the training thread inside
`attach()`. What is gathered cannot be left over from an earlier incarnation of the job, as a key in a launcher's store
can, and every connection begins with a token that rank 0 made for this session.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import resource
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layerwise_dist.commit.transports.relay import ABOVE
from layerwise_dist.errors import CommitError

_RECORD = 1024  # bytes of one rank's record in a gather
_HELLO_S = 10.0

Gather = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Collective: every rank's record, a JSON object of at most 1024 bytes, by rank."""


@dataclass
class Met:
    """One rank's connections. `sockets` by the lower rank at the other end, or ABOVE; `serves` says which ranks speak
    through each of the former; `above` names the other end of the latter.
    """

    sockets: dict[int, socket.socket] = field(default_factory=dict)
    serves: dict[int, list[int]] = field(default_factory=dict)
    above: str = ""


def meet(rank: int, gather: Gather, timeout_s: float, *, where: str | None = None) -> Met:
    """Collective. `where` is the same on ranks that reach each other by the loopback device, by default `place()`.

    Raises CommitError on all ranks, naming the one on which something failed.
    """
    places = [record["place"] for record in gather({"place": where or place()})]
    lowest: dict[str, int] = {}
    for other, where in enumerate(places):
        lowest.setdefault(where, other)
    leads = [lowest[where] for where in places]
    met = Met(serves=_serves(rank, leads))
    server: socket.socket | None = None
    record: dict[str, Any] = {}
    try:
        try:
            if met.serves:
                server = listen(len(met.serves), local=rank != 0 or len(lowest) == 1)
                record["port"] = server.getsockname()[1]
            if rank == 0:
                record |= {"token": secrets.token_hex(16), "hosts": _addresses(len(lowest) == 1)}
        except OSError as error:
            record = {"error": f"rank {rank} could not open a port for checkpoint messages: {error}"[:400]}
        records = _all_well(gather(record))
        problem = {}
        try:
            _connect_all(met, rank, leads, records, server, time.monotonic() + timeout_s)
        except (OSError, CommitError) as error:
            problem = {"error": f"rank {rank}: {error}"[:400]}
        _all_well(gather(problem))
    except BaseException:
        for sock in met.sockets.values():
            sock.close()
        raise
    finally:
        if server is not None:
            server.close()
    return met


def _connect_all(
    met: Met, rank: int, leads: list[int], records: list[dict[str, Any]], server: socket.socket | None, deadline: float
) -> None:
    root = records[0]
    if server is not None:
        met.sockets |= accept(server, set(met.serves), root["token"], deadline)
    if rank == 0:
        return
    lead = leads[rank]
    above = 0 if lead == rank else lead
    met.above = f"rank {above}" + ("" if above == 0 else ", through which this node speaks to rank 0,")
    hosts = root["hosts"] if lead == rank else ["127.0.0.1"]
    met.sockets[ABOVE] = connect(rank, hosts, records[above]["port"], root["token"], deadline)


def place() -> str:
    """The same for two processes exactly if they reach each other by the loopback device."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            where = f"{file.read().strip()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        where = socket.gethostname()  # no such files in this sandbox
    return hashlib.sha256(where.encode()).hexdigest()[:32]


def _serves(rank: int, leads: list[int]) -> dict[int, list[int]]:
    """Which ranks connect to this one, and for whom each of them speaks."""
    if leads[rank] != rank:
        return {}
    found = {other: [other] for other, lead in enumerate(leads) if lead == rank and other != rank}
    if rank == 0:
        for other, lead in enumerate(leads):
            if lead != 0:
                found.setdefault(lead, []).append(other)
    return found


def _all_well(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for record in records:
        if "error" in record:
            raise CommitError(record["error"])
    return records


def listen(expected: int, *, local: bool) -> socket.socket:
    _allow_files(expected)
    if local:
        return socket.create_server(("127.0.0.1", 0), backlog=expected)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=max(expected, 128)
            )
        except OSError:
            pass  # compiled in, and switched off
    return socket.create_server(("0.0.0.0", 0), backlog=max(expected, 128))


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


def _addresses(one_node: bool) -> list[str]:
    """Under which names other nodes may reach this one, best first."""
    if one_node:
        return ["127.0.0.1"]
    found = []
    if master := os.environ.get("MASTER_ADDR"):
        found.append(master)
        found += _toward(master)
    found += [socket.gethostname(), *_toward("192.0.2.1")]
    return list(dict.fromkeys(name for name in found if not name.startswith("127.")))[:6]


def _toward(host: str) -> list[str]:
    """The address of this machine on the way to another one; nothing is sent."""
    found = []
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                found.append(probe.getsockname()[0])
    except OSError:
        pass  # no such host, or no way there
    return found


def connect(rank: int, hosts: list[str], port: int, token: str, deadline: float) -> socket.socket:
    """Tries the addresses in turn until one answers with the token. Raises CommitError at the deadline."""
    failures: dict[str, str] = {}
    pause = 0.05
    while True:
        for host in hosts:
            left = deadline - time.monotonic()
            if left <= 0:
                tried = "; ".join(f"{host}: {why}" for host, why in failures.items()) or "no time was left"
                raise CommitError(f"no way to port {port} of the rank that takes its messages ({tried})")
            try:
                sock = socket.create_connection((host, port), timeout=min(left, _HELLO_S))
            except OSError as error:
                failures[host] = str(error)
                continue
            try:
                sock.sendall(f"{token} {rank:08d}\n".encode())
                if _line(sock) == f"{token} ok":
                    return sock
                failures[host] = "something else answers there"
            except OSError as error:
                failures[host] = str(error)
            sock.close()
        time.sleep(pause)
        pause = min(1.0, 2 * pause)


def _line(sock: socket.socket) -> str:
    """Up to a line's end; byte by byte, since what follows is not ours."""
    found = b""
    while not found.endswith(b"\n") and len(found) < 128:
        byte = sock.recv(1)
        if not byte:
            break
        found += byte
    return found.decode(errors="replace").strip()


def accept(server: socket.socket, expected: set[int], token: str, deadline: float) -> dict[int, socket.socket]:
    """Waits for every expected rank; what does not say the token is sent away. Raises CommitError at the deadline."""
    met: dict[int, socket.socket] = {}
    hello = len(f"{token} {0:08d}\n")
    server.setblocking(False)
    guests: dict[socket.socket, bytearray] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        try:
            while len(met) < len(expected):
                left = deadline - time.monotonic()
                if left <= 0:
                    missing = sorted(expected - set(met))
                    raise CommitError(f"rank(s) {_listed(missing)} did not connect in time")
                for key, _ in selector.select(left):
                    sock: Any = key.fileobj
                    if sock is server:
                        try:
                            guest, _ = server.accept()
                        except OSError:
                            continue
                        guest.setblocking(False)
                        guests[guest] = bytearray()
                        selector.register(guest, selectors.EVENT_READ)
                        continue
                    rank = _greet(sock, guests[sock], hello, token, expected - set(met))
                    if rank is not None:
                        selector.unregister(sock)
                        del guests[sock]
                        if rank >= 0:
                            met[rank] = sock
        except BaseException:
            for sock in met.values():
                sock.close()
            raise
        finally:
            for sock in guests:
                sock.close()
    return met


def _greet(sock: socket.socket, said: bytearray, hello: int, token: str, expected: set[int]) -> int | None:
    """The rank that says the token; None: not yet; ABOVE: nobody we wait for, and the connection is closed."""
    try:
        data = sock.recv(hello - len(said))
        said += data
        if data and len(said) < hello:
            return None
        given, _, name = said.decode(errors="replace").strip().partition(" ")
        if hmac.compare_digest(given.encode(), token.encode()) and name.isdigit() and int(name) in expected:
            sock.sendall(f"{token} ok\n".encode())
            return int(name)
    except BlockingIOError:
        return None
    except OSError:
        pass
    sock.close()
    return ABOVE


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def over_default_group(record_bytes: int = _RECORD) -> Gather:
    """The gather over torch.distributed's default group; records are padded to one size, `record_bytes`.

    It raises ValueError for a longer one.
    """
    import torch
    import torch.distributed as dist

    on_cuda = "nccl" in dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def gather(record: dict[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(record).encode()
        if len(text) > record_bytes:
            raise ValueError(f"a record of {len(text)} bytes")
        mine = torch.frombuffer(bytearray(text.ljust(record_bytes)), dtype=torch.uint8).to(device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        return [json.loads(bytes(each.cpu().numpy())) for each in every]

    return gather
