# SPDX-License-Identifier: Apache-2.0
"""One run of the model, and many: transition after transition, each drawn from all that can happen next."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from kit.commit_model.failures import Failures
from kit.commit_model.job import Job
from kit.commit_model.restoring import Choice, Restoring
from kit.commit_model.rules import Broken, Rules
from kit.commit_model.starting import start
from kit.commit_model.world import TICK, World


class Simulation:
    """One directory and the jobs that run in it, one after the other and, when one was stopped, at once."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self._rules = Rules(self.world)
        self.world.furnish(self._rules)
        self._jobs: list[Job] = []  # the newest three
        self._restoring: dict[Job, Restoring] = {}
        self._failures = Failures(self._jobs, self._rules, self.world)

    def step(self) -> None:
        """One transition. Raises Broken."""
        choices = list(self._choices())
        weights = list(itertools.accumulate(weight for weight, _, _ in choices))
        _, what, action = self.world.dice.choices(choices, cum_weights=weights)[0]
        self.world.trace.append(f"{self.world.now:.2f} {what}")
        self.world.count["transitions"] += 1
        action()

    def end(self) -> None:
        """Power fails, after which everything is checked once more. Raises Broken."""
        self._failures.power()

    def _choices(self) -> Iterator[Choice]:
        yield 1.0, "time", self._time
        for number, job in enumerate(self._jobs):
            if not job.frozen:
                for weight, what, action in self._of_job(job):
                    yield weight, f"job {number} {what}", action
        yield from self._failures.choices()
        current = self._jobs[-1].ranks if self._jobs and not self._jobs[-1].frozen else []
        if not any(rank.alive and not rank.over for rank in current):
            yield 2.0, "start", self._start

    def _of_job(self, job: Job) -> Iterator[Choice]:
        for rank in job.ranks:
            if not rank.alive or rank.stalled:
                continue
            number, name = rank.rank, f"rank {rank.rank}"
            if not rank.blocked:
                yield 1.0, f"{name} trains", lambda rank=rank: job.in_process(rank.rank, rank.train)
            if rank.has_work:
                yield 4.0, f"{name} writes", lambda rank=rank: job.in_process(rank.rank, rank.background)
            if rank.has_to_keep:
                yield 4.0, f"{name} keeps", lambda rank=rank: job.in_process(rank.rank, rank.keep)
            if job.network.down[number]:
                yield 2.0, f"{name} hears", lambda number=number: job.deliver_down(number)
        if job.coordinates:
            if job.has_output:
                weight = 0.5 if job.retires_next else 6.0
                yield weight, "coordinates", lambda: job.in_process(0, job.coordinate)
            for number, channel in enumerate(job.network.up):
                if channel:
                    what = f"reads {channel[0][1]['t']} of rank {number}"
                    yield 2.0, what, lambda number=number: job.deliver_up(number)
            for weight, what, action in self._restoring[job].choices():
                yield weight, what, lambda action=action: job.in_process(0, action)

    def _time(self) -> None:
        """It passes, and whatever is due by then happens."""
        until = self.world.now + self.world.dice.choice([0.01, 0.1, 0.5, TICK])
        live = [job for job in self._jobs if not job.frozen]
        for job in live:
            job.deliver_overdue(until)
        self.world.now = until
        for job in live:
            job.tick()

    def _start(self) -> None:
        """A job begins; what still lives of the last one is left to itself."""
        if self._jobs and not self._jobs[-1].frozen:
            for rank in self._jobs[-1].ranks:
                rank.over = True
            self._jobs[-1].kill(0)
            self.world.unlock()
        if (job := start(self._rules, self.world)) is not None:
            self._jobs[:] = [*self._jobs[-2:], job]
            self._restoring[job] = Restoring(job, self._rules, self.world)


def walk(seed: int, transitions: int, each: int = 800) -> Counter[str]:
    """That many transitions, in runs of `each`, from seeds that follow on `seed`. Raises Broken with the run's seed."""
    total: Counter[str] = Counter()
    for run in range(-(-transitions // each)):
        simulation = Simulation(seed + run)
        world = simulation.world
        try:
            for _ in range(each):
                simulation.step()
            simulation.end()
        except Broken as error:
            raise Broken(f"seed {world.seed}: {error}; the end of the run:\n  " + "\n  ".join(world.trace)) from error
        total += world.count
    return total
