# SPDX-License-Identifier: Apache-2.0
"""Connects the ranks at the start of a session.

Three gathers over the default group (`meet`), on the training thread inside `attach()`; the only other use of the job's
process groups is the gather before them, which finds out whether all ranks will meet (engine/same_config.py). Ranks
that have met gather over the session's own messages from then on (`meet_each`). What is gathered cannot be left over
from an earlier incarnation of the job, as a key in a launcher's store can: the addresses and ports, and a token that
rank 0 made, by which the two ends of a connection know each other (`calls.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layerwise_dist.commit.transports.calls import Address, accept, connect, listen
from layerwise_dist.commit.transports.proof import Line
from layerwise_dist.commit.transports.relay import ABOVE
from layerwise_dist.errors import CommitError

RECORD_BYTES = 1024  # bytes of one rank's record in a gather
_MOST_ADDRESSES = 6
_LOOPBACK = "127.0.0.1"
_ANYWHERE = "192.0.2.1"  # reserved for documentation: the way there is that of the default route

Gather = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Collective: every rank's record, a JSON object of at most 1024 bytes, by rank."""


@dataclass
class Met:
    """One rank's connections. `lines` by the lower rank at the other end, or ABOVE; `serves` says which ranks speak
    through each of the former; `above` names the other end of the latter.
    """

    lines: dict[int, Line] = field(default_factory=dict)
    serves: dict[int, list[int]] = field(default_factory=dict)
    above: str = ""


def meet(rank: int, gather: Gather, timeout_s: float, *, where: str | None = None) -> Met:
    """Collective. `where` is the same on ranks that reach each other by the loopback device, by default `place()`.

    Raises CommitError on all ranks, naming the one on which something failed.
    """
    first = gather({"place": where or place(), "from": _toward(os.environ.get("MASTER_ADDR", _ANYWHERE))[:2]})
    lowest: dict[str, int] = {}
    for other, record in enumerate(first):
        lowest.setdefault(record["place"], other)
    leads = [lowest[record["place"]] for record in first]
    met = Met(serves=_serves(rank, leads))
    servers: list[socket.socket] = []
    said: dict[str, Any] = {}
    try:
        try:
            if met.serves:
                far = [host for lead in lowest.values() if lead for host in first[lead].get("from", [])]
                hosts = _own_addresses(far) if rank == 0 and len(lowest) > 1 else []
                servers = listen([_LOOPBACK, *hosts], len(met.serves))
                said["ports"] = [server.getsockname()[:2] for server in servers]
            if rank == 0:
                said["token"] = secrets.token_hex(16)
        except OSError as error:
            said = {"error": f"rank {rank} could not open a port for checkpoint messages: {error}"[:400]}
        records = _all_well(gather(said))
        problem = {}
        try:
            _connect_all(met, rank, leads, records, servers, time.monotonic() + timeout_s)
        except (OSError, CommitError) as error:
            problem = {"error": f"rank {rank}: {error}"[:400]}
        _all_well(gather(problem))
    except BaseException:
        for line in met.lines.values():
            line.close()
        raise
    finally:
        for server in servers:
            server.close()
    return met


def meet_each(rank: int, gather: Gather, timeout_s: float, *, where: str | None = None) -> dict[int, Line]:
    """Collective: one connection to each other rank, by its rank. Each rank calls those below it.

    Raises as `meet`.
    """
    first = gather({"place": where or place(), "from": _toward(os.environ.get("MASTER_ADDR", _ANYWHERE))[:2]})
    lines: dict[int, Line] = {}
    servers: list[socket.socket] = []
    said: dict[str, Any] = {}
    try:
        try:
            if rank + 1 < len(first):
                far = [host for record in first if record["place"] != first[rank]["place"] for host in record["from"]]
                hosts = _own_addresses(list(dict.fromkeys(far))) if far else []
                servers = listen([_LOOPBACK, *hosts], len(first) - 1 - rank)
                said["ports"] = [server.getsockname()[:2] for server in servers]
            if rank == 0:
                said["token"] = secrets.token_hex(16)
        except OSError as error:
            said = {"error": f"rank {rank} could not open a port for the other ranks: {error}"[:400]}
        records = _all_well(gather(said))
        problem = {}
        try:
            deadline, token = time.monotonic() + timeout_s, records[0]["token"]
            for other in range(rank):
                near = first[other]["place"] == first[rank]["place"]
                ports: list[Address] = [(host, port) for host, port in records[other]["ports"]]
                found = [address for address in ports if (address[0] == _LOOPBACK) == near]
                lines[other] = connect(rank, found or ports, token, deadline)
            if servers:
                lines |= accept(servers, set(range(rank + 1, len(first))), token, deadline)
        except (OSError, CommitError) as error:
            problem = {"error": f"rank {rank}: {error}"[:400]}
        _all_well(gather(problem))
    except BaseException:
        for line in lines.values():
            line.close()
        raise
    finally:
        for server in servers:
            server.close()
    return lines


def _connect_all(
    met: Met, rank: int, leads: list[int], records: list[dict[str, Any]], servers: list[socket.socket], deadline: float
) -> None:
    token = records[0]["token"]
    if servers:
        met.lines |= accept(servers, set(met.serves), token, deadline)
    if rank == 0:
        return
    lead = leads[rank]
    above = 0 if lead == rank else lead
    met.above = f"rank {above}" + ("" if above == 0 else ", through which this node speaks to rank 0,")
    ports: list[Address] = [(host, port) for host, port in records[above]["ports"]]
    near = [address for address in ports if address[0] == _LOOPBACK]
    far = [address for address in ports if address[0] != _LOOPBACK]
    met.lines[ABOVE] = connect(rank, (far or near) if lead == rank else (near or far), token, deadline)


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


def _own_addresses(far: list[str]) -> list[str]:
    """By which other nodes may reach this one, best first: what MASTER_ADDR stands for, if it is this machine's, and
    where packets leave it on their way to `far`, or anywhere.
    """
    master = os.environ.get("MASTER_ADDR")
    found = _addresses_of(master) if master else []
    for host in [*dict.fromkeys(far), _ANYWHERE]:
        found += _toward(host)
    return [host for host in dict.fromkeys(found) if _is_own(host)][:_MOST_ADDRESSES]


def _is_own(host: str) -> bool:
    """Whether a server can be had there that others may reach."""
    if host.startswith(("127.", "fe80:")) or host in ("::1", "0.0.0.0", "::"):
        return False
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
        return True
    except OSError:
        return False


def _addresses_of(host: str) -> list[str]:
    try:
        return [str(address[0]) for *_, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)]
    except OSError:
        return []  # no such host


def _toward(host: str) -> list[str]:
    """The address of this machine on the way to another one; nothing is sent."""
    found = []
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                found.append(str(probe.getsockname()[0]))
    except OSError:
        pass  # no such host, or no way there
    return found


def over_default_group(record_bytes: int = RECORD_BYTES) -> Gather:
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
