# SPDX-License-Identifier: Apache-2.0
"""The runs of one rehearsal, and its verdict: twice uninterrupted, once killed, once resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from layerwise_dist.errors import named
from layerwise_dist.rehearsal import reasons
from layerwise_dist.rehearsal.contents import Contents, Restless, compare, restless
from layerwise_dist.rehearsal.plan import Plan
from layerwise_dist.rehearsal.reasons import Reason
from layerwise_dist.rehearsal.running import Process, Run, RunFailed, Say, Start, run
from layerwise_dist.rehearsal.story import Divergence, divergences, first_of
from layerwise_dist.supervision.processes import undisturbed
from layerwise_dist.supervision.scratch import new_name

_HASH_SEED = "PYTHONHASHSEED"


class Unfit(Exception):
    """The given numbers do not fit the script."""


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    kind: "exact"; "differs", after a kill; "nondeterministic": without one too.
    step, rank: the first at which something differs; None where nothing does.
    where: what differs there: tensors, and members of the state.
    reason: the likeliest; None where nothing differs.
    restored: the step that the resumed run went on after; None if that was not come to.
    compared: steps whose checkpoints were compared.
    ranks: of the first run; a launcher may start fewer than was meant.
    notes: what differs between runs without effect, and the like.
    """

    kind: Literal["exact", "differs", "nondeterministic"]
    step: int | None = None
    rank: int | None = None
    where: list[str] = field(default_factory=list)
    reason: Reason | None = None
    restored: int | None = None
    compared: int = 0
    ranks: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """The first difference of two runs. `step` is that of the checkpoints, `divergence` of what led to it."""

    step: int
    contents: Contents
    divergence: Divergence | None

    @property
    def rank(self) -> int:
        if self.divergence is not None:
            return self.divergence.rank
        return self.contents.rank or 0


class Trial:
    """Runs `command` in the working directory; all that it makes itself is in a folder of its own below `directory`."""

    def __init__(
        self, command: Sequence[str], directory: str, *, steps: int, kill_at: int, timeout_s: float, say: Say,
        start: Start = Process,
    ) -> None:  # fmt: skip
        """`steps`: at whose end the runs end. `kill_at`: after which the second to last is killed, with one iteration
        more done that is lost. `timeout_s` seconds are each run's deadline. Raises Unfit.
        """
        if not 1 <= kill_at <= steps - 2:
            raise Unfit(
                f"kill at step {kill_at} of {steps}: it must be 1 or more, and leave two steps: one that the kill "
                "undoes, and one after it"
            )
        self._command, self._directory, self._start, self._say = list(command), directory, start, say
        self._steps, self._kill_at, self._timeout_s = steps, kill_at, timeout_s
        self._notes: list[str] = []
        self._compared = self._ranks = 0
        self._restless: set[str] = set()  # objects that differ between runs without effect

    def run(self, *, keep: bool = False) -> tuple[Verdict, str | None]:
        """The verdict, and where the runs' checkpoints and output are. They are kept, or removed, however it ends.

        Raises RunFailed where the first run does not do what is needed, Unfit where the script is over too early,
        OSError where the folder or the command can't be used.
        """
        parent = os.path.realpath(self._directory)
        folder = new_name(parent, "layerwise-rehearsal-")
        kept = str(folder) if keep else None
        try:
            folder.mkdir(mode=0o700)
            return replace(self._run(folder), ranks=self._ranks, notes=self._notes), kept
        except RunFailed as error:
            error.kept = kept
            raise
        except BaseException:
            if keep and folder.exists():
                self._say(f"kept: {folder}")
            raise
        finally:
            if not keep:
                with undisturbed():
                    shutil.rmtree(folder, ignore_errors=True)
                if folder.exists():
                    self._say(f"could not be removed: {folder}")

    def _run(self, folder: Path) -> Verdict:
        first = self._once(folder, "first", "1")
        self._ranks = first.story.size
        if not first.story.newest >= self._kill_at + 2:
            raise Unfit(
                f"the script ended on its own after step {first.story.newest}: it must run for two steps after "
                f"--kill-at {self._kill_at}"
            )
        second = self._once(folder, "second", "2")
        last = min(first.story.newest, second.story.newest)
        effectless: set[str] = set()
        apart = self._first_difference(first, second, range(1, last + 1), effectless)
        if apart is not None and apart.step <= self._kill_at + 1:
            return self._unsteady(folder, first, apart)
        without = restless(effectless)
        if effectless:
            self._notes.append(f"differs between runs, without effect: {named(sorted(effectless), 5)}")
        if apart is not None:
            last = apart.step - 1
            self._notes.append(f"two uninterrupted runs differ from step {apart.step} on: compared up to {last}")
        killed = self._once(folder, "killed", "3", kill=True)
        restored = killed.story.committed
        if restored is None:
            raise RunFailed(
                f"the killed run ended at step {killed.story.newest} before a checkpoint of step {self._kill_at} or a "
                "later one was committed and another iteration was over", attached=True,
            )  # fmt: skip
        before = self._first_difference(first, killed, [restored], set(), without)
        if before is not None:
            return self._unsteady(folder, first, before)
        return self._resumed(folder, first, restored, last, without)

    def _resumed(self, folder: Path, first: Run, restored: int, last: int, without: Restless) -> Verdict:
        try:
            resumed = self._once(folder, "resumed", "4", again="killed")
        except RunFailed as error:
            why = "" if error.attached else " before attach()"
            return self._differs(restored, Reason("restart", f"the second start fails{why}: {error}", "see its output"))
        if set(resumed.story.directories).isdisjoint(first.story.directories):
            dirs = f"{resumed.story.directories[:1]} in place of {first.story.directories[:1]}"
            return self._differs(
                restored,
                Reason("directory", f"the second start saves elsewhere: {dirs}", "give each start the same dir"),
            )
        begun = resumed.story.begun_at
        if begun != restored + 1:
            begins = f"its first step is {begun}" if begun else "it takes no step"
            return self._differs(
                restored, Reason(
                    "not-resumed", f"the second start does not continue after step {restored}: {begins}",
                    "call restore() before the first step, without fresh=True, and count from what it returns",
                ),
            )  # fmt: skip
        steps = range(restored + 1, min(last, resumed.story.newest) + 1)
        found = self._first_difference(first, resumed, steps, set(), without, objects=True)
        short = resumed.story.newest < min(last, first.story.newest)
        if found is None and short:
            why = f"the resumed run ended after step {resumed.story.newest}, the first one continued to step {last}"
            return self._differs(resumed.story.newest, Reason("short", why, "count steps from what restore() returns"))
        if found is None:
            return Verdict("exact", restored=restored, compared=self._compared)
        rank = resumed.story.ranks[found.rank]
        reason = reasons.of_resume(found.divergence, found.contents, rank, restored=restored)
        step = found.step if found.divergence is None else min(found.step, found.divergence.step)
        return Verdict(
            "differs", step, found.rank, _where(found), reason, restored, self._compared
        )  # fmt: skip

    def _differs(self, restored: int, reason: Reason) -> Verdict:
        return Verdict("differs", restored + 1, None, [], reason, restored, self._compared)

    # -- inside -------------------------------------------------------------------------------------------------

    def _once(self, folder: Path, name: str, hash_seed: str, *, kill: bool = False, again: str | None = None) -> Run:
        """One run, with checkpoints in a folder of its own, or `again` in another run's."""
        checkpoints, told = folder / (again or name), folder / f"{name}-told"
        checkpoints.mkdir(exist_ok=again is not None)
        told.mkdir()
        plan = Plan(
            checkpoints=str(checkpoints), told=str(told), every=self._kill_at if kill else 1, stop_at=self._steps,
            kill_after=self._kill_at if kill else None, timeout_s=self._timeout_s,
        )  # fmt: skip
        # Each its own, so that what depends on the order of a set shows; the same ones in each rehearsal.
        environment = {} if _HASH_SEED in os.environ else {_HASH_SEED: hash_seed}
        self._say(f"{name} run starts")
        return run(
            name, plan, self._command, folder, environment, start=self._start, say=self._say, limit_s=self._timeout_s
        )

    def _first_difference(
        self, one: Run, other: Run, steps: Iterable[int], effectless: set[str], without: Restless = lambda path: False,
        *, objects: bool = False,
    ) -> Found | None:  # fmt: skip
        """Without `objects` two starts are compared, and what differs without an effect goes into `effectless`. With
        them the states of the script's variables count too.
        """
        early: Divergence | None = None
        for step in steps:
            there = divergences(one.story, other.story, step, self._restless if objects else frozenset())
            early = early or first_of(there, objects=objects)
            contents = self._compare(one, other, step).without(without)
            if not objects:
                effectless |= contents.effectless
                contents = contents.without(contents.effectless.__contains__)
            if not contents.same:
                return Found(step, contents, early or next(iter(there), None))
            if objects and early is not None and early.objects:
                return Found(step, contents, early)
            if not objects:
                self._restless |= {name for each in there for name in each.objects}
        return None

    def _compare(self, one: Run, other: Run, step: int) -> Contents:
        """In every directory that both runs saved in."""
        self._compared += 1
        tensors: dict[str, str] = {}
        sealed: dict[int, list[str]] = {}
        missing = None
        for directory in one.story.directories:
            if directory in other.story.directories:
                found = compare(one.place(directory), other.place(directory), step, (one.name, other.name))
                tensors |= found.tensors
                missing = missing or found.missing
                for rank, paths in found.sealed.items():
                    sealed.setdefault(rank, []).extend(paths)
        return Contents(tensors, sealed, missing)

    def _unsteady(self, folder: Path, first: Run, apart: Found) -> Verdict:
        """Two starts differ. Whether they do so by the hashes of texts is tried out."""
        by_hash_order = False
        if _HASH_SEED not in os.environ:
            self._say("two uninterrupted runs differ: running again with the first one's PYTHONHASHSEED")
            again = self._once(folder, "again", "1")
            by_hash_order = self._first_difference(first, again, [apart.step], set()) is None
        step = apart.step if apart.divergence is None else min(apart.step, apart.divergence.step)
        reason = reasons.of_starts(apart.divergence, apart.contents, first_step=step == 1, by_hash_order=by_hash_order)
        return Verdict(
            "nondeterministic", step, apart.rank, _where(apart), reason, None, self._compared
        )  # fmt: skip


def _where(found: Found) -> list[str]:
    """What a checkpoint of that step has otherwise, or if that is nothing, the variables."""
    names = found.contents.names()
    if not names and found.divergence is not None:
        names = [f"rank {found.divergence.rank}: {name}" for name in found.divergence.objects]
    return names
