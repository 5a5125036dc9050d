# SPDX-License-Identifier: Apache-2.0
"""Chooses the transport of a job (`commit.transport`), and opens it on all ranks together."""

from __future__ import annotations

import os

import torch.distributed as dist

from layerwise_dist.commit.transports import Transport, mpi
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.commit.transports.rendezvous import Gather, over_default_group
from layerwise_dist.commit.transports.store import open_store
from layerwise_dist.errors import BoundaryError, ConfigError, UnsupportedError


def open_transport(wanted: str, timeout_s: float) -> Transport:
    """Collective, on the training thread. Rank and world size are those of torch.distributed where it is initialized,
    else MPI's. One process alone needs no transport: it gets queues in memory.

    Raises ConfigError for what cannot be, BoundaryError where a launcher's ranks have not been initialized,
    CommitError or DeadlineError where other ranks are not reached.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if wanted == "mpi" or (wanted == "auto" and not distributed and mpi.launched() > 1):
        return mpi.open_mpi(
            dist.get_rank() if distributed else None, dist.get_world_size() if distributed else None, timeout_s
        )
    rank, world_size = _by_torch(wanted)
    if world_size == 1:
        return LocalTransport(LocalHub(1), 0)
    return open_store(rank, world_size, over_default_group(), timeout_s)


def find_ranks(wanted: str) -> tuple[int, int, Gather | None]:
    """Rank, world size, and how records of all ranks are gathered (None: there is one), for transports that other
    processes open in the ranks' place. Raises UnsupportedError under mpirun without torch.distributed; else as
    `open_transport`.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if wanted == "auto" and not distributed and mpi.launched() > 1:
        raise UnsupportedError(
            "mode = 'monitor': monitors exchange messages over TCP, and find each other over torch.distributed: call "
            "init_process_group() before attach(), or use mode 'direct'"
        )
    rank, world_size = _by_torch(wanted)
    return rank, world_size, over_default_group() if world_size > 1 else None


def over_torch() -> Gather | None:
    """The gather over torch.distributed's default group; None where it is not initialized, or has one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return over_default_group()


def _by_torch(wanted: str) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        _alone(wanted)
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _alone(wanted: str) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise BoundaryError(
            f"WORLD_SIZE is {launched}, but torch.distributed is not initialized: call init_process_group() before "
            "attach()"
        )
    if mpi.launched() > 1:
        raise ConfigError(
            f"commit.transport = {wanted!r}: mpirun started {mpi.launched()} processes, and torch.distributed is not "
            "initialized: call init_process_group() before attach(), or use 'mpi' or 'auto'"
        )
