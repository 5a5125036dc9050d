# SPDX-License-Identifier: Apache-2.0
"""Who uses a directory at the same time: a training with its coordinator, its retention and its recycler, and readers
of every kind. They are the product's own classes; only their threads, queues and locks are a `Scheduler`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kit.interleaving import GatedLock, GatedQueue, Scheduler
from layerwise_dist import _native
from layerwise_dist.cli import listing, showing, sides, verifying
from layerwise_dist.cli import tensors as listed
from layerwise_dist.cli.catalogue import Catalogue
from layerwise_dist.commit import copying, holding, owner, pins, pruning
from layerwise_dist.commit.copying import CheckpointCopy
from layerwise_dist.commit.merging import merge
from layerwise_dist.commit.messages import Durable
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import Place
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.session import Committer
from layerwise_dist.commit.shards import open_shard
from layerwise_dist.dcp import reader as dcp_reader
from layerwise_dist.doctor import examination
from layerwise_dist.errors import NotFoundError, OwnerError
from layerwise_dist.interop.gathered_state import Found, Imported
from layerwise_dist.interop.one_shard import dumped
from layerwise_dist.reading.checkpoint import open_checkpoint
from layerwise_dist.restore.choice import Wish
from layerwise_dist.storage import recycling
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.reader import Shard
from layerwise_dist.storage.shard_layout import Source
from layerwise_dist.tensors.slices import Slice

ELEMENTS = 300
TAG = "best"


def value(seq: int) -> torch.Tensor:
    """What the only tensor of a checkpoint is."""
    return torch.arange(ELEMENTS, dtype=torch.float32) + 1000 * seq


@dataclass(eq=False)  # each is one of its own: a roll-back to where one went before is another one
class Event:
    """A commit, or a roll-back: the checkpoint that a restore takes from then on."""

    target: AttemptId
    said: bool = False


@dataclass
class Truth:
    """What was done in the directory, and what was said to be done. A pin holds from when it was said until its end
    is asked for.
    """

    events: list[Event] = field(default_factory=list)
    tags: dict[AttemptId, str] = field(default_factory=dict)
    pinned: set[AttemptId] = field(default_factory=set)

    @property
    def said(self) -> int:
        """How many events were said to be done; they come one after the other."""
        return sum(event.said for event in self.events)

    def targets(self, said: int) -> set[AttemptId]:
        """What a restore may take that began when `said` events had been said, and ends now."""
        return {event.target for event in self.events[max(0, said - 1) :]}


class Training:
    """One rank's job. Its training thread writes shards, and its coordinator commits and retires: two actors, and the
    recycler's thread is a third. `spares`: how many files of retired checkpoints may be reused.
    """

    def __init__(
        self, scheduler: Scheduler, env: Any, root: str, truth: Truth, draw: random.Random, *, keep_last: int = 1,
        keep_tags: int | None = None, spares: int = 1,
    ) -> None:  # fmt: skip
        self._scheduler, self.env, self.root, self.truth, self._draw = scheduler, env, root, truth, draw
        self._keep_last, self._keep_tags, self._spares = keep_last, keep_tags, spares
        self.manager = CheckpointMetadataManager(env, root)
        self._orders = GatedQueue(scheduler)
        self.committed = 0
        self.over = False
        self.thrown_out = False

    def run(self, commits: int, *, roll_backs: bool = True) -> None:
        """The training thread."""
        self._begin()
        self._go_on(commits, roll_backs)

    def run_after_others(self, commits: int, *, roll_backs: bool = True) -> None:
        """As `run`, of a job that is started again and again until nobody else has the directory."""
        while True:
            try:
                self._begin()
                break
            except OwnerError:
                for _ in range(self._draw.randrange(60)):
                    self._scheduler.gate()
        self._go_on(commits, roll_backs)

    def _go_on(self, commits: int, roll_backs: bool) -> None:
        self._scheduler.spawn("coordinator", lambda: self._unless_thrown_out(self._coordinate))
        self._unless_thrown_out(lambda: self._train(commits, roll_backs))
        self._orders.put(None)
        self._scheduler.gate(lambda: self.over)

    def _unless_thrown_out(self, body: Callable[[], None]) -> None:
        """A job that finds that the directory is another's stops, whatever it finds first."""
        try:
            body()
        except (OSError, OwnerError):
            try:
                self.committer.owner.check()
            except OwnerError:
                self.thrown_out = self.over = True
                self._adapter.recycler._jobs.put(None)  # its thread ends as with the process
                return
            raise

    def _train(self, commits: int, roll_backs: bool) -> None:
        step = self._start_step
        for number in range(commits):
            if number and roll_backs and self._draw.random() < 0.25 and self.truth.events:
                step = self._roll_back()
            step += 1
            self._save(step)
            if self._draw.random() < 0.5:
                self._until_committed()
        self._until_committed()

    def _begin(self) -> None:
        place = Place(
            self.env, self.root, self.manager, ranks=[0], file_mode=0o600, dir_mode=0o700, who="the training"
        )  # fmt: skip
        plan = merge([place.look()], self.root, fresh=False)
        place.settle(plan, {})
        info = plan.info([[0]])
        self._seq, self._epoch = info.first_seq - 1, info.epoch
        assert place.owner is not None
        self.committer = Committer(
            self.manager, place.owner, info, world_size=1, framework="plain", software={}, keep_last=self._keep_last,
            keep_every_n_steps=None, keep_tags=self._keep_tags,
        )  # fmt: skip
        self.committer._lock = GatedLock(self._scheduler)  # type: ignore[assignment]  # held while it gives way
        lineage = self.manager.inventory().lineage()
        self.committer.follow(lineage[0].ref if lineage else None, None)
        self._start_step = lineage[0].step if lineage else 0
        self.committed = self._seq
        self._adapter = PCCheckAdapter(
            self.env, self.root, rank=0, world_size=1, backend="posix", queue_depth=1, block_bytes=4096,
            spares=self._spares,
        )  # fmt: skip
        self._adapter.recycler._jobs = GatedQueue(self._scheduler)  # type: ignore[assignment]
        self._adapter.allocate_staging_buffer(0.25)

    def _save(self, step: int) -> None:
        self._seq += 1
        attempt = AttemptId(self._epoch, self._seq, step)
        if self._draw.random() < 0.3:
            self.committer.tag(attempt.seq, TAG)
            self.truth.tags[attempt] = TAG
        tensor = value(attempt.seq)
        laid = self._adapter.lay_out([("w", [Source(Slice.whole("param", "w", "F32", (ELEMENTS,)))])], ())
        write = self._adapter.begin(attempt, laid.shard, laid.plan)
        write.set_addresses([tensor.data_ptr()], tensor)
        write.submit(0, 1)
        state = Imported("a test", step=step, tensors={"param/w": Found.of(tensor)}).sealed()
        write.seal(*dumped(state, "state"))
        report = write.persist(30.0)
        self._orders.put((attempt, report))

    def _until_committed(self) -> None:
        seq = self._seq
        self._scheduler.gate(lambda: self.committed >= seq or self.over)

    def _roll_back(self) -> int:
        """Or the choice of what is newest anyway. Returns the step."""
        self._until_committed()
        self.committer.hold(True)
        lineage = self.manager.inventory().lineage()
        assert lineage, "what was said to be committed is gone"
        chosen = self._draw.choice(lineage)
        check_contents(self.manager, chosen)
        self._seq += 1
        self.truth.events.append(Event(chosen.attempt_id))
        self.committer.follow(chosen.ref, self._seq)
        self._said(self.truth.events[-1])
        self.committed = self._seq
        self.committer.hold(False)
        return chosen.step

    def _said(self, event: Event) -> None:
        event.said = True
        self.env.mark(f"said {self.truth.events.index(event) + 1}")

    def _coordinate(self) -> None:
        committer, recycler = self.committer, self._adapter.recycler
        while (order := self._orders.get()) is not None:
            attempt, report = order
            durable: Durable = {
                "t": "durable", "rank": 0, "world_size": 1, "seq": attempt.seq, "attempt": attempt.text,
                "step": attempt.step, "file": report.file, "nbytes": report.nbytes,
                "header_bytes": report.header_bytes, "header_hash": f"{report.header_hash:016x}", "base": None,
            }  # fmt: skip
            self.truth.events.append(Event(attempt))
            event = self.truth.events[-1]
            committer.commit(attempt.seq, attempt.step, [durable])
            self._said(event)
            self.committed = attempt.seq
            gone: list[AttemptId] = []
            committer.retire(gone.append)
            for each in gone:
                recycler.retire(each)
                committer.collect_old(each)
        self._adapter.close(30.0)
        committer.close()
        self.over = True


def check_contents(manager: CheckpointMetadataManager, manifest: Manifest) -> None:
    """Reads all of it. Raises AssertionError, or DamageError."""
    pool = _native.WriterPool(1)
    try:
        shard = open_shard(manager, pool, manifest, 0)
        problems = shard.verify()
        assert not problems, f"{manifest.attempt_id.folder}: {problems}"
        assert torch.equal(_tensor(shard), value(manifest.seq)), f"{manifest.attempt_id.folder} holds other data"
    finally:
        pool.close()


def _tensor(shard: Shard) -> torch.Tensor:
    found = torch.empty(ELEMENTS)
    (entry,) = shard.index.entries.values()
    shard.read_into([(entry.begin, entry.end, found.data_ptr())])
    return found


class Reader:
    """Another process that looks at the directory, in a way that is drawn for each look."""

    def __init__(self, scheduler: Scheduler, env: Any, root: str, truth: Truth, draw: random.Random) -> None:
        self._scheduler, self.env, self.root, self.truth, self._draw = scheduler, env, root, truth, draw
        self._manager = CheckpointMetadataManager(env, root)
        self._copies = 0
        self.looks: dict[str, int] = {}

    def run(self, looks: int, ways: tuple[str, ...]) -> None:
        for _ in range(looks):
            self._scheduler.gate()
            way = self._draw.choice(ways)
            self.looks[way] = self.looks.get(way, 0) + 1
            said = self.truth.said
            try:
                getattr(self, f"_{way}")(said)
            except (AssertionError, Exception) as error:
                raise AssertionError(f"{way}, begun when {said} were said: {type(error).__name__}: {error}") from error

    def _taken(self, manifest: Manifest, said: int) -> None:
        allowed = self.truth.targets(said)
        assert manifest.attempt_id in allowed, f"took {manifest.attempt_id}, newest since it began: {sorted(allowed)}"

    def _none_there(self, said: int) -> bool:
        """Whether nothing was committed yet; else a reader must find something."""
        return said == 0

    def _open(self, said: int) -> None:
        try:
            found = open_checkpoint(self.root)
        except NotFoundError:
            if self._none_there(said):
                return
            raise
        with found as ckpt:
            self._taken(ckpt.manifest, said)
            for _ in range(self._draw.randrange(4)):
                self._scheduler.gate()
                assert torch.equal(ckpt["param/w"][...], value(ckpt.manifest.seq))
            path = self._manager.manifest_path(ckpt.manifest.attempt_id)
            assert self.env.stat(path)[0] == "file", "it was removed while it was open"
            check_contents(self._manager, ckpt.manifest)

    def _open_tag(self, said: int) -> None:
        told = any(event.said and event.target in self.truth.tags for event in self.truth.events)
        try:
            found = open_checkpoint(self.root, tag=TAG)
        except NotFoundError:
            assert not told, "a tag that was said to be committed is not there"
            return
        with found as ckpt:
            assert ckpt.tag == TAG and torch.equal(ckpt["param/w"][...], value(ckpt.manifest.seq))

    def _catalogue(self, said: int) -> Catalogue | None:
        try:
            return Catalogue(self.root)
        except Exception:
            if self._none_there(said):
                return None
            raise

    def _ls(self, said: int) -> None:
        if (catalogue := self._catalogue(said)) is not None:
            answer = listing.ls(catalogue)
            assert answer.good, answer.data
            newest = [entry for entry in answer.data["checkpoints"] if entry["status"] == "newest"]
            assert newest or self._none_there(said), answer.data

    def _show(self, said: int) -> None:
        self._shown(said, lambda catalogue: showing.show(catalogue, None, False))

    def _tensors(self, said: int) -> None:
        self._shown(said, lambda catalogue: listed.tensors(catalogue, None, None, None, True))

    def _shown(self, said: int, command: Callable[[Catalogue], Any]) -> None:
        try:
            answer = command(Catalogue(self.root))
        except Exception:
            if self._none_there(said):
                return
            raise
        assert answer.good, answer.data["problems"]

    def _verify(self, said: int) -> None:
        if (catalogue := self._catalogue(said)) is not None:
            answer = verifying.verify(catalogue)
            assert answer.good, answer.data

    def _diff(self, said: int) -> None:
        from contextlib import ExitStack

        with ExitStack() as stack:
            try:
                side = sides.open_side(self.root, None, None, False, stack)
            except Exception:
                if self._none_there(said):
                    return
                raise
            assert side.tensors is not None and "param/w" in side.tensors

    def _dcp(self, said: int) -> None:
        try:
            found = dcp_reader._Commit(self.root, Wish(), 30.0, ("model", "optim"))
        except NotFoundError:
            if self._none_there(said):
                return
            raise
        try:
            self._taken(found.manifest, said)
            found.metadata()
        finally:
            found.close()

    def _doctor(self, said: int) -> None:
        nbytes, _ = examination._checkpoints(self.root, None, None)
        assert nbytes is not None or self._none_there(said)

    def _prune_plan(self, said: int) -> None:
        """Without --yes."""
        if (catalogue := self._catalogue(said)) is not None and catalogue.inventory.identity is not None:
            found = pruning.plan(catalogue.manager, catalogue.inventory, pruning.Kept(1, None, None))
            assert "newest" in found.staying.values() or pruning.PINNED in found.staying.values() or said == 0

    def _cp(self, said: int) -> None:
        manifest = self._chosen()
        if manifest is None:
            return
        self._copies += 1
        target = f"{self.root}.copy{id(self) % 1000}-{self._copies}"
        try:
            with CheckpointCopy(self._manager, manifest, target) as copied:
                copied.write(lambda nbytes: None)
                copied.verify(lambda nbytes: None)
                copied.publish()
        except NotFoundError:
            assert not self._there(manifest), "it is there, and was said to be gone"
            return
        self.env.mark(f"copied {target} {manifest.seq}")

    def _pin(self, said: int) -> None:
        manifest = self._chosen()
        if manifest is None:
            return
        attempt = manifest.attempt_id
        self.env.mark(f"pinning {attempt.folder}")
        try:
            pins.pin(self._manager, manifest)
        except NotFoundError:
            assert not self._there(manifest), "it is there, and was said to be gone"
            return
        self.truth.pinned.add(attempt)
        self.env.mark(f"pinned {attempt.folder}")

    def _unpin(self, said: int) -> None:
        if self.truth.pinned:
            attempt = self._draw.choice(sorted(self.truth.pinned))
            self.truth.pinned.discard(attempt)
            self.env.mark(f"unpinned {attempt.folder}")
            self._manager.unpin(attempt)
            self.env.mark(f"free {attempt.folder}")

    def _chosen(self) -> Manifest | None:
        try:
            found = list(self._manager.inventory().manifests.values())
        except FileNotFoundError:
            return None
        return self._draw.choice(found) if found else None

    def _there(self, manifest: Manifest) -> bool:
        try:
            self._manager.read_manifest(manifest.attempt_id)
        except FileNotFoundError:
            return False
        return True


READING = ("open", "open_tag", "ls", "show", "tensors", "verify", "diff", "dcp", "doctor", "prune_plan")
KEEPING = ("pin", "unpin", "cp", "open")


@contextmanager
def on(scheduler: Scheduler, env: Any) -> Iterator[None]:
    """Whatever the product would do on the disk it does in `env`, and whatever it would wait for is the scheduler's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "PosixEnv", lambda: env)
        asleep = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: scheduler.gate())
        patch.setattr(holding, "time", asleep)
        patch.setattr(owner, "time", asleep)
        patch.setattr(copying, "_mode", lambda path: 0o600)
        patch.setattr(pruning, "_mode", lambda manager: 0o600)
        threads = SimpleNamespace(
            start=lambda name, body, failed: scheduler.spawn(name, body), log_only=recycling.background.log_only
        )
        patch.setattr(recycling, "background", threads)
        yield
