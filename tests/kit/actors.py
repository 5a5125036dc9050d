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
from layerwise_dist.commit.opening import Place, make_dirs
from layerwise_dist.commit.records import Manifest
from layerwise_dist.commit.session import Committer
from layerwise_dist.commit.shards import open_shard
from layerwise_dist.dcp import reader as dcp_reader
from layerwise_dist.doctor import examination
from layerwise_dist.errors import DamageError, NotFoundError
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


@dataclass
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

    def run(self, commits: int, *, roll_backs: bool = True) -> None:
        """The training thread."""
        self._begin()
        self._scheduler.spawn("coordinator", self._coordinate)
        step = self._start_step
        for number in range(commits):
            if number and roll_backs and self._draw.random() < 0.25 and self.truth.events:
                step = self._roll_back()
            step += 1
            self._save(step)
            if self._draw.random() < 0.5:
                self._until_committed()
        self._until_committed()
        self._orders.put(None)
        self._scheduler.gate(lambda: self.over)

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
        self._scheduler.gate(lambda: self.committed >= seq)

    def _roll_back(self) -> int:
        """Or the choice of what is newest anyway. Returns the step."""
        self._until_committed()
        self.committer.hold(True)
        lineage = self.manager.inventory().lineage()
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
    entry = shard.index.entries["param/w"]
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


@dataclass
class Play:
    """One run of all of them, in an order that a seed draws."""

    env: Any
    root: str
    truth: Truth
    turns: int
    looks: dict[str, int]


def play(seed: int, root: str, make_env: Callable[[Scheduler], Any], *, commits: int = 6, pruned: bool = False) -> Play:
    """`root` is a directory that is there and empty; what is in it is in the Env. With `pruned`, the job ends in the
    middle, and `layerwise prune` has the directory.
    """
    draw = random.Random(seed)
    scheduler = Scheduler(draw.randrange(1 << 30))
    env = make_env(scheduler)
    truth = Truth()
    keep_last, keep_tags = draw.choice([1, 1, 2]), draw.choice([None, 1])
    training = Training(
        scheduler, env, root, truth, random.Random(draw.random()), keep_last=3 if pruned else keep_last,
        keep_tags=keep_tags, spares=draw.choice([0, 1, 2]),
    )  # fmt: skip
    readers = [Reader(scheduler, env, root, truth, random.Random(draw.random())) for _ in range(3)]

    def prune() -> None:
        scheduler.gate(lambda: training.over)
        work = pruning.Pruning(training.manager, pruning.Kept(1, None, None))
        try:
            work.run(lambda manifest: None)
        finally:
            work.close()

    with on(scheduler, env):
        make_dirs(env, root, 0o700)
        scheduler.spawn("training", lambda: training.run(commits))
        for number, reader in enumerate(readers):
            ways = READING if number < 2 else KEEPING
            scheduler.spawn(f"reader {number}", lambda reader=reader, ways=ways: reader.run(8, ways))
        if pruned:
            scheduler.spawn("prune", prune)
        try:
            scheduler.run()
        except (AssertionError, Exception) as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    looks: dict[str, int] = {}
    for reader in readers:
        for way, count in reader.looks.items():
            looks[way] = looks.get(way, 0) + count
    return Play(env, root, truth, scheduler.turns, looks)


def check_left(
    play: Play, env: Any, prefix: int, *, known: dict[Any, None] | None = None
) -> AttemptId | None:  # fmt: skip
    """What power loss after `prefix` operations left: asserts that it holds what had been promised, and nothing torn.

    Returns what a restore takes.
    """
    promised, pinned, free, copies = 0, set[str](), set[str](), list[tuple[str, int]]()
    for index, text in play.env.marks():
        if index >= prefix:
            break
        what, rest = text.split(" ", 1)
        if what == "said":
            promised = int(rest)
        elif what == "pinned":
            pinned.add(rest)
        elif what == "pinning":
            free.discard(rest)
        elif what == "unpinned":
            pinned.discard(rest)
        elif what == "free":
            free.add(rest)
        elif what == "copied":
            target, seq = rest.rsplit(" ", 1)
            copies.append((target, int(seq)))
    manager = CheckpointMetadataManager(env, play.root)
    try:
        found = manager.inventory()
    except FileNotFoundError:
        assert not promised, "the directory is gone"
        return None
    assert not found.damaged and found.lost is None, (found.damaged, found.lost)
    for manifest in found.manifests.values():
        _check_once(manager, manifest, known)
    taken = found.lineage()[0].attempt_id if found.lineage() else None
    allowed: set[AttemptId | None] = {*play.truth.targets(promised), *(() if promised else (None,))}
    assert taken in allowed, f"a restore takes {taken}, of {allowed}; {promised} were said"
    committed = {manifest.attempt_id.folder: manifest.attempt_id for manifest in found.manifests.values()}
    for folder in pinned:
        assert folder in committed and manager.pinned(committed[folder]), f"{folder} was pinned"
    for folder in free.intersection(committed):
        assert not manager.pinned(committed[folder]), f"{folder} was said to be unpinned"
    for target, seq in copies:
        other = CheckpointMetadataManager(env, target)
        copied = other.inventory()
        assert list(copied.manifests) == [seq] and not copied.damaged, f"{target} was a checkpoint"
        assert copied.identity is not None, f"{target} was a checkpoint, and its identity is gone"
        _check_once(other, copied.manifests[seq], known)
    if found.manifests:
        try:
            manager.read_identity()
        except (FileNotFoundError, DamageError) as error:
            raise AssertionError(f"there are records, and the identity is gone: {error}") from error
    return taken


def _check_once(manager: CheckpointMetadataManager, manifest: Manifest, known: dict[Any, None] | None) -> None:
    """The same bytes are seen many times over."""
    try:
        key = (manifest.attempt, _native.xxh3_64(manager.env.read_file(manager.shard_path(manifest, 0), 1 << 20)))
    except FileNotFoundError:
        raise AssertionError(f"{manifest.attempt_id.folder} has a manifest, and its shard is gone") from None
    if known is None or key not in known:
        try:
            check_contents(manager, manifest)
        except DamageError as error:
            raise AssertionError(f"{manifest.attempt_id.folder}: {error}") from error
        if known is not None:
            known[key] = None
