# SPDX-License-Identifier: Apache-2.0
"""One `restore()` call: choose, check, read; the engine then adopts what was read.

A job that is cut as the checkpoint is, with as many ranks, reads what each rank wrote, and nothing else (`loader`).
Where any rank finds that it is not, all of them look for their parts in what all ranks wrote (`anywhere`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from layerwise_dist import _native
from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.exchange import Exchange, jointly
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.shards import open_base, open_shard
from layerwise_dist.errors import DamageError, MismatchError, NotFoundError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.param_groups import group_origins
from layerwise_dist.frameworks.parts import WHOLE, Parts
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.restore import choice, loader, nodes, ranks, stand_ins
from layerwise_dist.restore.anywhere import Fit, Fitting
from layerwise_dist.restore.choice import Wish
from layerwise_dist.restore.contents import OF_MODEL
from layerwise_dist.restore.gathered import Gathered
from layerwise_dist.restore.handing import Handing
from layerwise_dist.restore.holdings import Holdings
from layerwise_dist.restore.loader import LISTED, LoadPlan, another_model, listing
from layerwise_dist.restore.planned import Files
from layerwise_dist.restore.planner import ShardSet
from layerwise_dist.restore.sealed_state import optimizers_of, read_state
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.protocols import ShardWriterAdapter
from layerwise_dist.storage.reader import Shard
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.supervision.patience import within

T = TypeVar("T")

log = logging.getLogger("layerwise_dist")


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a checkpoint is taken.

    Attributes:
        partly: the model may have tensors that the checkpoint has not.
        parts: of the checkpoint.
        cast: "target" if values may be rounded to the dtypes that are here.
        objects: of `state` objects by name, whose all ranks are to take: "rank0"; of loaders also "anew".
    """

    partly: bool = False
    parts: Parts = WHOLE
    cast: str | None = None
    objects: Mapping[str, str] = field(default_factory=dict)


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
        objects: StateObjects,
    ) -> None:
        self._framework, self._optimizer = framework, optimizer
        self._manager, self._adapter, self._participant = manager, adapter, participant
        self._objects = objects
        self.undefined: str | None = None

    def of(self, manager: CheckpointMetadataManager) -> Restorer:
        """The same for another directory, which is only read."""
        return Restorer(
            self._framework, self._optimizer, manager=manager, adapter=self._adapter, participant=self._participant,
            objects=self._objects,
        )  # fmt: skip

    def newest(
        self, wish: Wish, read: Callable[[], Inventory], terms: Terms, *, fresh_if_missing: bool
    ) -> tuple[AttemptId, LoadPlan, bool] | None:
        """The best candidate that verifies on all ranks, loaded, and whether newer commits are left behind with it.
        `read` is called on rank 0: what it finds must stay until the lineage continues from what is chosen.

        None: nothing is there, and that may be. Raises as `LayerwiseEngine.restore`.
        """
        root = self._manager.root
        try:
            offered = choice.offer(self._participant, read, wish, root)
        except NotFoundError:
            if not fresh_if_missing:
                raise
            return None
        apart = self._participant.apart or any(candidate.apart for candidate in offered)
        held = nodes.look(self._participant, self._manager, [each.attempt for each in offered]) if apart else {}
        for candidate in offered:
            if self._is_whole(held.get(candidate.attempt)):
                loading = self._load(candidate.attempt, terms)
                if loading is not None:
                    return candidate.attempt, loading, candidate.leaves
        if offered:
            message = (
                f"no checkpoint in {root} verifies (tried steps {[each.attempt.step for each in offered]}); see the "
                "warnings. Others are never chosen automatically: restore(step=...) takes one"
            )
            if apart:
                message += self._said_gone(held, read)
            if self.undefined is not None:
                message += "; parameters and optimizer state were partly overwritten and are undefined"
                self.undefined = message
            raise DamageError(message)
        if not fresh_if_missing:
            raise NotFoundError(f"{root} holds no committed {wish}")
        return None

    def _is_whole(self, held: nodes.Held | None) -> bool:
        """Whether all of its shards are here. Raises MismatchError if they are, and not where their ranks are."""
        if held is not None and held.gone:
            if self._framework.rank == 0:
                log.warning("%s", held)
            return False
        if held is not None and held.away:
            raise MismatchError(
                f"step {held.step} in {self._manager.root} is whole on the nodes that are here, but the shards of "
                f"rank(s) {held.away} are not on the nodes where these ranks are now: start each rank where it was, or "
                "copy all shards into one directory that all ranks see"
            )
        return True

    def _said_gone(self, held: Mapping[AttemptId, nodes.Held], read: Callable[[], Inventory]) -> str:
        """What no node that is here holds of what was tried, and which commits are whole. All ranks together."""
        manifests = self._participant.agree(
            "which commits there are", None, lambda _: [[m.epoch, m.seq, m.step] for m in read().manifests.values()]
        )
        every = nodes.look(self._participant, self._manager, [AttemptId(*each) for each in manifests])
        whole = sorted(each.step for each in every.values() if not each.gone)
        gone = [str(each) for each in held.values() if each.gone]
        return "".join(f"; {each}" for each in gone) + f"; whole on the nodes that are here: steps {whole or 'none'}"

    def _load(self, attempt: AttemptId, terms: Terms) -> LoadPlan | None:
        """One candidate, on all ranks: check everything, then read.

        None if damaged somewhere; other errors are raised.
        """
        step, participant = attempt.step, self._participant
        sound, found = together(participant, f"check step {step}", lambda: self._check(attempt, terms))
        if not sound or found is None:
            return None
        manifest, shards, checked = found
        loading = checked if isinstance(checked, LoadPlan) else None
        if participant.agree(f"compare the cut of step {step}", loading is not None, all):
            assert loading is not None
            own = loading
            return self._fill(
                attempt, terms, own, lambda what, load: together(participant, what, load), lambda: loader.load(own)
            )
        if not shards.shared:
            together(participant, f"look at step {step}", lambda: self._refuse_nodes(manifest, checked))
        with Exchange.open(participant, participant.timeout_s) as exchange:

            def join(what: str, action: Callable[[], T]) -> tuple[bool, T | None]:
                return jointly(participant, exchange, what, action)

            sound, cut = join(f"cut step {step} anew", lambda: self._fit(manifest, exchange, terms))
            if not sound or cut is None:
                return None
            fit, whole = cut
            self._refuse(manifest, fit)
            self._say_moved(manifest, fit)
            handing = Handing(exchange, fit.loading.reads, whole.shards, whole.block_bytes)
            sound, _ = join(f"plan the reading of step {step}", handing.plan)
            if not sound:
                return None
            filled = self._fill(
                attempt, terms, fit.loading, join, lambda: loader.load(fit.loading, lambda _: handing.load())
            )
            if filled is not None:
                log.info(
                    "rank %d: step %d resharded: %d bytes of shards read here, %d received from other ranks, %d "
                    "held here",
                    participant.rank, step, whole.files.bytes_read, exchange.bytes_received, handing.bytes_held,
                )  # fmt: skip
            return filled

    def _fill(
        self, attempt: AttemptId, terms: Terms, loading: LoadPlan,
        run: Callable[[str, Callable[[], None]], tuple[bool, None]], load: Callable[[], None],
    ) -> LoadPlan | None:  # fmt: skip
        """Nothing is left to be refused: from here on live tensors change. `run` is `together`, or `jointly`."""
        step, framework = attempt.step, self._framework
        part = framework.part_of(loading.sealed["wrapper"], terms.parts)
        sound, _ = together(self._participant, f"take up step {step}", lambda: framework.take_up(part))
        if not sound:
            return None
        self.undefined = f"the restore of step {step} did not finish: parameters and optimizer state are undefined"
        sound, _ = run(f"load step {step}", load)
        return loading if sound else None

    def _check(self, attempt: AttemptId, terms: Terms) -> tuple[Manifest, ShardSet, LoadPlan | MismatchError | None]:
        """Without a plan: this rank is not cut as it was, or, as the error says, it is of another model."""
        try:
            manifest = within(
                self._participant.disk_s, "reading the manifest", lambda: self._manager.read_manifest(attempt)
            )
        except FileNotFoundError:
            raise DamageError(f"{self._manager.manifest_path(attempt)} is missing on this rank") from None
        framework = self._framework
        shards = ShardSet(framework.rank, lambda rank: self._open(manifest, rank), shared=not self._participant.apart)
        if (manifest.world_size, manifest.framework) != (framework.world_size, framework.name):
            return manifest, shards, None
        try:
            loading = loader.prepare(
                framework, self._optimizer, shards, self._where(manifest), partly=terms.partly, parts=terms.parts
            )
        except MismatchError as error:
            return manifest, shards, error
        if terms.objects:
            if not shards.shared:
                raise MismatchError("restore(objects=...) takes a directory that all ranks see")
            every = [read_state(shards.of(rank)[0], framework.name) for rank in range(framework.world_size)]
            loading.sealed = ranks.chosen(every, framework.rank, choose=terms.objects)
        if terms.parts.takes_optimizer and (wrong := self._fit_schedules(loading)):
            raise MismatchError("; ".join(wrong))
        if not terms.parts.module_only:
            self._objects.check(loading.sealed)
        record = manifest.shards[framework.rank].base
        if record is not None:
            report = BaseReport(record.attempt, record.nbytes, record.header_bytes, int(record.header_hash, 16))
            loading = replace(loading, base=(report, shards.own[1].index))
        return manifest, shards, loading

    def _fit_schedules(self, loading: LoadPlan) -> list[str]:
        """LR schedulers keep something for each group, and groups may be others than the checkpoint's."""
        if not self._objects.schedules():
            return []
        live: dict[str, Any] = self._optimizer.describe()
        there: dict[str, Any] = {**loading.sealed["optimizer"]}
        by_name = there.get("optimizers", {"": there})
        lacking, origins = loading.lacking_fqns, []
        for name, here in live.get("optimizers", {"": live}).items():
            saved = by_name[name]
            found = group_origins([group["params"] for group in here["groups"]], saved, lacking)
            origins.append((found, len(saved["groups"])))
        return ranks.fit_schedules(loading.sealed, self._objects, origins)

    def _where(self, manifest: Manifest) -> str:
        return f"step {manifest.step} in {self._manager.root}"

    def _fit(self, manifest: Manifest, exchange: Exchange, terms: Terms) -> tuple[Fit, Gathered]:
        framework, where = self._framework, self._where(manifest)
        framework.follow()
        whole = Gathered(
            manifest, lambda rank: self._open(manifest, rank), self._files(manifest, exchange), exchange,
            Holdings.of(framework, self._optimizer),
            lambda kind: terms.parts.takes_optimizer or kind in OF_MODEL,
        )  # fmt: skip
        same_world = manifest.world_size == framework.world_size
        sealed = whole.sealed[framework.rank if framework.rank < manifest.world_size else 0]
        taken: list[str] = []
        if not terms.parts.module_only:
            sealed, taken = ranks.for_rank(
                whole.sealed, framework.rank, framework.world_size, choose=terms.objects, objects=self._objects
            )
        sealed, given = stand_ins.exchange(sealed, manifest.framework, framework, self._objects, terms.parts)
        if not terms.parts.module_only:
            self._objects.check(sealed)
        wrapper, lost = ranks.carried(
            framework, sealed, manifest.framework, terms.parts, same_world=same_world, given=given
        )
        fitting = Fitting(
            framework, self._optimizer, whole, {**sealed, "wrapper": wrapper}, where,
            partly=terms.partly, parts=terms.parts, cast=terms.cast,
        )  # fmt: skip
        fit = fitting.fit()
        fit.taken, fit.lost = taken + fit.taken, lost
        if terms.parts.takes_optimizer and not fit.problems:
            described: list[Any] = optimizers_of(fit.loading.sealed)
            origins = [tuple(each["origins"]) for each in described]
            fit.problems = ranks.fit_schedules(fit.loading.sealed, self._objects, origins)
        return fit, whole

    def _refuse_nodes(self, manifest: Manifest, checked: LoadPlan | MismatchError | None) -> None:
        """Raises MismatchError, on some rank, where none sees the shards of all."""
        framework = self._framework
        if isinstance(checked, MismatchError):
            raise checked
        if checked is None:
            raise MismatchError(
                f"{self._where(manifest)} was written by {manifest.world_size} rank(s) of {manifest.framework}, and "
                f"this job has {framework.world_size} of {framework.name}: that takes a directory that all ranks see. "
                "All of its shards are on the nodes that are here: copy them into one"
            )

    def _refuse(self, manifest: Manifest, fit: Fit) -> None:
        """Raises MismatchError for what does not fit on any rank, and for what has no place on any of them."""
        where = self._where(manifest)

        def decide(votes: list[list[list[str]]]) -> None:
            found = [(rank, problems) for rank, (problems, _) in enumerate(votes) if problems]
            unknown = sorted(set.intersection(*(set(names) for _, names in votes)))
            said = (found[0][1] if found else []) + listing("unexpected in the checkpoint", unknown)
            if said:
                raise another_model(f"rank {found[0][0]}: {where}" if found else where, said)

        self._participant.agree("compare what fits", [fit.problems, sorted(fit.unknown)], decide)

    def _say_moved(self, manifest: Manifest, fit: Fit) -> None:
        framework = self._framework
        if framework.rank != 0:
            return
        if manifest.world_size != framework.world_size:
            log.warning(
                "step %d was written by %d rank(s), this job has %d: unless you change the batch of each rank, the "
                "global batch differs from here on",
                manifest.step, manifest.world_size, framework.world_size,
            )  # fmt: skip
        if fit.taken:
            more = f" and {len(fit.taken) - LISTED} more" if len(fit.taken) > LISTED else ""
            log.warning(
                "step %d: its ranks differ in %s%s; buffers are rank 0's from here on, and so is what new ranks take",
                manifest.step, ", ".join(fit.taken[:LISTED]), more,
            )  # fmt: skip
        if fit.lost:
            log.warning("step %d: %s of the checkpoint has no place here", manifest.step, " and ".join(fit.lost))

    def _files(self, manifest: Manifest, exchange: Exchange) -> Files:
        manager, env = self._manager, self._manager.env
        assert isinstance(env, _native.Env), "the native core reads shards"

        def path(rank: int, which: int) -> str:
            base = manifest.shards[rank].base
            return manager.base_path(base.attempt, rank) if which and base else manager.shard_path(manifest, rank)

        def count(nbytes: int) -> None:
            exchange.bytes_read += nbytes

        return Files(env, self._adapter.pool, path, count)

    def _open(self, manifest: Manifest, rank: int) -> list[Shard]:
        pool = self._adapter.pool
        base = open_base(self._manager, pool, manifest, rank)
        return [open_shard(self._manager, pool, manifest, rank), *([base] if base is not None else [])]
