"""One `restore()` call: choose, check, read; the engine then adopts what was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.shards import open_base, open_shard
from layerwise_dist.errors import DamageError, MismatchError, NotFoundError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.parts import WHOLE, Parts
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import choice, loader
from layerwise_dist.restore.choice import Wish
from layerwise_dist.restore.loader import LoadPlan
from layerwise_dist.restore.planner import ShardSet
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import ShardWriterAdapter
from layerwise_dist.storage.reader import Shard
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.supervision.patience import within


class Restorer:
    """All ranks together. `undefined` says why live tensors can't be trusted, once they may have been half-written."""

    def __init__(
        self,
        framework: Framework,
        optimizer: OptimizerAdapter,
        *,
        manager: CheckpointMetadataManager,
        adapter: ShardWriterAdapter,
        participant: Participant,
        check_objects: Callable[[SealedState], None],
    ) -> None:
        self._framework, self._optimizer = framework, optimizer
        self._manager, self._adapter, self._participant = manager, adapter, participant
        self._check_objects = check_objects
        self.undefined: str | None = None

    def of(self, manager: CheckpointMetadataManager) -> Restorer:
        """The same for another directory, which is only read."""
        return Restorer(
            self._framework, self._optimizer, manager=manager, adapter=self._adapter, participant=self._participant,
            check_objects=self._check_objects,
        )  # fmt: skip

    def newest(
        self, wish: Wish, read: Callable[[], Inventory], *, fresh_if_missing: bool, partly: bool = False,
        parts: Parts = WHOLE,
    ) -> tuple[AttemptId, LoadPlan, bool] | None:  # fmt: skip
        """The best candidate that verifies on all ranks, loaded, and whether newer commits are left behind with it.
        `read` is called on rank 0: what it finds must stay until the lineage goes on from what is chosen.

        None: nothing is there, and that may be. Raises as `LayerwiseEngine.restore`.
        """
        root = self._manager.root
        try:
            offered = choice.offer(self._participant, read, wish, root)
        except NotFoundError:
            if not fresh_if_missing:
                raise
            return None
        for attempt, leaves in offered:
            loading = self._load(attempt, partly, parts)
            if loading is not None:
                return attempt, loading, leaves
        if offered:
            message = (
                f"no checkpoint in {root} verifies (tried steps {[a.step for a, _ in offered]}); see the warnings. "
                "Others are never chosen by themselves: restore(step=...) takes one"
            )
            if self.undefined is not None:
                message += "; parameters and optimizer state were partly overwritten and are undefined"
                self.undefined = message
            raise DamageError(message)
        if not fresh_if_missing:
            raise NotFoundError(f"{root} holds no committed {wish}")
        return None

    def _load(self, attempt: AttemptId, partly: bool, parts: Parts) -> LoadPlan | None:
        """One candidate, on all ranks: check everything, then read.

        None if damaged somewhere; other errors are raised.
        """
        sound, loading = together(
            self._participant, f"check step {attempt.step}", lambda: self._check(attempt, partly, parts)
        )
        if not sound or loading is None:
            return None
        self._framework.take_up(self._framework.part_of(loading.sealed["wrapper"], parts))
        self.undefined = (
            f"the restore of step {attempt.step} did not finish: parameters and optimizer state are undefined"
        )
        sound, _ = together(self._participant, f"load step {attempt.step}", lambda: loader.load(loading))
        return loading if sound else None

    def _check(self, attempt: AttemptId, partly: bool, parts: Parts) -> LoadPlan:
        try:
            manifest = within(
                self._participant.disk_s, "a look at the manifest", lambda: self._manager.read_manifest(attempt)
            )
        except FileNotFoundError:
            raise DamageError(f"{self._manager.manifest_path(attempt)} is missing on this rank") from None
        framework = self._framework
        if manifest.world_size != framework.world_size:
            raise MismatchError(
                f"step {manifest.step} was written by {manifest.world_size} ranks, this job has "
                f"{framework.world_size}: "
                "restoring into another world size is not supported by this version"
            )
        if manifest.framework != framework.name:
            raise MismatchError(
                f"step {manifest.step} was written by {manifest.framework}, this job has {framework.name}: "
                "restoring into another wrapper, or other models, is not supported by this version"
            )
        shards = ShardSet(framework.rank, lambda rank: self._open(manifest, rank), shared=not self._participant.apart)
        where = f"step {manifest.step} in {self._manager.root}"
        loading = loader.prepare(framework, self._optimizer, shards, where, partly=partly, parts=parts)
        if not parts.module_only:
            self._check_objects(loading.sealed)
        record = manifest.shards[framework.rank].base
        if record is not None:
            report = BaseReport(record.attempt, record.nbytes, record.header_bytes, int(record.header_hash, 16))
            return replace(loading, base=(report, shards.own[1].index))
        return loading

    def _open(self, manifest: Manifest, rank: int) -> list[Shard]:
        pool = self._adapter.pool
        base = open_base(self._manager, pool, manifest, rank)
        return [open_shard(self._manager, pool, manifest, rank), *([base] if base is not None else [])]
