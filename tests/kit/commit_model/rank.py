# SPDX-License-Identifier: Apache-2.0
"""One rank's process: the real `Ledger`, a training loop, and the thread that does what the ledger asks for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kit.commit_model.disk import ROOT, Disk, base_folder_of, content, folder_of
from kit.commit_model.history import Course
from kit.commit_model.network import Network
from kit.commit_model.rules import Rules
from kit.commit_model.world import TIMEOUT, World
from layerwise_dist.commit.keeper import Keeper
from layerwise_dist.commit.ledger import Action, Discard, GiveUp, Ledger, Persist, Post, Retire
from layerwise_dist.commit.transports import Message
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.reports import BaseReport, ShardReport


@dataclass
class Script:
    """What all ranks of a job do alike."""

    start: int  # the step that it goes on from
    first_seq: int
    every: int  # how many steps lie between checkpoints
    max_in_flight: int
    skips_when_full: bool
    restores_at: int | None = None  # the boundary after which all ranks do


@dataclass
class Write:
    """One rank's shard: a small file that goes through the same operations as a real one. It refers to `base`."""

    attempt: AttemptId
    rank: int
    base: str = ""

    @property
    def folder(self) -> str:
        return folder_of(self.attempt)

    @property
    def final(self) -> str:
        return f"{self.folder}/{filenames.shard_file(self.rank)}"


class Rank:
    """`count` is how many boundaries it has passed, or is at; `seq` is that of its next attempt."""

    def __init__(self, rank: int, script: Script, course: Course, network: Network, rules: Rules, world: World) -> None:
        self.rank = rank
        self._script, self._course, self._network, self._rules, self._world = script, course, network, rules, world
        self.ledger = Ledger(rank, world.world_size)
        self.alive, self.over = True, False
        self.stalled = False  # stopped for a while, alone
        self.orphaned = False  # what is left is its monitor
        self.count, self.seq = 0, script.first_seq
        self._waits_since: float | None = None
        self._leaving_since: float | None = None
        self._holds_since: float | None = None
        self._staged_at: dict[int, float] = {}  # by step
        self.keeper: Keeper | None = None
        self._to_keep: deque[Message] = deque()
        self._work: deque[Action] = deque()
        self._doing: Iterator[None] | None = None
        self._base = ""  # what its attempts refer to; "": the next one writes another
        self._bases_written: dict[str, bool] = {}  # whether they are durable; once they were tried

    @property
    def _disk(self) -> Disk:
        return self._world.disk_of(self.rank)

    # -- training

    @property
    def _trains(self) -> bool:
        return self._waits_since is None and self._leaving_since is None

    @property
    def blocked(self) -> bool:
        """Whether it does nothing until something else happens."""
        if self.count == self._script.restores_at and self._trains:
            return True
        full = self.ledger.in_flight >= self._script.max_in_flight and not self._script.skips_when_full
        return self.over or not self.alive or (full and self._trains)

    def train(self) -> None:
        """One iteration, or another look at the grant that it waits for."""
        now, dice = self._world.now, self._world.dice
        if self._leaving_since is not None:
            if (self.ledger.settled if self.orphaned else self.ledger.drained) or now - self._leaving_since > TIMEOUT:
                self.over = True
                self._network.post(self.rank, {"t": "closed", "rank": self.rank})
            return
        step = self._script.start + self.count + (self._waits_since is None)
        if self._waits_since is None:
            self.count += 1
            if step % self._script.every == 0:
                self._attempt(step, dice.random())
            self._do(self.ledger.boundary(self.count))
            self._waits_since = now
        if self.ledger.may_pass(self.count):
            self._waits_since = None
            self._pass(step)
        elif now - self._waits_since > TIMEOUT:
            self.leave("DeadlineError")

    def _pass(self, step: int) -> None:
        """The boundary: it raises there, or does what all ranks have agreed to do at it."""
        if (reason := self.ledger.must_raise(self.count)) is not None:
            if self.ledger.lost is None:
                self._rules.raises(self._course, self.rank, self.count)
            self.leave(reason)
            return
        meeting = self.ledger.passed(self.count)
        self._rules.passes(self._course, self.rank, self.count, meeting)
        if meeting is not None:
            self._world.count["meeting" if meeting.common else "no meeting"] += 1
            if meeting.common and step % self._script.every:
                self._attempt(step, self._world.dice.random())
            if meeting.leave:
                self.leave("together")

    def _attempt(self, step: int, luck: float) -> None:
        attempt = AttemptId(self._course.epoch, self.seq, step)
        self.seq += 1
        if self.ledger.in_flight >= self._script.max_in_flight:
            self._do(self.ledger.skipped(attempt, "full"))
        else:
            self.ledger.began(attempt)
            self._capture(attempt, luck)

    def _capture(self, attempt: AttemptId, luck: float) -> None:
        changed = not self._base or luck > 0.8
        self._base = attempt.text if changed else self._base
        write = Write(attempt, self.rank, self._base)
        bases = [f"{ROOT}/{filenames.BASES}", base_folder_of(self._base)] if changed else []
        for folder in (write.folder, *bases):
            try:
                self._disk.make_dir(folder, 0o700)
            except FileExistsError:
                pass
            except OSError as error:
                self._base = ""
                self._do(self.ledger.failed(attempt, str(error), None))
                return
        if luck < 0.02:
            self._do(self.ledger.failed(attempt, "the lease is broken", write))
        else:
            self._do(self.ledger.sealed(write))

    def ask(self, *, leave: bool) -> None:
        """For a meeting."""
        self._do(self.ledger.ask(leave=leave, why="asked"))

    def leave(self, reason: str) -> None:
        self._leaving_since = self._world.now
        self._world.count[f"left: {reason.split()[0]}"] += 1

    def bereave(self) -> None:
        """Its training process dies; its monitor finishes what it holds."""
        self.orphaned = True
        self._network.post(self.rank, {"t": "orphaned", "rank": self.rank, "why": "killed"})
        self.leave("orphaned")

    # -- restore(), in the middle of training

    @property
    def may_restore(self) -> bool:
        return self.alive and not self.over and self._leaving_since is None and self.ledger.ended() is None

    @property
    def waits_to_restore(self) -> bool:
        return self.count == self._script.restores_at and self._waits_since is None and self.ledger.settled

    def restored(self, step: int, base: str | None, branched: bool) -> None:
        self.seq += branched
        self._base = ""
        self.refers_to(base)
        self.ledger.restored(step)

    def refers_to(self, base: str | None) -> None:
        """Its frozen parameters are those of what it restored."""
        if base is not None:
            self._base, self._bases_written[base] = base, True

    # -- what it hears

    def receive(self, message: Message) -> None:
        if message["t"] == "meet":
            self._holds_since = None
        self._do(self.ledger.receive(message))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Post):
                if action.message["t"] == "staged":
                    self._staged_at[action.message["step"]] = self._world.now
                self._network.post(self.rank, action.message)
            else:
                self._work.append(action)

    # -- what it is held to

    def check_in_time(self) -> None:
        """It does not wait for longer than a deadline, but for what lies within its own process."""
        now = self._world.now
        if self.stalled:
            return
        if self.ledger.holds and self.alive and self.ledger.ended() is None:
            self._holds_since = now if self._holds_since is None else self._holds_since
            self._rules.holds_for(self.rank, now - self._holds_since)
        else:
            self._holds_since = None
        if not self.alive or self.ledger.ended() is not None:
            return
        undecided = self.ledger.undecided_steps
        for step, since in list(self._staged_at.items()):
            if step in undecided:
                self._rules.undecided_for(self.rank, step, now - since)
            else:
                del self._staged_at[step]

    def wake(self) -> None:
        self.stalled = False
        self.count_from_now()

    def count_from_now(self) -> None:
        """It was stopped: what it is held to counts from now."""
        self._holds_since = None
        self._staged_at = dict.fromkeys(self._staged_at, self._world.now)

    # -- the keeper's thread

    @property
    def has_to_keep(self) -> bool:
        return bool(self._to_keep)

    def told_to_keep(self, message: Message) -> None:
        self._to_keep.append(message)

    def keep(self) -> None:
        """One thing that the coordinator asked a keeper for."""
        assert self.keeper is not None
        answer = self.keeper.handle(self._to_keep.popleft())
        if answer is not None:
            self._network.post(self.rank, answer)

    # -- the thread that persists

    @property
    def has_work(self) -> bool:
        return self._doing is not None or bool(self._work)

    def background(self) -> None:
        """One operation of the disk."""
        if self._doing is None:
            # Any attempt's work may be done before another's, though each attempt's is done in its order.
            first: dict[int, Action] = {}
            for action in self._work:
                first.setdefault(_attempt_of(action).seq, action)
            chosen = self._world.dice.choice(list(first.values()))
            self._work.remove(chosen)
            self._doing = self._operations(chosen)
        try:
            next(self._doing)
        except StopIteration:
            self._doing = None

    def _operations(self, action: Action) -> Iterator[None]:
        if isinstance(action, Persist):
            assert isinstance(action.write, Write)
            yield from self._persist(action.write)
        elif isinstance(action, GiveUp):
            self._do(self.ledger.gave_up(action))
        elif isinstance(action, Discard):
            assert isinstance(action.write, Write)
            yield from self._remove(action.write)
            self.ledger.discarded(action.write)
        elif isinstance(action, Retire):
            yield from self._remove(Write(action.attempt, self.rank))

    def _persist(self, write: Write) -> Iterator[None]:
        attempt = write.attempt
        if not self.ledger.wanted(write):
            return
        if write.base not in self._bases_written:
            yield from self._write_base(write.base)
        if not self._bases_written[write.base]:
            self._do(self.ledger.gave_up(GiveUp(attempt, "its base could not be written", write, False)))
            return
        data = content(attempt.text, self.rank)
        try:
            yield from self._write(write.folder, data, ROOT)
        except OSError as error:
            self._do(self.ledger.gave_up(GiveUp(attempt, str(error), write, False)))
            return
        base = BaseReport(write.base, len(content(write.base, self.rank)), 4096, 0)
        report = ShardReport(self.rank, filenames.shard_file(self.rank), len(data), 4096, 0, base)
        self._do(self.ledger.persisted(attempt, report))

    def _write_base(self, base: str) -> Iterator[None]:
        self._bases_written[base] = False
        try:
            yield from self._write(base_folder_of(base), content(base, self.rank), f"{ROOT}/{filenames.BASES}")
        except OSError:
            self._base = "" if self._base == base else self._base
        else:
            self._bases_written[base] = True

    def _write(self, folder: str, data: bytes, above: str) -> Iterator[None]:
        """This rank's file in a folder, durably, one operation after the other. Raises OSError."""
        final = f"{folder}/{filenames.shard_file(self.rank)}"
        operations: list[Callable[[], None]] = [
            lambda: self._disk.write_file(final + filenames.PARTIAL, data, 0o600),
            lambda: self._disk.rename(final + filenames.PARTIAL, final),
            lambda: self._disk.sync_dir(folder),
            lambda: self._disk.sync_dir(above),
        ]
        for operation in operations:
            operation()
            yield

    def _remove(self, write: Write) -> Iterator[None]:
        for path in (write.final + filenames.PARTIAL, write.final):
            try:
                self._disk.unlink(path)
            except OSError:
                pass
            yield
        try:
            self._disk.remove_dir(write.folder)
        except OSError:
            pass


def _attempt_of(action: Action) -> AttemptId:
    if isinstance(action, Persist | Discard):
        return action.write.attempt
    assert isinstance(action, GiveUp | Retire)
    return action.attempt
