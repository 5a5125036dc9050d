# SPDX-License-Identifier: Apache-2.0
"""Messages between processes over a message store of the session's own, on rank 0, reached by TCP.

The lowest rank of each node keeps one connection to rank 0, and the other ranks of the node one to it. So rank 0 has
one connection for each node, and one for each other rank of its own.
"""

from __future__ import annotations

from layerwise_dist.commit.transports.links import Links
from layerwise_dist.commit.transports.relay import RelayTransport
from layerwise_dist.commit.transports.rendezvous import Gather, Met, meet


def open_store(rank: int, world_size: int, gather: Gather, timeout_s: float) -> RelayTransport:
    """Collective. Raises CommitError on all ranks, naming the one that could not be reached."""
    return over_tcp(rank, world_size, meet(rank, gather, timeout_s))


def over_tcp(rank: int, world_size: int, met: Met) -> RelayTransport:
    return RelayTransport(rank, world_size, Links(met.lines), met.serves, met.above)
