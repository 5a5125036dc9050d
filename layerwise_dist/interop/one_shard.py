# SPDX-License-Identifier: Apache-2.0
"""One rank's shard of a checkpoint that is made outside a training loop, by the native writer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from layerwise_dist import _native
from layerwise_dist.errors import DeadlineError, StateError, UnsupportedError
from layerwise_dist.interop.one_commit import DIR_MODE, FILE_MODE
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.adapter import PCCheckAdapter, ShardWrite
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.reports import ShardReport
from layerwise_dist.storage.shard_layout import Source
from layerwise_dist.supervision.patience import stuck_calls
from layerwise_dist.tensors.slices import Slice

_EXTENT_BYTES = 4 << 20  # of several small tensors that are written as one
_COPIED_BYTES = 256 << 20  # of tensors that were made for the writer, at once
_POOL_MB = 8.0


class OneShard:
    """A rank's shard while it is written. `abort` where anything fails."""

    def __init__(
        self, env: _native.Env, root: str, attempt: AttemptId, rank: int, world_size: int,
        slices: Sequence[Slice], timeout_s: float,
    ) -> None:  # fmt: skip
        """Raises UnsupportedError for more, or others, than a shard can hold; OSError."""
        self._timeout_s, self._rank = timeout_s, rank
        self._adapter = PCCheckAdapter(
            env, root, rank=rank, world_size=world_size, file_mode=FILE_MODE, dir_mode=DIR_MODE, patience_s=timeout_s
        )
        self._write: ShardWrite | None = None
        self._held: list[torch.Tensor] = []  # which the writer may still read
        try:
            self._adapter.allocate_staging_buffer(_POOL_MB)
            self._extents = _grouped(slices)
            layers = [(each[0].fqn, [Source(part) for part in each]) for each in self._extents]
            laid = self._adapter.lay_out(layers, ())
            self._write = self._adapter.begin(attempt, laid.shard, laid.plan)
            self._write.set_addresses([0] * laid.shard.tensors)
        except BaseException:
            self.abort()
            raise

    def write_tensors(self, tensors: Iterable[tuple[torch.Tensor, bool]]) -> None:
        """All of them, in the order of the slices: host memory, row-major, and whether it was made for this alone.
        Nothing of it is read afterwards. Raises DeadlineError, and what `tensors` raises.
        """
        assert self._write is not None
        write, number, made, given = self._write, 0, 0, iter(tensors)
        for extent, members in enumerate(self._extents):
            for _ in members:
                tensor, is_copy = next(given)
                self._held.append(tensor)
                made += tensor.nbytes if is_copy else 0
                write.set_address(number, tensor.data_ptr())
                number += 1
            write.submit(extent, 1)
            if made > _COPIED_BYTES:
                self._wait()
                made = 0
        self._wait()

    def _wait(self) -> None:
        assert self._write is not None
        if not self._write.wait_written(self._timeout_s):
            raise DeadlineError(
                f"rank {self._rank}: {self._write.folder}: blocks were still being written after {self._timeout_s:g} "
                f"s{stuck_calls()}"
            )
        self._held.clear()

    def persist(self, state: Any) -> ShardReport:
        """`state` is written after the tensors; then the shard survives power loss. Raises OSError,
        DeadlineError, or UnsupportedError naming what of `state` typed JSON cannot hold.
        """
        assert self._write is not None
        self._write.seal(*dumped(state, "state"))
        report = self._write.persist(self._timeout_s)
        self._adapter.close(self._timeout_s)
        return report

    def abort(self) -> None:
        """Stops writing, and removes this rank's file, which never became a part of a checkpoint."""
        if self._write is not None:
            self._write.abort()
            self._write.discard()
        self._adapter.close(self._timeout_s)


def dumped(state: Any, path: str) -> tuple[bytes, bytes]:
    """As typed JSON. Raises UnsupportedError, which names the place below `path`."""
    try:
        return typed_json.dumps(state, path=path)
    except StateError as error:
        raise UnsupportedError(f"it cannot be written as typed JSON: {error}") from None


def _grouped(slices: Sequence[Slice]) -> list[list[Slice]]:
    """What is written as one: a large tensor, or several small ones."""
    found: list[list[Slice]] = []
    room = 0
    for each in slices:
        if not found or each.nbytes > room:
            found.append([])
            room = _EXTENT_BYTES
        found[-1].append(each)
        room -= each.nbytes
    return found
