# SPDX-License-Identifier: Apache-2.0
"""One session: its ranks, and the real `Coordinator` with the real `Committer` in rank 0's process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kit.commit_model.disk import Killed
from kit.commit_model.history import Course
from kit.commit_model.network import Network
from kit.commit_model.rank import Rank, Script
from kit.commit_model.rules import Rules
from kit.commit_model.world import TIMEOUT, World
from layerwise_dist.commit import coordinator_thread
from layerwise_dist.commit.coordinator import Announce, Coordinator, Output, RetireOld
from layerwise_dist.commit.keeper import HEARS
from layerwise_dist.commit.opening import SessionInfo
from layerwise_dist.commit.session import Committer
from layerwise_dist.commit.transports import Message
from layerwise_dist.errors import OwnerError
from layerwise_dist.storage.filenames import AttemptId


class WatchedCommitter:
    """The committer, and what is counted of it."""

    def __init__(self, committer: Committer, course: Course, rules: Rules, world: World) -> None:
        self._committer, self._course, self._rules, self._count = committer, course, rules, world.count

    def compose(self, seq: int, step: int, reports: list[Message]) -> str:
        return self._committer.compose(seq, step, reports)

    def commit(self, seq: int, step: int, reports: list[Message]) -> None:
        try:
            self._committer.commit(seq, step, reports)
        except (OSError, OwnerError) as error:
            self._count[f"commit: {type(error).__name__}"] += 1
            raise
        self._count["commit"] += 1
        self._course.chain.append(seq)

    def retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        try:
            self._committer.retire(withdrawn)
        except (OSError, OwnerError) as error:
            self._count[f"retire: {type(error).__name__}"] += 1
            raise
        finally:
            self._rules.retained(self._course)

    def collect_old(self, attempt: AttemptId) -> None:
        self._committer.collect_old(attempt)

    def unneeded(self) -> list[str]:
        return self._committer.unneeded()

    def remove_bases(self, bases: list[str]) -> None:
        self._committer.remove_bases(bases)

    def close(self) -> None:
        self._committer.close()


class Job:
    """What it does next is chosen from outside; here is what each choice does."""

    def __init__(
        self, info: SessionInfo, committer: Committer, course: Course, start: int, branched: bool, *, rules: Rules,
        world: World,
    ) -> None:  # fmt: skip
        dice = world.dice
        self.course, self.committer = course, committer
        self._world, self._rules = world, rules
        self.script = Script(
            start, info.first_seq + branched, every=dice.choice([1, 1, 2]), max_in_flight=dice.choice([1, 2, 3]),
            skips_when_full=dice.random() < 0.3,
        )  # fmt: skip
        self.network = Network(world, tells_gone=dice.random() < 0.7)
        self._coordinator = Coordinator(
            world.world_size, timeout_s=TIMEOUT, on_failure=dice.choice(["warn", "warn", "raise"]), raise_after=4,
            now=world.now, keepers=[place[0] for place in info.places[1:]],
        )  # fmt: skip
        self._committer = WatchedCommitter(committer, course, rules, world)
        self._outputs: deque[Output] = deque()  # what the coordinator said is to be done
        self.ranks = [Rank(rank, self.script, course, self.network, rules, world) for rank in range(world.world_size)]
        self.frozen = False  # all of it is stopped

    @property
    def coordinates(self) -> bool:
        return self.ranks[0].alive and not self.frozen

    def in_process(self, rank: int, action: Callable[[], None]) -> None:
        """Done by that rank's process, which the disk may kill in the middle of it."""
        try:
            action()
        except Killed:
            self._world.trace.append(f"rank {rank} dies in it")
            self.kill(rank)

    # -- messages

    def deliver_up(self, rank: int) -> None:
        """The coordinator reads the oldest message of that rank, after all that it still has to do."""
        self.finish()
        if self.network.up[rank]:  # it may have died over what it had to do
            message = self.network.up[rank].popleft()[1]
            self._outputs.extend(self._coordinator.handle(message, self._world.now))

    def deliver_down(self, number: int) -> None:
        message, rank = self.network.down[number].popleft()[1], self.ranks[number]
        if message["t"] in HEARS and rank.keeper is not None:
            rank.told_to_keep(message)
        rank.receive(message)

    def deliver_overdue(self, until: float) -> None:
        """What no message may be late for by then: nothing is under way for longer than DELAY."""
        for number, when in list(self.network.cut.items()):
            if when <= until and self.ranks[number].ledger.lost is None:
                self.ranks[number].ledger.lose("the connection is gone")
                self._world.count["lost"] += 1
        for number in range(len(self.ranks)):
            while self.coordinates and self.network.sent_up_by(number, until):
                self.deliver_up(number)
        self.finish()
        for number, rank in enumerate(self.ranks):
            while self.network.sent_down_by(number, until):
                if not rank.alive:
                    self.network.down[number].clear()
                if not rank.alive or rank.stalled:
                    break
                self.deliver_down(number)

    # -- the coordinator's thread

    @property
    def has_output(self) -> bool:
        """Whether the coordinator said something that is not done yet."""
        return bool(self._outputs)

    @property
    def retires_next(self) -> bool:
        """Whether the next of that is to remove old checkpoints, which takes long: ranks may be told before it ends."""
        return self.has_output and isinstance(self._outputs[0], RetireOld)

    def coordinate(self) -> None:
        """One thing that the coordinator said is to be done."""
        output = self._outputs.popleft()
        if isinstance(output, Announce):
            self._rules.announced(self.course, output.message)
        more = coordinator_thread.perform(self._coordinator, self._committer, self.network.announce, output)
        self._outputs.extendleft(reversed(more))

    def finish(self) -> None:
        while self._outputs and self.coordinates:
            self.in_process(0, self.coordinate)

    def tick(self) -> None:
        """Time has passed."""
        self.finish()
        if self.coordinates:
            self._outputs.extend(self._coordinator.tick(self._world.now))
            self.finish()
        for rank in self.ranks:
            rank.check_in_time()

    # -- what breaks

    def sever(self, rank: int) -> None:
        """Its connection ends."""
        self.network.sever(rank)
        if not self.ranks[rank].over:
            self.network.say_gone(rank)

    def kill(self, number: int) -> None:
        rank = self.ranks[number]
        if rank.alive and not rank.over:
            self.network.say_gone(number)
        rank.alive = False
        if number == 0:
            self._outputs.clear()
            self.network.end()
        self._world.count["kill rank 0" if number == 0 else "kill"] += 1

    def orphan(self, *, everywhere: bool) -> None:
        """SIGKILL to one training process, or to all: their monitors are left."""
        ranks = [rank for rank in self.ranks if rank.alive and not rank.over and not rank.orphaned]
        for rank in ranks if everywhere else ranks[:1]:
            rank.bereave()
            self._world.count["orphan"] += 1

    def thaw(self) -> None:
        """It was stopped, and goes on; a rank that was stopped alone does not."""
        self.frozen = False
        for rank in self.ranks:
            rank.count_from_now()
        self.network.wake()

    def go_on(self) -> None:
        """Its ranks that were stopped alone do."""
        for number, rank in enumerate(self.ranks):
            if rank.stalled:
                rank.wake()
                self.network.wake_rank(number)
