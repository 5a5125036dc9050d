# SPDX-License-Identifier: Apache-2.0
"""One operation of a job fails, and then power does: whatever the job made of its failure, the disk holds one committed
step, not an older one than was said.

Real two-rank jobs write through a FaultEnv into a MemoryEnv; with `--long` every operation of one fails in turn.
"""

from __future__ import annotations

import contextlib
import errno
import random
import re
from collections.abc import Callable
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.crash import POLICIES, Story
from kit.crash_stories import merge_at, sweep
from kit.drawing import SEED
from kit.mutant_env import WithEnv
from kit.swept import Swept, Told

from layerwise_dist.capture import survey
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.errors import LayerwiseError
from layerwise_dist.storage.adapter import ShardWrite


@pytest.fixture(autouse=True)
def _quick_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases of any size; and the step at which all ranks stop lies near."""
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)
    monkeypatch.setattr("layerwise_dist.commit.grants._GRANT_SECONDS", 0.01)


def goes_on(story: Story) -> None:
    """A restart, commits, retention, reuse."""
    story.session(2, 4, keep_last=1)


def rolls_back(story: Story) -> None:
    story.session(2, 3, keep_last=2, restore=1)


def writes_a_base(story: Story) -> None:
    story.session(2, 4, keep_last=1, at_step=merge_at(2))


JOBS = {job.__name__: job for job in (goes_on, rolls_back, writes_a_base)}


def prepared(job: Callable[[Story], None]) -> tuple[Story, int]:
    """A directory with two steps in it, and how many operations had been done by then."""
    memory = testing.MemoryEnv()
    story = Story(memory, faulty=testing.FaultEnv(memory), frozen=job is writes_a_base)
    story.session(1, 2, keep_last=2)
    return story, story.faulty.operations


def disturbed(job: Callable[[Story], None], index: int | None = None, **fault: Any) -> tuple[Story, int]:
    """The job after something fails in it, its operation `index` or what `fault` says. Where it begins in the log."""
    story, operations = prepared(job)
    begins = story.env.log_size
    story.faulty.fail(index=None if index is None else operations + index, **fault)
    with contextlib.suppress(LayerwiseError, OSError):  # as the configuration says; what it leaves is what counts
        job(story)
    story.faulty.clear()
    # A roll-back that is in doubt was not said; it may be there.
    for seq in CheckpointMetadataManager(story.env, story.root).inventory().branches:
        story.branches.setdefault(seq, 2)
    return story, begins


def crashed(story: Story, begins: int, states: int, draw: random.Random, swept: Swept, where: str) -> None:
    """Power fails at drawn moments of the job and of what it leaves in the background. A start goes on from one."""
    for number in range(states):
        prefix, policy = draw.randrange(begins, story.env.log_size + 1), draw.choice([*POLICIES, "random", "random"])
        prefix = story.env.log_size if number == 0 else prefix
        left = story.env.crash(prefix, draw.randrange(1 << 30), policy)
        promised, attached = story.promised(prefix), story.attached(prefix)
        try:
            if swept.is_new(left, where, promised, attached):
                newest = story.check(left, promised, attached)
                assert number or story.restart(left) == newest[1] or not newest[1]
        except AssertionError as error:
            raise AssertionError(f"{where}, then power after {prefix} operations, policy {policy}: {error}") from error


@pytest.mark.parametrize("name", JOBS)
def test_power_that_fails_after_any_operation_that_failed_takes_no_commit(name: str, long: bool, told: Told) -> None:
    job = JOBS[name]
    draw, swept = random.Random(f"{SEED} {name}"), Swept()
    story, before = prepared(job)
    job(story)
    count = story.faulty.operations - before
    indexes = range(count) if long else [draw.randrange(count)]
    for index in indexes:
        story, begins = disturbed(job, index, errno=draw.choice([errno.EIO, errno.ENOSPC]))
        where = f"operation {index} of {count} fails"
        crashed(story, begins, 40 if long else 8, draw, swept, where)
    told.crashes(f"{len(indexes)} operations fail, one a job, {name}", swept)


class Careless:
    """An Env that takes a flush of a directory that failed for done."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def sync_dir(self, path: str) -> None:
        with contextlib.suppress(OSError):
            self._env.sync_dir(path)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "it is"])
def test_a_shard_whose_flush_of_a_folder_failed_is_not_reported(
    careless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if careless:
        persist = ShardWrite.persist

        def carelessly(write: ShardWrite, timeout_s: float) -> Any:
            write._adapter = WithEnv(write._adapter, Careless(write._adapter.env))  # type: ignore[assignment]
            return persist(write, timeout_s)

        monkeypatch.setattr(ShardWrite, "persist", carelessly)
    # Of both ranks, since one's flush covers what the other made.
    story, begins = disturbed(goes_on, operation="sync_dir", path_pattern="*/step_0000000003-*", times=2)
    if careless:
        assert story.faulty.injected == 2
        log = [story.env.log_entry(number) for number in range(story.env.log_size)]
        committed = next(
            n for n, each in enumerate(log) if re.match("rename .*step_0000000003-.*/manifest.json$", each)
        )
        with pytest.raises(AssertionError, match="^prefix.*file is missing"):
            sweep(story, 60, committed + 1)
    else:
        assert story.faulty.injected > 0
        sweep(story, 1, begins)
