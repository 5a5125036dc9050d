# SPDX-License-Identifier: Apache-2.0
"""Agreement among the ranks of a sharded model while it is loaded, over torch.distributed; others decide alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Alone:
    """A rank that loads for itself (`commit.agreement.Agreeing`)."""

    rank, world_size = 0, 1

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any]) -> Any:
        return decide([payload])


class AllRanks:
    """All ranks of the default process group. Its own timeout is the deadline of each exchange."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Every rank decides by the votes of all, in the order of ranks. They go as JSON."""
        mine = torch.frombuffer(bytearray(json.dumps(payload).encode()), dtype=torch.uint8).to(self._device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()], device=self._device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        padded[: mine.numel()] = mine
        votes = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(votes, padded)
        return decide([json.loads(bytes(vote[: int(size)].tolist())) for vote, size in zip(votes, sizes, strict=True)])
