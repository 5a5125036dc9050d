# SPDX-License-Identifier: Apache-2.0
"""`LayerwiseReader`: commits of this package for `torch.distributed.checkpoint.load`."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from layerwise_dist import _native
from layerwise_dist.commit.holding import hold_chosen
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory, Manifest
from layerwise_dist.commit.records import OF_DCP
from layerwise_dist.commit.shards import open_shard
from layerwise_dist.dcp import trained
from layerwise_dist.dcp.metadata import Place, lacking, metadata_of, read_state
from layerwise_dist.dcp.place import InDirectory
from layerwise_dist.dcp.trained import Value
from layerwise_dist.errors import ConfigError, DamageError, LayerwiseError, MismatchError, NotFoundError
from layerwise_dist.interop.one_commit import check_names, root_of
from layerwise_dist.reading.checkpoint import Checkpoint
from layerwise_dist.reading.tensor import LazyTensor
from layerwise_dist.restore.choice import Wish, candidates, passed_by
from layerwise_dist.restore.filling import Read, load
from layerwise_dist.restore.planner import replan
from layerwise_dist.storage.reader import Shard
from layerwise_dist.tensors.pieces import DTYPES

log = logging.getLogger("layerwise_dist")

_READERS = 4  # threads
_AT_ONCE_BYTES = 256 << 20


class LayerwiseReader(InDirectory, StorageReader):
    """A `StorageReader` for `dcp.load`, of what `dcp.save` wrote with a `LayerwiseWriter`, and of a training's
    checkpoints: those are `{"model": ..., "optim": ..., "step": ...}` in the layout of `get_state_dict`. Every block
    that is read is verified before a byte of it is copied.

    It never takes an older checkpoint in place of a damaged one: that is a DamageError which names what is damaged.
    """

    def __init__(
        self, dir: str | os.PathLike[str], *, step: int | None = None, tag: str | None = None, model: str = "model",
        optimizer: str = "optim", timeout_s: float = 300.0,
    ) -> None:  # fmt: skip
        """
        Args:
            dir: where the checkpoints are. `checkpoint_id` of `dcp.load` goes before it.
            step: which one; by default the newest.
            tag: the newest under that tag.
            model, optimizer: what the state that is loaded calls them, of a checkpoint that `attach()` has saved.
            timeout_s: how long the disk may take to answer, seconds.

        Raises ConfigError.
        """
        check_names(step, tag, None)
        if step is not None and tag is not None:
            raise ConfigError("give a step or a tag, not both")
        self._root, self._wish, self._timeout_s = root_of(dir), Wish(step=step, tag=tag), timeout_s
        self._keys = (model, optimizer)
        self._found: _Commit | None = None
        self._load_id = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._close()
        if checkpoint_id is not None:
            self._root = root_of(checkpoint_id)

    # No `**kwargs`: DCP would take it as an offer to read what one rank alone has saved.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Chooses the checkpoint. Raises NotFoundError, DamageError, MismatchError or OSError."""
        self._close()
        try:
            self._found = found = _Commit(self._root, self._wish, self._timeout_s, self._keys)
            metadata = found.metadata()
        except (LayerwiseError, OSError) as error:
            self._close()
            log.error("dcp.load from %s: %s", self._root, error)  # torch 2.9 drops it, and only says "assert metadata"
            raise
        self._load_id = uuid.uuid4().hex
        metadata.storage_meta = StorageMeta(checkpoint_id=self._root, load_id=self._load_id)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """REQUIRES: `metadata` is what `read_metadata` gave, which may have been filtered."""
        self._places = metadata.storage_data or {}

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        assert self._found is not None, "read_metadata() comes first"
        return dataclasses.replace(plan, storage_data=self._found.manifest.attempt)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On rank 0. Raises MismatchError where ranks have found different checkpoints."""
        if len({plan.storage_data for plan in plans}) > 1:
            said = ", ".join(f"rank {rank}: {plan.storage_data}" for rank, plan in enumerate(plans))
            raise MismatchError(
                f"ranks have chosen different checkpoints ({said}): one was committed or removed meanwhile, or "
                f"{self._root} is not the same directory on all of them; load again, or name a step"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Raises DamageError, MismatchError or OSError; tensors may be partly overwritten then."""
        assert self._found is not None, "read_metadata() comes first"
        try:
            for items in _batches(plan.items):
                self._found.read(items, self._places, planner)
        finally:
            self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _close(self) -> None:
        found, self._found = self._found, None
        if found is not None:
            found.close()


class _Commit:
    """One commit, open to be read."""

    def __init__(self, root: str, wish: Wish, timeout_s: float, keys: tuple[str, str]) -> None:
        if not os.path.isdir(root):
            raise NotFoundError(f"{root}: no such directory")
        self._manager = CheckpointMetadataManager(_native.PosixEnv(), root)
        self.manifest, self._hold = hold_chosen(self._manager, lambda inventory: _choose(inventory, wish, root))
        self._keys = keys
        self._shards: dict[int, Shard] = {}
        self._objects: dict[int, dict[str, Any]] = {}
        self._pool: _native.WriterPool | None = None
        self._trained: Checkpoint | None = None
        if self.manifest.framework == OF_DCP:
            self._pool = _native.WriterPool(_READERS, patience_s=timeout_s, reads="auto")
        else:
            self._trained = Checkpoint(self._manager, self.manifest, self._hold)

    def close(self) -> None:
        """Retention may have it."""
        while self._shards:
            self._shards.popitem()[1].close()
        if self._trained is not None:
            self._trained.close()
        if self._pool is not None:
            self._pool.close()
            self._hold.release()
        self._manager.env.let_go()

    def metadata(self) -> Metadata:
        manifest = self.manifest
        if self._trained is not None:
            return trained.metadata_of(self._trained, *self._keys)
        shard = self._shard(0)
        state = read_state(shard)
        if state.index is None:
            raise DamageError(f"shard {shard.index.path}: it has no index of what dcp.save() wrote")
        self._objects[0] = state.objects
        return metadata_of(state.index, manifest.world_size, f"shard {shard.index.path}")

    def _shard(self, rank: int) -> Shard:
        if rank not in self._shards:
            assert self._pool is not None, "it is of dcp.save()"
            self._shards[rank] = open_shard(self._manager, self._pool, self.manifest, rank)
        return self._shards[rank]

    def read(self, items: list[ReadItem], places: dict[Any, Place | LazyTensor | Value], planner: LoadPlanner) -> None:
        """Raises DamageError, MismatchError or OSError."""
        reads: list[tuple[ReadItem, torch.Tensor, Read]] = []
        for item in items:
            place = places.get(item.storage_index)
            is_object = isinstance(place, Value) or (isinstance(place, Place) and place.slice is None)
            if place is None or is_object != (item.type == LoadItemType.BYTE_IO):
                raise MismatchError(f"{item.storage_index.fqn}: the checkpoint has no such part of it")
            if isinstance(place, Value):
                planner.load_bytes(item, _archive(place.value))
            elif isinstance(place, Place) and place.slice is None:
                planner.load_bytes(item, _archive(self._object(place.rank, item.storage_index.fqn)))
            else:
                target = planner.resolve_tensor(item).detach()
                if isinstance(place, Place):
                    reads.append((item, target, self._read(item, place, target)))
                else:
                    with torch.no_grad():
                        target.copy_(_boxed(item, place, target))
                    planner.commit_tensor(item, target)
        load([read for _, _, read in reads])
        for item, target, _ in reads:
            planner.commit_tensor(item, target)

    def _object(self, rank: int, fqn: str) -> Any:
        if rank not in self._objects:
            self._objects[rank] = read_state(self._shard(rank)).objects
        if fqn not in self._objects[rank]:
            raise DamageError(lacking(self._shard(rank), f"object {fqn}"))
        return self._objects[rank][fqn]

    def _read(self, item: ReadItem, place: Place, target: torch.Tensor) -> Read:
        part = place.slice
        assert part is not None and part.offsets is not None and part.lengths is not None
        shard = self._shard(place.rank)
        entry = shard.index.entries.get(part.name)
        if entry is None or dataclasses.replace(entry.slice, among="") != part:
            raise DamageError(lacking(shard, part.name))
        begin, size = _checked(item, part.lengths, target)
        offsets = tuple(o + b for o, b in zip(part.offsets, begin, strict=True))
        wanted = dataclasses.replace(part, offsets=offsets, lengths=size)
        return Read(target, replan(wanted, [(shard, entry)]), DTYPES[part.dtype])


def _choose(inventory: Inventory, wish: Wish, root: str) -> Manifest:
    """Raises NotFoundError, or DamageError where an older one would be taken in place of a damaged one."""
    found = candidates(inventory, wish, root)
    if not found:
        raise NotFoundError(f"{root} has no committed checkpoint")
    if newer := passed_by(inventory, found[0], wish):
        raise DamageError(
            f"the newest checkpoint in {root} is damaged ({'; '.join(newer)}): to load an older one, name "
            f"it: LayerwiseReader(dir, step={found[0].step})"
        )
    return found[0]


def _archive(value: Any) -> io.BytesIO:
    """An object as DCP expects it: an archive of `torch.save`, rebuilt in memory."""
    archive = io.BytesIO()
    torch.save(value, archive)
    archive.seek(0)
    return archive


def _checked(item: ReadItem, lengths: tuple[int, ...], target: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a part of a chunk of these lengths begins, and its size. Raises MismatchError."""
    begin, size, fqn = tuple(item.storage_offsets), tuple(item.lengths), item.storage_index.fqn
    if len(begin) != len(lengths) or any(
        b < 0 or n < 0 or b + n > length for b, n, length in zip(begin, size, lengths, strict=True)
    ):
        raise MismatchError(f"{fqn}: asked for {list(size)} at {list(begin)} of a part of {list(lengths)}")
    if tuple(target.shape) != size:
        raise MismatchError(f"{fqn}: the planner gives a tensor of {list(target.shape)} for {list(size)}")
    return begin, size


def _boxed(item: ReadItem, lazy: LazyTensor, target: torch.Tensor) -> torch.Tensor:
    return lazy.read_box(*_checked(item, tuple(lazy.shape), target))


def _batches(items: list[ReadItem]) -> Iterator[list[ReadItem]]:
    """Several at once, so that a shard is read in few calls, and no more than 256 MiB of a planner's own memory."""
    batch: list[ReadItem] = []
    elements = 0
    for item in items:
        batch.append(item)
        elements += item.lengths.numel()
        if elements > _AT_ONCE_BYTES // 4:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch
