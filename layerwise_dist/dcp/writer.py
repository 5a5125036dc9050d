# SPDX-License-Identifier: Apache-2.0
"""`LayerwiseWriter`: commits what `torch.distributed.checkpoint` saves, in this package's format."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import uuid
import weakref
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from layerwise_dist import _native
from layerwise_dist.commit.metadata import Inventory
from layerwise_dist.commit.records import OF_DCP
from layerwise_dist.dcp.items import check_objects, jobs, objects, resolved
from layerwise_dist.dcp.metadata import FORMAT, Written, index_of
from layerwise_dist.dcp.place import InDirectory
from layerwise_dist.errors import ConfigError, DirectoryError, UnsupportedError
from layerwise_dist.interop.one_commit import OneCommit, check_names, root_of
from layerwise_dist.interop.one_shard import OneShard
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.reports import ShardReport
from layerwise_dist.tensors.slices import ranks_text

log = logging.getLogger("layerwise_dist")


@dataclasses.dataclass(frozen=True)
class _Order:
    """What rank 0 tells each rank in `SavePlan.storage_data`."""

    attempt: AttemptId
    rank: int
    world_size: int
    among: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _ShardDone(WriteResult):
    """A rank's last result: its shard is durable. Of rank 0 None: its shard is, once the index is in it."""

    report: ShardReport | None


class _Open:
    """What this process has open of a save, and what ends it however it ends."""

    def __init__(self) -> None:
        self.commit: OneCommit | None = None
        self.shard: OneShard | None = None
        self.thread: threading.Thread | None = None  # that saves

    def end(self) -> None:
        """Raises nothing. What was not committed never is."""
        shard, self.shard = self.shard, None
        commit, self.commit = self.commit, None
        try:
            if shard is not None:
                shard.abort()
        except OSError as error:
            log.warning("leftovers of a save that failed stay until the next one: %s", error)
        finally:
            if commit is not None:
                commit.close()


# Of rank 0, by directory. DCP does not tell a writer that another rank has failed, and whoever keeps the exception
# keeps the writer: what is open of such a save is ended by the next one.
_saving: weakref.WeakValueDictionary[str, _Open] = weakref.WeakValueDictionary()


def _end_what_is_over(root: str) -> None:
    """Of a save into this directory that this process has open though nothing saves any more."""
    before = _saving.get(root)
    if before is not None and before.thread is not None:
        if before.thread is threading.current_thread() or not before.thread.is_alive():
            before.end()


class LayerwiseWriter(InDirectory, StorageWriter):
    """A `StorageWriter` for `dcp.save` and `dcp.async_save`.

    Each save is a checkpoint of its own in one directory, hashed, flushed and committed in two phases: after a crash,
    at whatever moment, the newest one that was committed is there, whole. Objects of the state are written as typed
    JSON, never as pickles.

    One save at a time. The directory must be on a file system that all ranks share, and no training's.
    """

    def __init__(
        self, dir: str | os.PathLike[str], *, step: int | None = None, tag: str | None = None,
        keep_last: int | None = None, timeout_s: float = 300.0,
    ) -> None:  # fmt: skip
        """
        Args:
            dir: where the checkpoints are; made if it is not there. `checkpoint_id` of `dcp.save` goes before it.
            step: what the checkpoint is called; by default the step after the newest one's, from 1 on.
            tag: a name for it, of 1 to 255 printable characters.
            keep_last: how many of the newest checkpoints stay, beside those with a tag; None: all.
            timeout_s: deadline of waits for the disk, seconds.

        Raises ConfigError.
        """
        check_names(step, tag, keep_last)
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s = {timeout_s!r}: expected seconds, more than 0")
        self._root, self._step, self._tag, self._keep_last = root_of(dir), step, tag, keep_last
        self._timeout_s = timeout_s
        self._save_id = ""
        self._coordinates = True
        self._objects: dict[str, Any] = {}
        self._open = _Open()
        weakref.finalize(self, self._open.end)

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a LayerwiseWriter can't be handed to another process, as async_save() with AsyncCheckpointerType.PROCESS "
            "would: use AsyncCheckpointerType.THREAD, the default"
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Of a save before this one that failed nothing is left. Raises ConfigError."""
        self._open.end()
        if checkpoint_id is not None:
            self._root = root_of(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self._root, save_id=self._save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedError with `use_collectives=False`: then nobody could commit what all ranks wrote."""
        self._open.end()
        if not kwargs.get("use_collectives", True):
            raise UnsupportedError(
                "dcp.save(use_collectives=False): each rank would write a checkpoint of its own, but here one "
                "checkpoint holds all ranks: leave use_collectives=True"
            )
        self._coordinates, self._save_id, self._objects = is_coordinator, uuid.uuid4().hex, {}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, which takes the directory. Raises OwnerError, DirectoryError, DamageError, UnsupportedError or
        OSError.
        """
        if not all(plan.usable for plan in plans):
            raise UnsupportedError(
                "the planner sends plans of an earlier save (enable_plan_caching=True), and each checkpoint has a name "
                "of its own, which is in the plan: use enable_plan_caching=False"
            )
        holders: dict[str, list[int]] = {}
        for rank, plan in enumerate(plans):
            for item in plan.items:
                if item.tensor_data is not None and holders.setdefault(item.index.fqn, [])[-1:] != [rank]:
                    holders[item.index.fqn].append(rank)
        among = {fqn: ranks_text(ranks) for fqn, ranks in holders.items() if len(ranks) > 1}
        _end_what_is_over(self._root)
        self._open.commit = commit = OneCommit(
            self._root, world_size=len(plans), framework=OF_DCP, who="dcp.save", step=self._step, tag=self._tag,
            keep_last=self._keep_last, check=lambda found: _check_own(found, self._root),
        )  # fmt: skip
        self._open.thread = threading.current_thread()
        _saving[self._root] = self._open
        return [
            dataclasses.replace(
                plan,
                storage_data=_Order(
                    commit.attempt, rank, len(plans),
                    {item.index.fqn: among[item.index.fqn] for item in plan.items if item.index.fqn in among},
                ),
            )
            for rank, plan in enumerate(plans)
        ]  # fmt: skip

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """When this returns the shard is durable; that of rank 0, all but its end. Raises UnsupportedError naming the
        key, DeadlineError, or OSError.
        """
        order = plan.storage_data
        assert isinstance(order, _Order), "prepare_global_plan() has put it there"
        report = None
        try:
            todo, values = jobs(plan.items, order.among), objects(plan.items, planner)
            check_objects(values)
            self._open.shard = shard = OneShard(
                _native.PosixEnv(), self._root, order.attempt, order.rank, order.world_size,
                [part for _, part, _ in todo], self._timeout_s,
            )  # fmt: skip
            shard.write_tensors(resolved(planner, item, part) for item, part, _ in todo)
            if self._coordinates:
                self._objects = values
            else:
                report = shard.persist({"format": FORMAT, "objects": values})
                self._open.shard = None
        except BaseException:
            self._open.end()
            raise
        results: list[WriteResult] = [
            WriteResult(item.index, part.nbytes, Written(order.rank, number)) for item, part, number in todo
        ]  # fmt: skip
        results += [WriteResult(MetadataIndex(fqn), 0, Written(order.rank, 0)) for fqn in values]
        results.append(_ShardDone(MetadataIndex(""), 0, None, report))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, once all ranks have written: the end of its own shard, then the manifest. The checkpoint exists
        when this returns. Raises UnsupportedError, OSError, DeadlineError, OwnerError or DirectoryError.
        """
        commit, shard = self._open.commit, self._open.shard
        assert commit is not None and shard is not None, "write_data() comes first"
        try:
            written: dict[tuple[str, tuple[int, ...] | None], Written] = {}
            reports: list[ShardReport | None] = []
            for of_rank in results:
                for result in of_rank:
                    if isinstance(result, _ShardDone):
                        reports.append(result.report)
                        continue
                    offset = result.index.offset
                    key = result.index.fqn, None if offset is None else tuple(offset)
                    if key in written:
                        raise UnsupportedError(f"{key[0]}: the planner writes the same part of it twice")
                    written[key] = result.storage_data
            index = index_of(metadata, written)
            own = shard.persist({"format": FORMAT, "objects": self._objects, "index": index})
            self._open.shard = None  # it is durable: only the manifest says whether it counts
            commit.commit([report if report is not None else own for report in reports])
        finally:
            self._objects = {}
            self._open.end()


def _check_own(found: Inventory, root: str) -> None:
    other = next((manifest for manifest in found.manifests.values() if manifest.framework != OF_DCP), None)
    if other is not None:
        raise DirectoryError(
            f"{root} holds the checkpoints of a training ({other.framework}), whose restore() would find what "
            "dcp.save() writes as its newest: give dcp.save() a directory of its own"
        )
