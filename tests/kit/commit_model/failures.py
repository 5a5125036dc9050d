# SPDX-License-Identifier: Apache-2.0
"""What breaks: disks, processes, connections, power."""

from __future__ import annotations

import errno

from kit.commit_model.job import Job
from kit.commit_model.restoring import Choice
from kit.commit_model.rules import Rules
from kit.commit_model.world import World

_POLICIES = ("none", "all", "names", "data", "random")  # of what was not flushed


class Failures:
    """`jobs` are those that there are, the newest last; a power failure ends them."""

    def __init__(self, jobs: list[Job], rules: Rules, world: World) -> None:
        self._jobs, self._rules, self._world, self._dice = jobs, rules, world, world.dice

    def choices(self) -> list[Choice]:
        found: list[Choice] = [
            (0.12, "fault", self._fault),
            (0.02, "kill", self._kill),
            (0.02, "sever", self._sever),
            (0.03, "orphan", self._orphan),
            (0.03, "stop", self._stop),
            (0.015, "power", self.power),
            (0.015, "end all", self._end_all),
            (0.1, "ask", self._ask),
            (0.03, "stall", self._stall),
        ]
        if any(job.frozen for job in self._jobs):
            found.append((0.15, "wake", self._wake))
        if any(rank.stalled for job in self._jobs for rank in job.ranks):
            found.append((0.08, "go on", self._go_on))
        return found

    def power(self) -> None:
        """In all nodes, or in one: its disk comes back with what was flushed and parts of the rest; ranks are gone."""
        dice, places = self._dice, self._world.places
        everywhere = dice.random() < 0.7 or len(places) == 1
        struck = range(len(places)) if everywhere else [dice.randrange(len(places))]
        for place in struck:
            for job in self._jobs:
                for rank in places[place]:
                    job.kill(rank)
            policy = dice.choice(_POLICIES)
            self._world.trace.append(f"what is left in {place}: {policy}")
            self._world.disks[place].lose_power(dice.randrange(1 << 30), policy)
        if everywhere:
            self._jobs.clear()
        self._world.count["power"] += 1
        self._rules.check()
        self._rules.history.forget_above(self._rules.newest_record())

    def _fault(self) -> None:
        dice = self._dice
        disk = dice.choice(self._world.disks)
        if dice.random() < 0.1:
            disk.doubts = True
            return
        kind = dice.choice(["sync_dir"] * 2 + ["write", "rename", "unlink", "make_dir", "read", "list_dir", ""])
        disk.fault = (dice.randrange(8), kind, dice.choice([errno.EIO, errno.ENOSPC]))

    def _living(self) -> list[tuple[Job, int]]:
        return [(job, rank.rank) for job in self._jobs if not job.frozen for rank in job.ranks if rank.alive]

    def _kill(self) -> None:
        """One process, now or within the next operations of a disk, whoever does them."""
        if self._dice.random() < 0.5:
            self._dice.choice(self._world.disks).fuse = self._dice.randrange(12)
        elif living := self._living():
            job, rank = self._dice.choice(living)
            job.kill(rank)

    def _ask(self) -> None:
        """No failure: a rank wants all to save, or to save and leave, as one that is told to end does."""
        if living := self._living():
            job, rank = self._dice.choice(living)
            if not job.ranks[rank].over:
                job.ranks[rank].ask(leave=self._dice.random() < 0.2)
                self._world.count["ask"] += 1

    def _stall(self) -> None:
        """SIGSTOP to one rank; rank 0's would stop its coordinator too, which stopping the whole job does."""
        if living := [(job, rank) for job, rank in self._living() if rank]:
            job, rank = self._dice.choice(living)
            job.ranks[rank].stalled = True
            self._world.count["stall"] += 1

    def _go_on(self) -> None:
        for job in self._jobs:
            job.go_on()

    def _sever(self) -> None:
        if living := self._living():
            job, rank = self._dice.choice(living)
            if rank:  # rank 0 has its coordinator within
                job.sever(rank)
                self._world.count["sever"] += 1

    def _orphan(self) -> None:
        if self._jobs and not self._jobs[-1].frozen:
            self._jobs[-1].orphan(everywhere=self._dice.random() < 0.5)

    def _stop(self) -> None:
        """SIGSTOP to a whole job, whose lock is then lost: a new one may begin beside it."""
        if self._jobs and not self._jobs[-1].frozen:
            self._jobs[-1].frozen = True
            self._world.unlock()
            self._world.count["stop"] += 1

    def _wake(self) -> None:
        self._dice.choice([job for job in self._jobs if job.frozen]).thaw()
        self._world.count["wake"] += 1

    def _end_all(self) -> None:
        """As an agent ends the rest of a job in which a rank died; often some survive a while, without their rank 0."""
        for job in self._jobs:
            for rank in job.ranks:
                if rank.alive and (rank.rank == 0 or self._dice.random() < 0.7):
                    job.kill(rank.rank)
        self._world.unlock()
