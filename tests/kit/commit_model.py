"""A model check of the commit: the real decisions, on a simulated clock, network, disk and set of processes.

`Simulation` makes one transition after the other, drawn from a seed: a rank trains on, a disk does one operation, a
message arrives, time passes, something breaks, a job starts again. Coordinator, Ledger, Committer, Owner,
CheckpointMetadataManager and the start of a session are the engine's own; the disk is a MemoryEnv, which forgets what
was not flushed. Each invariant is checked at the moment at which it could break, and raises `Broken`.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import layerwise_native_testing as testing

from layerwise_dist.commit import coordinator as rank0
from layerwise_dist.commit import coordinator_thread, opening
from layerwise_dist.commit import ledger as rank_side
from layerwise_dist.commit import session as sessions
from layerwise_dist.commit.keeper import HEARS, Keeper
from layerwise_dist.commit.metadata import Branch as BranchRecord
from layerwise_dist.commit.metadata import CheckpointMetadataManager, InDoubt, Inventory, decode
from layerwise_dist.commit.metadata import Manifest as ManifestRecord
from layerwise_dist.commit.transports import Message
from layerwise_dist.errors import DamageError, DirectoryError, OwnerError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.reports import BaseReport, ShardReport

ROOT = "/ckpt"
TIMEOUT, DELAY, TICK = 10.0, 1.0, 2.0  # seconds: an attempt's deadline; the slowest message; the longest jump in time
POLICIES = ("none", "all", "names", "data", "random")


class Broken(AssertionError):
    """An invariant does not hold."""


class Killed(BaseException):
    """The process that does this dies here."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


def content(attempt: str, rank: int) -> bytes:
    return f"{attempt} of rank {rank}".encode()


# -- the disk ---------------------------------------------------------------------------------------------------------


class Lock:
    """A lock that can be lost without notice, as on a network file system."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk, self._path = disk, path
        disk.locks[path] = self

    def read(self, cap: int) -> bytes:
        return self._disk.read_file(self._path, cap)

    def write(self, data: bytes) -> None:
        real = self._disk.memory.lock(self._path)
        try:
            self._disk.step("lock_write", self._path)
            real.write(data)
        finally:
            real.release()

    def held_path_is_mine(self) -> bool:
        return True

    def release(self) -> None:
        if self._disk.locks.get(self._path) is self:
            del self._disk.locks[self._path]


class Disk:
    """What the engine calls of an Env, on a MemoryEnv: each operation may fail or be the last of its process."""

    def __init__(self, memory: Any, world: Simulation, place: int) -> None:
        self.memory, self._world, self.place = memory, world, place
        self.locks: dict[str, Lock] = {}
        self.fault: tuple[int, str, int] | None = None  # how many operations of this kind (or "") go well before, errno
        self.fuse: int | None = None
        self.doubts = False  # the flush behind the next manifest's rename fails

    def confine(self, root: str) -> None:
        """It has no links."""

    def step(self, kind: str, path: str) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Killed
        if self.fault is not None and self.fault[1] in (kind, ""):
            left, wanted, number = self.fault
            self.fault = (left - 1, wanted, number) if left else None
            if not left:
                self._world.count[f"fault {kind}"] += 1
                raise OSError(number, "injected", path)

    def list_dir(self, path: str) -> list[str]:
        self.step("list_dir", path)
        return self.memory.list_dir(path)

    def stat(self, path: str) -> Any:
        return self.memory.stat(path)

    def read_file(self, path: str, cap: int) -> bytes:
        self.step("read", path)
        return self.memory.read_file(path, cap)

    def make_dir(self, path: str, mode: int) -> None:
        self.step("make_dir", path)
        self.memory.make_dir(path, mode)

    def write_file(self, path: str, data: bytes, mode: int) -> None:
        self.step("write", path)
        self.memory.write_file(path, data, mode)

    def sync_dir(self, path: str) -> None:
        self.step("sync_dir", path)
        self.memory.sync_dir(path)

    def rename(self, source: str, target: str) -> None:
        self.step("rename", target)
        if os.path.basename(target) == filenames.MANIFEST:
            # As it is written, be it against itself where a rule is broken, which decode() would not take.
            manifest = ManifestRecord.model_validate_json(self.memory.read_file(source, 1 << 20)[:-32] + b"}")
            self._world.manifest_appears(self.place, manifest)
            if self.doubts:
                self.doubts, self.fault = False, (0, "sync_dir", errno.EIO)
        elif (seq := filenames.parse_branch(os.path.basename(target))) is not None:
            self._world.branch_appears(
                self.place, seq, decode(self.memory.read_file(source, 1 << 20), BranchRecord, source)
            )
        self.memory.rename(source, target)

    def unlink(self, path: str) -> None:
        self.step("unlink", path)
        folder, name = os.path.split(path)
        if name.startswith("rank_") and name.endswith(".safetensors"):
            place = os.path.basename(folder)
            if filenames.parse_base(place) is not None:
                self._world.base_goes(place)
            else:
                self._world.shard_goes(filenames.parse_folder(place), name)
        self.memory.unlink(path)

    def remove_dir(self, path: str) -> None:
        self.step("remove_dir", path)
        self.memory.remove_dir(path)

    def lock(self, path: str, mode: int) -> Lock:
        self.step("lock", path)
        if path in self.locks:
            raise BlockingIOError(errno.EWOULDBLOCK, "held", path)
        self.memory.lock(path, mode).release()
        return Lock(self, path)

    def durable(self) -> Any:
        """What there is at the least if power fails now."""
        return self.memory.crash(self.memory.log_size, 0, "none")


def has_shard(memory: Any, attempt: AttemptId, rank: int) -> bool:
    try:
        return bytes(memory.read_file(f"{ROOT}/{attempt.folder}/{filenames.shard_file(rank)}", 4096)) == content(
            attempt.text, rank
        )
    except FileNotFoundError:
        return False


def has_base(memory: Any, base: str, rank: int) -> bool:
    try:
        path = f"{ROOT}/{filenames.base_folder(base)}/{filenames.shard_file(rank)}"
        return bytes(memory.read_file(path, 4096)) == content(base, rank)
    except FileNotFoundError:
        return False


def has_manifest(memory: Any, attempt: AttemptId) -> bool:
    try:
        memory.stat(f"{ROOT}/{attempt.folder}/{filenames.MANIFEST}")
        return True
    except FileNotFoundError:
        return False


# -- one run of a job -------------------------------------------------------------------------------------------------


@dataclass
class Write:
    """One rank's shard: a small file that goes through the same operations as a real one. It refers to `base`."""

    attempt: AttemptId
    rank: int
    base: str = ""

    @property
    def folder(self) -> str:
        return f"{ROOT}/{self.attempt.folder}"

    @property
    def final(self) -> str:
        return f"{self.folder}/{filenames.shard_file(self.rank)}"


class Rank:
    """One rank's process: the real `Ledger`, a training loop, and the thread that does what Ledger asks for."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank = job, rank
        self.ledger = rank_side.Ledger(rank, job.world_size)
        self.alive, self.over = True, False
        self.stalled = False  # stopped for a while, alone
        self.count, self.seq = 0, job.info.first_seq + job.branched
        self.waits_since: float | None = None
        self.leaving: float | None = None
        self.orphaned = False  # what is left is its monitor
        self.holds_since: float | None = None
        self.base = ""  # what its attempts refer to; "": the next one writes another
        self.bases_written: dict[str, bool] = {}  # whether they are durable; once they were tried
        self.work: deque[Any] = deque()
        self.keeper: Keeper | None = None
        self.to_keep: deque[Message] = deque()
        self.doing: Iterator[None] | None = None
        self.staged_at: dict[int, float] = {}

    @property
    def disk(self) -> Disk:
        return self.job.sim.disk_of(self.rank)

    def do(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, rank_side.Post):
                if action.message["t"] == "staged":
                    self.staged_at[action.message["seq"]] = self.job.sim.now
                self.job.post_up(self.rank, action.message)
            else:
                self.work.append(action)

    # -- training

    def blocked(self) -> bool:
        if self.count == self.job.restores_at and self.waits_since is None and self.leaving is None:
            return True
        full = self.ledger.in_flight >= self.job.max_in_flight and not self.job.skips_when_full
        return self.over or not self.alive or (full and self.waits_since is None and self.leaving is None)

    def train(self) -> None:
        """One iteration, or another look at the grant that it waits for."""
        sim, dice = self.job.sim, self.job.sim.dice
        if self.leaving is not None:
            if (self.ledger.settled if self.orphaned else self.ledger.drained) or sim.now - self.leaving > TIMEOUT:
                self.over = True
                self.job.post_up(self.rank, {"t": "closed", "rank": self.rank})
            return
        step = self.job.start + self.count + (self.waits_since is None)
        if self.waits_since is None:
            self.count += 1
            if step % self.job.every == 0:
                self._attempt(step, dice.random())
            self.do(self.ledger.boundary(self.count))
            self.waits_since = sim.now
        if self.ledger.may_pass(self.count):
            self.waits_since = None
            if (reason := self.ledger.must_raise(self.count)) is not None:
                if self.ledger.lost is None:
                    self.job.raised[self.rank] = self.count
                    need(
                        len(set(self.job.raised.values())) == 1,
                        f"ranks raise at different boundaries: {self.job.raised}",
                    )
                self.leave(reason)
                return
            meeting = self.ledger.passed(self.count)
            if meeting is None or meeting.common:
                what = None if meeting is None else meeting.leave
                said = self.job.meetings.setdefault(self.count, what)
                need(said == what, f"boundary {self.count}: rank {self.rank} meets {what}, another {said}")
            if meeting is not None:
                sim.count["meeting" if meeting.common else "no meeting"] += 1
                if meeting.common and step % self.job.every:
                    self._attempt(step, dice.random())
                if meeting.leave:
                    self.leave("together")
        elif sim.now - self.waits_since > TIMEOUT:
            self.leave("DeadlineError")

    def _attempt(self, step: int, luck: float) -> None:
        attempt = AttemptId(self.job.info.epoch, self.seq, step)
        self.seq += 1
        if self.ledger.in_flight >= self.job.max_in_flight:
            self.do(self.ledger.skipped(attempt, "full"))
        else:
            self.ledger.began(attempt)
            self._capture(attempt, luck)

    def _capture(self, attempt: AttemptId, luck: float) -> None:
        changed = not self.base or luck > 0.8
        self.base = attempt.text if changed else self.base
        write = Write(attempt, self.rank, self.base)
        bases = [f"{ROOT}/{filenames.BASES}", f"{ROOT}/{filenames.base_folder(self.base)}"] if changed else []
        for folder in (write.folder, *bases):
            try:
                self.disk.make_dir(folder, 0o700)
            except FileExistsError:
                pass
            except OSError as error:
                self.base = ""
                self.do(self.ledger.failed(attempt, str(error), None))
                return
        if luck < 0.02:
            self.do(self.ledger.failed(attempt, "the lease is broken", write))
        else:
            self.do(self.ledger.sealed(write))

    @property
    def may_restore(self) -> bool:
        return self.alive and not self.over and self.leaving is None and self.ledger.ended() is None

    @property
    def waits_to_restore(self) -> bool:
        return self.count == self.job.restores_at and self.waits_since is None and self.ledger.settled

    def restored(self, step: int, base: str | None, branched: bool) -> None:
        self.seq += branched
        self.base = ""
        if base is not None:
            self.base, self.bases_written[base] = base, True
        self.ledger.restored(step)

    def bereave(self) -> None:
        """Its training process dies; its monitor finishes what it holds."""
        self.orphaned = True
        self.job.post_up(self.rank, {"t": "orphaned", "rank": self.rank, "why": "killed"})
        self.leave("orphaned")

    def leave(self, reason: str) -> None:
        self.leaving = self.job.sim.now
        self.job.sim.count[f"left: {reason.split()[0]}"] += 1

    # -- the background

    def background(self) -> None:
        """One operation of the disk."""
        if self.doing is None:
            if not self.work:
                return
            # Any attempt's work may be done before another's, though each attempt's is done in its order.
            first: dict[int, Any] = {}
            for job in self.work:
                first.setdefault((job.attempt if hasattr(job, "attempt") else job.write.attempt).seq, job)
            job = self.job.sim.dice.choice(list(first.values()))
            self.work.remove(job)
            self.doing = self._job(job)
        try:
            next(self.doing)
        except StopIteration:
            self.doing = None

    def keep(self) -> None:
        """One thing that the coordinator asked a keeper for."""
        assert self.keeper is not None
        answer = self.keeper.handle(self.to_keep.popleft())
        if answer is not None:
            self.job.post_up(self.rank, answer)

    def _job(self, job: Any) -> Iterator[None]:
        if isinstance(job, rank_side.Persist):
            yield from self._persist(job.write)
        elif isinstance(job, rank_side.GiveUp):
            self.do(self.ledger.gave_up(job))
        elif isinstance(job, rank_side.Discard):
            yield from self._remove(job.write)
            self.ledger.discarded(job.write)
        else:
            yield from self._remove(Write(job.attempt, self.rank))

    def _persist(self, write: Write) -> Iterator[None]:
        attempt = write.attempt
        if not self.ledger.wanted(write):
            return
        data = content(attempt.text, self.rank)
        if write.base not in self.bases_written:
            self.bases_written[write.base] = False
            try:
                for operation in self._base_operations(write.base):
                    operation()
                    yield
            except OSError:
                self.base = "" if self.base == write.base else self.base
            else:
                self.bases_written[write.base] = True
        if not self.bases_written[write.base]:
            self.do(self.ledger.gave_up(rank_side.GiveUp(attempt, "its base could not be written", write, False)))
            return
        operations: list[Callable[[], None]] = [
            lambda: self.disk.write_file(write.final + filenames.PARTIAL, data, 0o600),
            lambda: self.disk.rename(write.final + filenames.PARTIAL, write.final),
            lambda: self.disk.sync_dir(write.folder),
            lambda: self.disk.sync_dir(ROOT),
        ]
        for operation in operations:
            try:
                operation()
            except OSError as error:
                self.do(self.ledger.gave_up(rank_side.GiveUp(attempt, str(error), write, False)))
                return
            yield
        base = BaseReport(write.base, len(content(write.base, self.rank)), 4096, 0)
        report = ShardReport(self.rank, filenames.shard_file(self.rank), len(data), 4096, 0, base)
        self.do(self.ledger.persisted(attempt, report))

    def _base_operations(self, base: str) -> list[Callable[[], None]]:
        bases, folder = f"{ROOT}/{filenames.BASES}", f"{ROOT}/{filenames.base_folder(base)}"
        final = f"{folder}/{filenames.shard_file(self.rank)}"
        return [
            lambda: self.disk.write_file(final + filenames.PARTIAL, content(base, self.rank), 0o600),
            lambda: self.disk.rename(final + filenames.PARTIAL, final),
            lambda: self.disk.sync_dir(folder),
            lambda: self.disk.sync_dir(bases),
        ]

    def _remove(self, write: Write) -> Iterator[None]:
        for path in (write.final + filenames.PARTIAL, write.final):
            try:
                self.disk.unlink(path)
            except OSError:
                pass
            yield
        try:
            self.disk.remove_dir(write.folder)
        except OSError:
            pass


class Pen:
    """The real committer, and what is counted of it."""

    def __init__(self, committer: sessions.Committer, job: Job) -> None:
        self._committer, self._job, self._count = committer, job, job.sim.count

    def compose(self, seq: int, step: int, reports: list[Message]) -> str:
        return self._committer.compose(seq, step, reports)

    def commit(self, seq: int, step: int, reports: list[Message]) -> None:
        try:
            self._committer.commit(seq, step, reports)
        except (OSError, OwnerError) as error:
            self._count[f"commit: {type(error).__name__}"] += 1
            raise
        self._count["commit"] += 1
        self._job.chain.append(seq)

    def retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        try:
            self._committer.retire(withdrawn)
        except (OSError, OwnerError) as error:
            self._count[f"retire: {type(error).__name__}"] += 1
            raise
        finally:
            self._job.sim.retained(self._job)

    def collect_old(self, attempt: AttemptId) -> None:
        self._committer.collect_old(attempt)

    def unneeded(self) -> list[str]:
        return self._committer.unneeded()

    def remove_bases(self, bases: list[str]) -> None:
        self._committer.remove_bases(bases)


class Job:
    """One session: its ranks, its coordinator, and the messages between them."""

    def __init__(
        self, sim: Simulation, info: opening.SessionInfo, committer: sessions.Committer, start: int, branched: bool
    ) -> None:
        dice = sim.dice
        self.sim, self.info, self.start, self.branched = sim, info, start, int(branched)
        self.committer, self.pen = committer, Pen(committer, self)
        self.world_size = sim.world_size
        self.every, self.max_in_flight = dice.choice([1, 1, 2]), dice.choice([1, 2, 3])
        self.skips_when_full = dice.random() < 0.3
        self.tells_gone = dice.random() < 0.7
        self.coordinator = rank0.Coordinator(
            self.world_size, timeout_s=TIMEOUT, on_failure=dice.choice(["warn", "warn", "raise"]), raise_after=4,
            now=sim.now, keepers=[place[0] for place in info.places[1:]],
        )  # fmt: skip
        self.outputs: deque[rank0.Output] = deque()
        self.ranks = [Rank(self, rank) for rank in range(self.world_size)]
        self.up: list[deque[tuple[float, Message]]] = [deque() for _ in self.ranks]
        self.down: list[deque[tuple[float, Message]]] = [deque() for _ in self.ranks]
        self.cut: dict[int, float] = {}  # rank: when it hears of it
        self.frozen = False
        self.raised: dict[int, int] = {}
        self.staged: set[int] = set()  # by all
        self.meetings: dict[int, bool | None] = {}  # by boundary: whether they leave; None: no meeting
        self.chain: list[int] = []
        self.descent: set[int] = set()
        self.restores_at: int | None = None  # the boundary behind which all ranks do
        self.chosen: ManifestRecord | None = None

    @property
    def coordinates(self) -> bool:
        return self.ranks[0].alive and not self.frozen

    # -- messages

    def post_up(self, rank: int, message: Message) -> None:
        if rank not in self.cut and self.ranks[0].alive:
            self.up[rank].append((self.sim.now, message))

    def send(self, message: Message) -> None:
        for rank in range(self.world_size):
            if rank not in self.cut:
                self.down[rank].append((self.sim.now, message))

    def deliver_up(self, rank: int) -> None:
        self.finish()
        if self.up[rank]:  # it may have died over what it had to do
            self.outputs.extend(self.coordinator.handle(self.up[rank].popleft()[1], self.sim.now))

    def deliver_down(self, rank: int) -> None:
        message = self.down[rank].popleft()[1]
        if message["t"] == "meet":
            self.ranks[rank].holds_since = None
        if message["t"] in HEARS and self.ranks[rank].keeper is not None:
            self.ranks[rank].to_keep.append(message)
        self.ranks[rank].do(self.ranks[rank].ledger.receive(message))

    # -- the coordinator's thread

    def coordinate(self) -> None:
        """One thing that the coordinator said is to be done."""
        output = self.outputs.popleft()
        if isinstance(output, rank0.Announce):
            self.sim.announced(self, output.message)
        more = coordinator_thread.perform(self.coordinator, self.pen, self.send, output)
        self.outputs.extendleft(reversed(more))

    def finish(self) -> None:
        while self.outputs and self.coordinates:
            self.sim.in_process(self, 0, self.coordinate)

    def tick(self) -> None:
        self.finish()
        if self.coordinates:
            self.outputs.extend(self.coordinator.tick(self.sim.now))
            self.finish()

    # -- restore(), in the middle of a job

    def restore_choices(self) -> list[tuple[float, str, Callable[[], None]]]:
        if self.restores_at is None:
            at = max(rank.count for rank in self.ranks) + 1
            return [(0.2, "is to restore", lambda: setattr(self, "restores_at", at))]
        if not all(rank.may_restore for rank in self.ranks):
            return [(1.0, "does not restore: a rank is gone", self.restore_ends)]
        if not all(rank.waits_to_restore for rank in self.ranks):
            return []
        if self.chosen is None:
            return [(2.0, "chooses", self.choose)]
        return [
            (1.0, f"restores {self.chosen.attempt_id}", self.restore),
            (0.1, "fails to restore", self.restore_ends),
        ]

    def choose(self) -> None:
        """Rank 0 does, from what is there; what a restore loads is whole on every rank."""
        self.committer.hold(True)
        try:
            inventory = CheckpointMetadataManager(self.sim.disks[0], ROOT).inventory()
        except OSError:
            self.restore_ends()
            return
        found = [*inventory.lineage()[:1], *inventory.manifests.values()]
        found = [each for each in found if all(has_manifest(disk.memory, each.attempt_id) for disk in self.sim.disks)]
        if found:
            self.chosen = self.sim.dice.choice(found)
        else:
            self.restore_ends()

    def restore(self) -> None:
        sim, chosen = self.sim, self.chosen
        assert chosen is not None
        there = all(has_manifest(disk.memory, chosen.attempt_id) for disk in sim.disks)
        bases = sim.bases[chosen.seq]
        whole = all(
            has_shard(sim.disk_of(rank).memory, chosen.attempt_id, rank)
            and has_base(sim.disk_of(rank).memory, base, rank)
            for rank, base in enumerate(bases)
        )
        superseded = self.info.epoch != sim.epoch  # then another job removes what it likes
        need((there and whole) or superseded, f"{chosen.attempt_id} is gone, and a restore has chosen it")
        inventory = CheckpointMetadataManager(sim.disks[0].memory, ROOT).inventory()
        branched = not inventory.is_next(chosen) or sim.dice.random() < 0.5
        chain = sim.from_here_on(chosen, inventory)
        seq = self.ranks[0].seq
        need({rank.seq for rank in self.ranks} == {seq}, "ranks do not agree on the next seq")
        try:
            text, kept = self.committer.follow(chosen.ref, seq if branched else None)
            if text is not None:
                for disk in sim.disks[1:]:
                    CheckpointMetadataManager(disk, ROOT).write_branch(decode(text.encode(), BranchRecord, "branch"))
                sim.promised = seq
        except (OSError, OwnerError, DamageError):
            for rank in self.ranks:  # what was loaded follows nothing
                rank.leave("restore()")
        else:
            self.chain, self.descent = list(chain), sim.base_descent
            self.start = chosen.step - self.ranks[0].count
            for rank, base in zip(self.ranks, bases, strict=True):
                rank.restored(chosen.step, base if base in kept and sim.dice.random() < 0.8 else None, branched)
            sim.count["restore"] += 1
            sim.count["restore of an older one"] += inventory.lineage()[:1] != [chosen]
        self.restore_ends()

    def restore_ends(self) -> None:
        self.chosen = self.restores_at = None
        self.committer.hold(False)

    # -- what breaks

    def sever(self, rank: int) -> None:
        """The connection ends: a part of what is under way still arrives; the rank hears of it a little later."""
        dice = self.sim.dice
        for channel in (self.up[rank], self.down[rank]):
            for _ in range(dice.randrange(len(channel) + 1)):
                channel.pop()
        self.cut.setdefault(rank, self.sim.now + dice.uniform(0, DELAY))
        self._say_gone(rank)

    def _say_gone(self, rank: int) -> None:
        """What a transport that knows tells the coordinator, behind all that came from that rank."""
        if self.tells_gone and self.ranks[0].alive and rank and not self.ranks[rank].over:
            self.up[rank].append((self.sim.now, {"t": "gone", "rank": rank, "why": "its connection is gone"}))

    def kill(self, rank: int) -> None:
        if self.ranks[rank].alive:
            self._say_gone(rank)
        self.ranks[rank].alive = False
        if rank == 0:
            self.outputs.clear()
            for channel in self.up:
                channel.clear()
            for other in range(self.world_size):
                self.sever(other)
        self.sim.count["kill rank 0" if rank == 0 else "kill"] += 1

    def thaw(self) -> None:
        """A stopped job wakes: its deadlines count from now."""
        self.frozen = False
        for rank in self.ranks:
            rank.staged_at = dict.fromkeys(rank.staged_at, self.sim.now)
            rank.holds_since = None
        self.up, self.down = ([deque((self.sim.now, m) for _, m in c) for c in each] for each in (self.up, self.down))
        self.cut = {rank: max(when, self.sim.now) for rank, when in self.cut.items()}


# -- all of it --------------------------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """One directory and the jobs that run in it, one after the other and, when one was stopped, at once."""

    seed: int
    world_size: int = 0
    keep_last: int = 0
    now: float = 0.0
    count: Counter[str] = field(default_factory=Counter)
    trace: deque[str] = field(default_factory=lambda: deque(maxlen=60))

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.world_size = self.dice.choice([1, 2, 2, 3, 4])
        self.keep_last = self.dice.choice([1, 1, 2, 3])
        self.places = self._divide()
        self.disks = [Disk(testing.MemoryEnv(), self, place) for place in range(len(self.places))]
        self.jobs: list[Job] = []
        self.epoch = 0  # of the newest session
        self.appeared: dict[int, AttemptId | None] = {}  # record by seq; None: a branch record
        self.chains: dict[int, list[int]] = {}  # what must be there if this record is the newest
        self.descents: dict[int, set[int]] = {}  # every commit that this record descends from, and itself
        self.bases: dict[int, list[str]] = {}  # what the manifest of that seq refers to, by rank
        self.promised = 0  # the newest record that was announced
        self.base: list[int] = []  # the chain, and all commits before, of the branch record that is written next
        self.base_descent: set[int] = set()

    def _divide(self) -> list[list[int]]:
        """Most often all ranks share one directory; else each node has its own."""
        ranks = list(range(self.world_size))
        if self.dice.random() < 0.6 or self.world_size == 1:
            return [ranks]
        cuts = sorted(self.dice.sample(range(1, self.world_size), self.dice.randrange(1, self.world_size)))
        return [ranks[a:b] for a, b in zip([0, *cuts], [*cuts, self.world_size], strict=True)]

    def disk_of(self, rank: int) -> Disk:
        return next(self.disks[number] for number, place in enumerate(self.places) if rank in place)

    def unlock(self) -> None:
        for disk in self.disks:
            disk.locks.clear()

    # -- one transition

    def step(self) -> None:
        choices: list[tuple[float, str, Callable[[], None]]] = [(1.0, "time", self._time)]
        for number, job in enumerate(self.jobs):
            if not job.frozen:
                choices += self._choices(number, job)
        choices += [
            (0.12, "fault", self._fault),
            (0.02, "kill", self._kill),
            (0.02, "sever", self._sever),
            (0.03, "orphan", self._orphan),
            (0.03, "stop", self._stop),
            (0.015, "power", self._power),
            (0.015, "end all", self._end_all),
            (0.1, "ask", self._ask),
            (0.03, "stall", self._stall),
        ]
        if any(job.frozen for job in self.jobs):
            choices.append((0.15, "wake", self._wake))
        if any(rank.stalled for job in self.jobs for rank in job.ranks):
            choices.append((0.08, "go on", self._go_on))
        if not any(rank.alive and not rank.over for rank in self.current):
            choices.append((2.0, "start", self.start))
        weights = list(itertools.accumulate(weight for weight, _, _ in choices))
        _, what, action = self.dice.choices(choices, cum_weights=weights)[0]
        self.trace.append(f"{self.now:.2f} {what}")
        action()

    def _choices(self, number: int, job: Job) -> list[tuple[float, str, Callable[[], None]]]:
        found: list[tuple[float, str, Callable[[], None]]] = []
        for rank in job.ranks:
            if not rank.alive or rank.stalled:
                continue
            name = f"job {number} rank {rank.rank}"
            if not rank.blocked():
                found.append((1.0, f"{name} trains", lambda r=rank: self.in_process(job, r.rank, r.train)))
            if rank.doing is not None or rank.work:
                found.append((4.0, f"{name} writes", lambda r=rank: self.in_process(job, r.rank, r.background)))
            if rank.to_keep:
                found.append((4.0, f"{name} keeps", lambda r=rank: self.in_process(job, r.rank, r.keep)))
            if job.down[rank.rank]:
                found.append((2.0, f"{name} hears", lambda r=rank: job.deliver_down(r.rank)))
        if job.coordinates:
            if job.outputs:
                slow = isinstance(job.outputs[0], rank0.RetireOld)  # the ranks may be told before it is done
                found.append(
                    (0.5 if slow else 6.0, f"job {number} coordinates", lambda: self.in_process(job, 0, job.coordinate))
                )
            found += [
                (2.0, f"job {number} reads {channel[0][1]['t']} of rank {rank}", lambda r=rank: job.deliver_up(r))
                for rank, channel in enumerate(job.up)
                if channel
            ]
            found += [
                (weight, f"job {number} {what}", lambda a=action: self.in_process(job, 0, a))
                for weight, what, action in job.restore_choices()
            ]
        return found

    @property
    def current(self) -> list[Rank]:
        return self.jobs[-1].ranks if self.jobs and not self.jobs[-1].frozen else []

    def in_process(self, job: Job, rank: int, action: Callable[[], None]) -> None:
        try:
            action()
        except Killed:
            self.trace.append(f"rank {rank} dies in it")
            job.kill(rank)

    # -- time

    def _time(self) -> None:
        until = self.now + self.dice.choice([0.01, 0.1, 0.5, TICK])
        live = [job for job in self.jobs if not job.frozen]
        for job in live:
            self._bring_overdue(job, until)
        self.now = until
        for job in live:
            job.tick()
            self._in_time(job)

    def _bring_overdue(self, job: Job, until: float) -> None:
        """What no message may be late for: nothing is under way for longer than DELAY."""
        for rank, when in list(job.cut.items()):
            if when <= until and job.ranks[rank].ledger.lost is None:
                job.ranks[rank].ledger.lose("the connection is gone")
                self.count["lost"] += 1
        for rank in range(job.world_size):
            while job.coordinates and job.up[rank] and job.up[rank][0][0] + DELAY <= until:
                job.deliver_up(rank)
        job.finish()
        for rank in range(job.world_size):
            while job.down[rank] and job.down[rank][0][0] + DELAY <= until:
                if not job.ranks[rank].alive:
                    job.down[rank].clear()
                if not job.ranks[rank].alive or job.ranks[rank].stalled:
                    break
                job.deliver_down(rank)

    def _in_time(self, job: Job) -> None:
        for rank in job.ranks:
            if rank.stalled:
                continue
            if rank.ledger.holds and rank.alive and rank.ledger.ended() is None:
                rank.holds_since = self.now if rank.holds_since is None else rank.holds_since
                late = self.now - rank.holds_since
                need(late <= TIMEOUT / 2 + 3 * DELAY + 2 * TICK, f"rank {rank.rank} has held for {late:g} s")
            else:
                rank.holds_since = None
            if not rank.alive or rank.ledger.ended() is not None:
                continue
            for seq, since in list(rank.staged_at.items()):
                if seq not in rank.ledger._undecided:
                    del rank.staged_at[seq]
                else:
                    late = self.now - since
                    need(
                        late <= (1 + (len(self.places) > 1)) * TIMEOUT + 3 * DELAY + 2 * TICK,
                        f"rank {rank.rank}: seq {seq} is not decided after {late:g} s",
                    )

    # -- what breaks

    def _fault(self) -> None:
        disk = self.dice.choice(self.disks)
        if self.dice.random() < 0.1:
            disk.doubts = True
            return
        kind = self.dice.choice(["sync_dir"] * 2 + ["write", "rename", "unlink", "make_dir", "read", "list_dir", ""])
        disk.fault = (self.dice.randrange(8), kind, self.dice.choice([errno.EIO, errno.ENOSPC]))

    def _living(self) -> list[tuple[Job, int]]:
        return [(job, rank.rank) for job in self.jobs if not job.frozen for rank in job.ranks if rank.alive]

    def _kill(self) -> None:
        """One process, now or within the next operations of a disk, whoever does them."""
        if self.dice.random() < 0.5:
            self.dice.choice(self.disks).fuse = self.dice.randrange(12)
        elif living := self._living():
            job, rank = self.dice.choice(living)
            job.kill(rank)

    def _ask(self) -> None:
        if living := self._living():
            job, rank = self.dice.choice(living)
            if not job.ranks[rank].over:
                leave = self.dice.random() < 0.2
                job.ranks[rank].do(job.ranks[rank].ledger.ask(leave=leave, why="asked"))
                self.count["ask"] += 1

    def _stall(self) -> None:
        """SIGSTOP to one rank; rank 0's would stop its coordinator too, which stopping the whole job does."""
        if living := [(job, rank) for job, rank in self._living() if rank]:
            job, rank = self.dice.choice(living)
            job.ranks[rank].stalled = True
            self.count["stall"] += 1

    def _go_on(self) -> None:
        for job in self.jobs:
            for rank in job.ranks:
                if rank.stalled:
                    rank.stalled, rank.holds_since = False, None
                    rank.staged_at = dict.fromkeys(rank.staged_at, self.now)
                    job.down[rank.rank] = deque((self.now, message) for _, message in job.down[rank.rank])

    def _sever(self) -> None:
        if living := self._living():
            job, rank = self.dice.choice(living)
            if rank:  # rank 0 has its coordinator within
                job.sever(rank)
                self.count["sever"] += 1

    def _orphan(self) -> None:
        """SIGKILL to one training process, or to all of a job."""
        if self.jobs and not self.jobs[-1].frozen:
            ranks = [rank for rank in self.jobs[-1].ranks if rank.alive and not rank.over and not rank.orphaned]
            for rank in ranks if self.dice.random() < 0.5 else ranks[:1]:
                rank.bereave()
                self.count["orphan"] += 1

    def _stop(self) -> None:
        """SIGSTOP to a whole job, whose lock is then lost: a new one may begin beside it."""
        if self.jobs and not self.jobs[-1].frozen:
            self.jobs[-1].frozen = True
            self.unlock()
            self.count["stop"] += 1

    def _wake(self) -> None:
        job = self.dice.choice([job for job in self.jobs if job.frozen])
        job.thaw()
        self.count["wake"] += 1

    def _end_all(self) -> None:
        """As an agent ends the rest of a job in which a rank died; often some survive a while, without their rank 0."""
        for job in self.jobs:
            for rank in job.ranks:
                if rank.alive and (rank.rank == 0 or self.dice.random() < 0.7):
                    job.kill(rank.rank)
        self.unlock()

    def _power(self) -> None:
        """In all nodes, or in one: its disk comes back with what was flushed and parts of the rest; ranks are gone."""
        everywhere = self.dice.random() < 0.7 or len(self.places) == 1
        struck = range(len(self.places)) if everywhere else [self.dice.randrange(len(self.places))]
        for place in struck:
            for job in self.jobs:
                for rank in self.places[place]:
                    job.kill(rank)
            policy, memory = self.dice.choice(POLICIES), self.disks[place].memory
            self.trace.append(f"what is left in {place}: {policy}")
            self.disks[place] = Disk(memory.crash(memory.log_size, self.dice.randrange(1 << 30), policy), self, place)
        if everywhere:
            self.jobs.clear()
        self.count["power"] += 1
        self.check()
        if everywhere:
            newest = max(self._records(), default=0)
            for seq in [
                seq for seq in self.appeared if seq > newest
            ]:  # was not announced, and is lost: its seq is free
                del self.appeared[seq]
                self.bases.pop(seq, None)

    # -- a start

    def start(self) -> None:
        if self.jobs and not self.jobs[-1].frozen:
            for rank in self.jobs[-1].ranks:  # what still lives of the last one is left to itself
                rank.over = True
            self.jobs[-1].kill(0)
            self.unlock()
        managers = [CheckpointMetadataManager(disk, ROOT) for disk in self.disks]
        places = [
            opening.Place(disk, ROOT, manager, ranks=ranks, file_mode=0o600, dir_mode=0o700, who="model")
            for disk, manager, ranks in zip(self.disks, managers, self.places, strict=True)
        ]
        try:
            plan = opening.merge([place.look() for place in places], ROOT, fresh=False)
            texts = {name: text for place in places for name, text in place.texts(plan).items()}
            self.epoch = plan.epoch
            wanting = [why for place in places for why in place.settle(plan, texts)]
            need(not wanting, f"the start finds {wanting}")
            owners = [place.owner for place in places]
            assert owners[0] is not None
            committer = sessions.Committer(
                managers[0], owners[0], plan.info(self.places), world_size=self.world_size, framework="model",
                software={},
                keep_last=self.keep_last, keep_every_n_steps=None,
            )  # fmt: skip
            self.check(everywhere=True)
            job = self._begin(plan.info(self.places), committer, managers)
            for ranks, manager, owner in list(zip(self.places, managers, owners, strict=True))[1:]:
                assert owner is not None
                job.ranks[ranks[0]].keeper = Keeper(ranks[0], manager, owner, job.info)
        except (DirectoryError, OwnerError, OSError) as error:
            self.count[f"start: {type(error).__name__}"] += 1
            self.unlock()
        except Killed:
            self.unlock()

    def _begin(
        self, info: opening.SessionInfo, committer: sessions.Committer, managers: list[CheckpointMetadataManager]
    ) -> Job:
        inventory = CheckpointMetadataManager(self.disks[0].memory, ROOT).inventory()
        lineage = inventory.lineage()
        luck = self.dice.random()
        branch = bool(inventory.manifests) and luck < 0.25
        chosen = lineage[0] if lineage else None
        if branch:  # a roll back, or a fresh start beside what is there
            chosen = self.dice.choice(list(inventory.manifests.values())) if luck < 0.18 else None
        kept = self.from_here_on(chosen, inventory)
        head = chosen.ref if chosen is not None else None
        text, bases = committer.follow(head, info.first_seq if branch else None)
        if text is not None:
            for manager in managers[1:]:
                manager.write_branch(decode(text.encode(), BranchRecord, "branch"))
            self.count["branch"] += 1
            self.promised = info.first_seq
        job = Job(self, info, committer, chosen.step if chosen is not None else 0, branch)
        job.chain, job.descent = list(kept), self.base_descent
        for rank, base in zip(job.ranks, self.bases[chosen.seq] if chosen is not None else (), strict=False):
            if base in bases and self.dice.random() < 0.8:
                rank.base, rank.bases_written[base] = base, True
        self.jobs = [*self.jobs[-2:], job]
        self.count["start"] += 1
        return job

    def from_here_on(self, chosen: ManifestRecord | None, inventory: Inventory) -> list[int]:
        """What must stay while nothing is committed behind `chosen`, oldest first."""
        self.base, self.base_descent = [], set()
        if chosen is not None:
            self.base = [seq for seq in self.chains[chosen.seq] if seq in inventory.manifests]
            self.base_descent = self.descents[chosen.seq]
        return self.base

    # -- what must hold

    def manifest_appears(self, place: int, manifest: ManifestRecord) -> None:
        """A manifest is about to be renamed into place."""
        attempt = manifest.attempt_id
        if attempt.seq in self.appeared and (place or self.appeared[attempt.seq] == attempt):
            # Another node's copy, or one that comes back from there.
            need(self.appeared[attempt.seq] == attempt, f"{attempt}: {self.appeared[attempt.seq]} has that seq")
            need(
                any(has_manifest(disk.durable(), attempt) for disk in self.disks),
                f"{attempt}: published, not committed",
            )
            return
        need(place == 0, f"{attempt} is published before rank 0 has written it")
        for rank in range(self.world_size):
            disk = self.disk_of(rank).durable()
            need(has_shard(disk, attempt, rank), f"{attempt}: a manifest, and rank {rank}'s shard is not durable")
            base = manifest.shards[rank].base
            assert base is not None
            need(has_base(disk, base.attempt, rank), f"{attempt}: a manifest, and rank {rank}'s base is not durable")
        bases = [shard.base.attempt for shard in manifest.shards if shard.base is not None]
        need(attempt.epoch == self.epoch, f"{attempt}: an old epoch commits, the newest is {self.epoch}")
        need(
            attempt.seq not in self.appeared,
            f"{attempt}: a second record of that seq: {self.appeared.get(attempt.seq)}",
        )
        newer = max(self.appeared, default=0)
        need(attempt.seq > newer, f"{attempt}: committed behind seq {newer}")
        job = next(job for job in reversed(self.jobs) if job.info.epoch == attempt.epoch)
        self.appeared[attempt.seq] = attempt
        self.bases[attempt.seq] = bases
        self.chains[attempt.seq] = [*job.chain, attempt.seq]
        self.descents[attempt.seq] = job.descent = job.descent | {attempt.seq}

    def branch_appears(self, place: int, seq: int, branch: BranchRecord) -> None:
        if seq in self.appeared:
            need(self.appeared[seq] is None, f"a second record of seq {seq}")
            return
        need(place == 0, f"branch record {seq} is kept before rank 0 has written it")
        self.appeared[seq] = None
        self.chains[seq] = list(self.base)
        self.descents[seq] = self.base_descent

    def shard_goes(self, attempt: AttemptId | None, name: str) -> None:
        """A rank's durable shard is about to be removed, or written over."""
        need(attempt is not None, f"{name} lies in no attempt's folder")
        assert attempt is not None
        for disk in self.disks:
            for what, memory in (("there", disk.memory), ("not gone for good", disk.durable())):
                where = f"in place {disk.place} {what}"
                need(not has_manifest(memory, attempt), f"{attempt}: {name} goes, and the manifest is {where}")

    def base_goes(self, base: str) -> None:
        """A file of frozen parameters is about to be removed."""
        self.count["base goes"] += 1
        for seq in [seq for seq, bases in self.bases.items() if base in bases]:
            attempt = self.appeared[seq]
            assert attempt is not None
            for disk in self.disks:
                for what, memory in (("there", disk.memory), ("not gone for good", disk.durable())):
                    where = f"in place {disk.place} {what}"
                    need(not has_manifest(memory, attempt), f"base {base} goes, and the manifest {attempt} is {where}")

    def announced(self, job: Job, message: Message) -> None:
        if message["t"] == "committed":
            attempt = AttemptId(job.info.epoch, message["seq"], message["step"])
            taken_over = job.info.epoch != self.epoch  # and what it had committed in time may be retired by now
            durable = all(has_manifest(disk.durable(), attempt) for disk in self.disks)
            need(durable or taken_over, f"{attempt} is announced, and its manifest is not durable")
            self.promised = max(self.promised, message["seq"])
        elif message["t"] == "aborted":
            self.count["abort"] += 1
            for what in ("superseded", "left without", "waited", "keeps the manifests"):
                self.count[what] += what in message["reason"]
            attempt = AttemptId(job.info.epoch, message["seq"], message["step"])
            there = any(has_manifest(disk.memory, attempt) for disk in self.disks)
            need(not there, f"{attempt} is aborted, and its manifest is there")
            orphaned = "ended before" in message["reason"]
            self.count["ended before"] += orphaned
            need(not (orphaned and attempt.seq in job.staged), f"{attempt} is given up, and had been staged by all")
        elif message["t"] == "staged":
            job.staged.add(message["seq"])

    def retained(self, job: Job) -> None:
        """What retention leaves: only what was announced counts."""
        if job.info.epoch == self.epoch:  # else it may look at what the job that took over removed since
            known = [seq for seq in job.chain if seq <= self.promised]
            self._intact(known, [disk.memory for disk in self.disks], everywhere=True)
            self._intact(known, [disk.durable() for disk in self.disks], everywhere=True)

    def _inventories(self) -> list[Inventory]:
        found = []
        for disk in self.disks:
            try:
                found.append(CheckpointMetadataManager(disk.memory, ROOT).inventory())
            except FileNotFoundError:
                found.append(Inventory({}, {}, {}, []))
        return found

    def _records(self) -> list[int]:
        return [seq for each in self._inventories() for seq in [*each.manifests, *each.branches]]

    def check(self, *, everywhere: bool = False) -> None:
        """What the directories hold: one lineage that goes on from what was announced, with all that it must keep."""
        inventories = self._inventories()
        for inventory in inventories:
            need(not inventory.damaged, f"damaged: {inventory.damaged}")
        newest = max(self._records(), default=0)
        need(newest >= self.promised, f"the newest record is {newest}, {self.promised} was announced")
        if newest:
            need(newest in self.chains, f"record {newest} was never written")
            self._intact(self.chains[newest], [disk.memory for disk in self.disks], everywhere=everywhere)
        for number, inventory in enumerate(inventories):
            if everywhere and newest:
                # What retention took may come back if its flush failed: there can be holes, but nothing from elsewhere.
                lineage = [manifest.seq for manifest in inventory.lineage()]
                mine = self.descents[newest]
                need(set(lineage) <= mine, f"the lineage is {lineage}, of {sorted(mine)}")
                first = max((seq for seq in mine if seq in inventory.manifests), default=None)
                need(lineage[:1] == ([] if first is None else [first]), f"the lineage is {lineage}, of {sorted(mine)}")
                self._damage_brings_nothing_back(inventory, mine)
            for manifest in inventory.manifests.values():
                attempt = manifest.attempt_id
                whole = all(has_shard(self.disk_of(rank).memory, attempt, rank) for rank in range(self.world_size))
                need(whole, f"{attempt} has a manifest in place {number}, and not all of its shards")
                bases = enumerate(self.bases[manifest.seq])
                whole = all(has_base(self.disk_of(rank).memory, base, rank) for rank, base in bases)
                need(whole, f"{attempt} has a manifest in place {number}, and not all of its bases")

    def _damage_brings_nothing_back(self, inventory: Inventory, mine: set[int]) -> None:
        """However many of the newest manifests are damaged: what is left of the lineage is of it, or none is named."""
        manifests, damaged = dict(inventory.manifests), dict[str, str]()
        for seq in sorted(manifests, reverse=True):
            damaged[manifests.pop(seq).attempt_id.folder] = "damaged"
            left = Inventory(manifests, inventory.branches, damaged, inventory.unfinished)
            lineage = [manifest.seq for manifest in left.lineage()]
            need(set(lineage) <= mine, f"with damage from {seq} on, {lineage} comes back, not of {sorted(mine)}")
            named = lineage or left.lineage_damage() or left.lost
            need(bool(named) or not mine, f"with damage from {seq} on there is nothing")

    def _intact(self, chain: list[int], memories: list[Any], *, everywhere: bool) -> None:
        for seq in chain[-self.keep_last :]:
            attempt = self.appeared[seq]
            assert attempt is not None
            there = [has_manifest(memory, attempt) for memory in memories]
            whole = all(
                has_shard(memories[place], attempt, rank) for place, ranks in enumerate(self.places) for rank in ranks
            )
            kept = (all if everywhere else any)(there) and whole
            need(kept, f"{attempt} is among the {self.keep_last} newest, and not whole")


def walk(seed: int, transitions: int, each: int = 800) -> Counter[str]:
    """That many transitions, in runs of `each`, from seeds that follow on `seed`. Raises Broken with the run's seed."""
    total: Counter[str] = Counter()
    for run in range(-(-transitions // each)):
        sim = Simulation(seed + run)
        try:
            for _ in range(each):
                sim.step()
                sim.count["transitions"] += 1
            sim._power()
        except Broken as error:
            raise Broken(f"seed {sim.seed}: {error}; the end of the run:\n  " + "\n  ".join(sim.trace)) from error
        total += sim.count
    return total


__all__ = ["Broken", "InDoubt", "Simulation", "walk"]
