# SPDX-License-Identifier: Apache-2.0
"""One `restore()` call: choose, check, read; the engine then adopts what was read.

A job that is cut as the checkpoint is, with as many ranks, reads what each rank wrote, and nothing else (`loader`);
on disks of nodes, what a rank does not see is sent by one that does (`sent`, `handing`). Where any rank finds that it
is not, all of them look for their parts in what all ranks wrote (`anywhere`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from layerwise_dist import _native
from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.exchange import Exchange, jointly
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Inventory
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import Manifest, encode
from layerwise_dist.commit.shards import open_shards, shards_elsewhere
from layerwise_dist.errors import DamageError, DirectoryError, MismatchError, NotFoundError
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.param_groups import group_origins
from layerwise_dist.frameworks.parts import WHOLE, Parts
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.restore import choice, collector, fits, loader, nodes, ranks, stand_ins
from layerwise_dist.restore.anywhere import Fit, Fitting
from layerwise_dist.restore.choice import Wish
from layerwise_dist.restore.contents import OF_MODEL
from layerwise_dist.restore.gathered import Gathered
from layerwise_dist.restore.handing import Handing
from layerwise_dist.restore.holdings import Holdings
from layerwise_dist.restore.loader import LoadPlan
from layerwise_dist.restore.planned import Files
from layerwise_dist.restore.planner import ShardSet
from layerwise_dist.restore.regrouping import translations
from layerwise_dist.restore.sealed_state import optimizers_of, read_state
from layerwise_dist.restore.sent import Sent
from layerwise_dist.restore.sight import Sight
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.plain_header import Recent
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


@dataclass(frozen=True, slots=True)
class Checked:
    """What one rank has found of a candidate. Without `loading` it is not cut as this rank is, or of another model.
    `sent`: of files that not all ranks see which need them.
    """

    manifest: Manifest
    loading: LoadPlan | None
    sent: Sent | None


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
            seen = held.get(candidate.attempt)
            if seen is not None and seen.gone:
                if self._framework.rank == 0:
                    log.warning("%s", seen)
                continue
            if seen is not None:
                seen = nodes.sound(self._participant, self._manager, candidate.attempt, seen)
            loading = self._load(candidate.attempt, terms, seen)
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

    def _said_gone(self, held: Mapping[AttemptId, nodes.Held], read: Callable[[], Inventory]) -> str:
        """What no node that is here holds of what was tried, and which commits are whole. All ranks together."""
        manifests = self._participant.agree(
            "which commits there are", None, lambda _: [[m.epoch, m.seq, m.step] for m in read().manifests.values()]
        )
        every = nodes.look(self._participant, self._manager, [AttemptId(*each) for each in manifests])
        whole = sorted(each.step for each in every.values() if not each.gone)
        gone = [str(each) for each in held.values() if each.gone]
        return "".join(f"; {each}" for each in gone) + f"; complete on the nodes of this job: steps {whole or 'none'}"

    def _load(self, attempt: AttemptId, terms: Terms, held: nodes.Held | None) -> LoadPlan | None:
        """One candidate, on all ranks: check everything, then read. `held`: it lies on disks of nodes.

        None if damaged somewhere; other errors are raised.
        """
        step, participant, checked = attempt.step, self._participant, None
        if held is None or self._all_see_theirs(held, terms):
            sound, checked = together(participant, f"check step {step}", lambda: self._check(attempt, terms, held))
            if not sound or checked is None:
                return None
            if (own := self._cut_alike(checked)) is not None:
                return self._fill(
                    attempt, terms, own, lambda what, load: together(participant, what, load), partial(loader.load, own)
                )
        with Exchange.open(participant, participant.timeout_s) as exchange:
            if checked is None:
                sound, checked = jointly(
                    participant, exchange, f"check step {step}", lambda: self._check(attempt, terms, held, exchange)
                )
                if not sound or checked is None:
                    return None
                if (own := self._cut_alike(checked)) is not None:
                    assert held is not None and checked.sent is not None
                    files = self._files(checked.manifest, exchange, held.sight)
                    own = replace(own, reads=checked.sent.planned(own.reads, files))
                    handing = Handing(exchange, own.reads, checked.sent.shards, checked.sent.block_bytes, held.sight)
                    return self._hand_over(attempt, terms, exchange, own, handing, files, "restored across nodes")
            return self._cut_anew(attempt, terms, exchange, checked.manifest, held)

    def _cut_alike(self, checked: Checked) -> LoadPlan | None:
        """The plan, if each rank is cut as it was.

        Raises DirectoryError where ranks have read different checkpoints: in directories that have one path, jobs that
        know nothing of each other count from the same number.
        """
        where = self._where(checked.manifest)

        def decide(votes: list[tuple[str, bool]]) -> bool:
            if others := [rank for rank, (text, _) in enumerate(votes) if text != votes[0][0]]:
                raise DirectoryError(
                    f"{where} is another checkpoint on rank(s) {others} than on rank 0: they see directories of "
                    "different trainings there. Copy the checkpoint that you want to where all ranks see it"
                )
            return all(alike for _, alike in votes)

        vote = f"{_native.xxh3_64(encode(checked.manifest)):016x}", checked.loading is not None
        what = f"compare the cut of step {checked.manifest.step}"
        return checked.loading if self._participant.agree(what, vote, decide) else None

    def _all_see_theirs(self, held: nodes.Held, terms: Terms) -> bool:
        """Whether each rank sees all that it needs if it is cut as it was."""

        def look() -> bool:
            self._framework.follow()
            return all(held.sight.sees(self._framework.rank, rank) for rank in self._needed(held, terms))

        _, mine = together(self._participant, f"look at step {held.step}", look)
        return bool(self._participant.agree(f"who sees the shards of step {held.step}", mine, all))

    def _needed(self, held: nodes.Held, terms: Terms) -> set[int]:
        """The ranks of the checkpoint whose headers a rank reads by itself if it is cut as it was."""
        framework = self._framework
        if (held.sight.saved, held.framework) != (framework.world_size, framework.name):
            return set()
        return set(range(framework.world_size)) if terms.objects else {framework.rank, *framework.partners()}

    def _cut_anew(
        self, attempt: AttemptId, terms: Terms, exchange: Exchange, manifest: Manifest, held: nodes.Held | None
    ) -> LoadPlan | None:
        step, world_size = attempt.step, self._framework.world_size
        sight = Sight(world_size, manifest.world_size) if held is None else held.sight
        sound, cut = jointly(
            self._participant, exchange, f"cut step {step} anew", lambda: self._fit(manifest, exchange, terms, sight)
        )
        if not sound or cut is None:
            return None
        fit, whole = cut
        fits.refuse(self._participant, self._where(manifest), fit)
        if self._framework.rank == 0:
            fits.say_moved(manifest, world_size, fit)
        handing = Handing(exchange, fit.loading.reads, whole.shards, whole.block_bytes, sight)
        return self._hand_over(attempt, terms, exchange, fit.loading, handing, whole.files, "resharded")

    def _hand_over(
        self, attempt: AttemptId, terms: Terms, exchange: Exchange, loading: LoadPlan, handing: Handing, files: Files,
        how: str,
    ) -> LoadPlan | None:  # fmt: skip
        step, participant = attempt.step, self._participant

        def join(what: str, action: Callable[[], T]) -> tuple[bool, T | None]:
            return jointly(participant, exchange, what, action)

        sound, _ = join(f"plan the reading of step {step}", handing.plan)
        if not sound:
            return None
        filled = self._fill(attempt, terms, loading, join, lambda: loader.load(loading, lambda _: handing.load()))
        if filled is not None:
            log.info(
                "rank %d: step %d %s: %d bytes of shards read here, %d received from other ranks, %d held here",
                participant.rank, step, how, files.bytes_read, exchange.bytes_received, handing.bytes_held,
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

    @collector.resting()
    def _check(
        self, attempt: AttemptId, terms: Terms, held: nodes.Held | None, exchange: Exchange | None = None
    ) -> Checked:
        """With an `exchange`, ranks that do not see what they need are sent the headers of it."""
        try:
            manifest = within(
                self._participant.disk_s, "reading the manifest", lambda: self._manager.read_manifest(attempt)
            )
        except FileNotFoundError:
            raise DamageError(f"{self._manager.manifest_path(attempt)} is missing on this rank") from None
        framework, sent = self._framework, None
        opener = partial(self._open, manifest)
        if exchange is not None:
            assert held is not None
            needed = self._needed(held, terms)
            sent = Sent(
                manifest, exchange, held.sight, opener, partial(shards_elsewhere, self._manager, manifest), needed,
                needed if terms.objects else {framework.rank},
            )  # fmt: skip
        here = held is None or held.sight.seen is None
        shards = ShardSet(framework.rank, opener if sent is None else sent.of, shared=here)
        if (manifest.world_size, manifest.framework) != (framework.world_size, framework.name):
            return Checked(manifest, None, sent)
        try:
            loading = loader.prepare(
                framework, self._optimizer, shards, self._where(manifest), partly=terms.partly, parts=terms.parts
            )
        except MismatchError:
            return Checked(manifest, None, sent)  # cut otherwise; or of another model, as is found out then
        if terms.objects:
            every = [read_state(shards.of(rank)[0], framework.name) for rank in range(framework.world_size)]
            loading.sealed = ranks.chosen(every, framework.rank, choose=terms.objects)
        if terms.parts.takes_optimizer and (wrong := self._fit_schedules(loading)):
            raise MismatchError("; ".join(wrong))
        if not terms.parts.module_only:
            self._objects.check(loading.sealed)
        record = manifest.shards[framework.rank].base
        if record is not None and (held is None or held.sight.sees(framework.rank, framework.rank)):
            report = BaseReport(record.attempt, record.nbytes, record.header_bytes, int(record.header_hash, 16))
            loading = replace(loading, base=(report, shards.own[1].index))
        return Checked(manifest, loading, sent)

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

    @collector.resting()
    def _fit(self, manifest: Manifest, exchange: Exchange, terms: Terms, sight: Sight) -> tuple[Fit, Gathered]:
        framework, where = self._framework, self._where(manifest)
        framework.follow()
        recent = Recent()
        whole = Gathered(
            manifest, partial(self._open, manifest, recent=recent), self._files(manifest, exchange, sight), exchange,
            Holdings.of(framework, self._optimizer),
            lambda kind: terms.parts.takes_optimizer or kind in OF_MODEL, sight,
        )  # fmt: skip
        if sight.seen is not None:
            whole.bring(exchange, self._counts(whole) if terms.parts.takes_optimizer else ())
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

    def _counts(self, whole: Gathered) -> list[str]:
        """Of an equal optimizer of another class, that counts steps in tensors, where this one counts in numbers."""
        found = translations(whole.sealed[0]["optimizer"], self._optimizer.describe())
        return [name for name in whole.tensors if name.startswith("step/")] if found else []

    def _files(self, manifest: Manifest, exchange: Exchange, sight: Sight) -> Files:
        manager, env = self._manager, self._manager.env
        assert isinstance(env, _native.Env), "the native core reads shards"

        def path(rank: int, which: int) -> str:
            base = manifest.shards[rank].base
            return manager.base_path(base.attempt, rank) if which and base else manager.shard_path(manifest, rank)

        def count(nbytes: int) -> None:
            exchange.bytes_read += nbytes

        return Files(env, self._adapter.readers.pool, path, count, partial(sight.sees, self._framework.rank))

    def _open(self, manifest: Manifest, rank: int, recent: Recent | None = None) -> list[Shard]:
        return open_shards(self._manager, self._adapter.readers.pool, manifest, rank, recent)
