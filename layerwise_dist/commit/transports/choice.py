"""Which transport a job gets (`commit.transport`), opened by all ranks together."""

from __future__ import annotations

import os

import torch.distributed as dist

from layerwise_dist.commit.transports import Transport, mpi
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.commit.transports.rendezvous import over_default_group
from layerwise_dist.commit.transports.store import open_store
from layerwise_dist.errors import BoundaryError, ConfigError


def open_transport(wanted: str, timeout_s: float) -> Transport:
    """Collective, on the training thread. Rank and world size are those of torch.distributed where it is initialised,
    else MPI's. One process alone needs no transport: it gets queues in memory.

    Raises ConfigError for what cannot be, BoundaryError where a launcher's ranks have not been initialised,
    CommitError or DeadlineError where other ranks are not reached.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if wanted == "mpi" or (wanted == "auto" and not distributed and mpi.launched() > 1):
        return mpi.open_mpi(
            dist.get_rank() if distributed else None, dist.get_world_size() if distributed else None, timeout_s
        )
    if not distributed:
        _alone(wanted)
        return LocalTransport(LocalHub(1), 0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return LocalTransport(LocalHub(1), 0)
    return open_store(rank, world_size, over_default_group(), timeout_s)


def _alone(wanted: str) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise BoundaryError(
            f"WORLD_SIZE is {launched}, but torch.distributed is not initialised: call init_process_group() before "
            "attach()"
        )
    if mpi.launched() > 1:
        raise ConfigError(
            f"commit.transport = {wanted!r}: mpirun started {mpi.launched()} processes, and torch.distributed is not "
            "initialised: call init_process_group() before attach(), or use 'mpi' or 'auto'"
        )
