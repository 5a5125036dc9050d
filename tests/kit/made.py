# SPDX-License-Identifier: Apache-2.0
"""What makes checkpoints outside a training loop, in a directory of an Env: an import, a copy, `dcp.save`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed.checkpoint as dcp

from kit.actors import Event, Reader, Training, Truth, on, value
from kit.crash import Story
from kit.interleaving import GatedEnv, Scheduler
from kit.plays import Play
from layerwise_dist.commit.copying import CheckpointCopy
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import make_dirs
from layerwise_dist.dcp import LayerwiseWriter
from layerwise_dist.interop import importing
from layerwise_dist.interop.gathered_state import Found, Imported
from layerwise_dist.storage.filenames import AttemptId

Begins = Callable[[Any], None]  # gets the Env just before


def imported(folder: str, begins: Begins = lambda env: None) -> Play:
    """Another tool's checkpoint becomes one of this directory."""
    scheduler = Scheduler(0)
    env, attempt = GatedEnv(scheduler), AttemptId(1, 1, 7)
    with on(scheduler, env):
        begins(env)
        found = Imported("a test", step=7, tensors={"param/w": Found.of(value(1))})
        importing.write(found, folder, importing.Wanted())
        env.mark("said 1")
    return Play(env, folder, Truth([Event(attempt)]), 0, {})


def copied(folder: str, begins: Begins = lambda env: None) -> Play:
    """`layerwise cp`, of the only checkpoint of a directory."""
    scheduler = Scheduler(0)
    env, truth = GatedEnv(scheduler), Truth()
    training = Training(scheduler, env, folder, truth, random.Random(0))
    with on(scheduler, env):
        make_dirs(env, folder, 0o700)
        scheduler.spawn("training", lambda: training.run(1))
        scheduler.run()
        begins(env)
        Reader(scheduler, env, folder, truth, random.Random(0)).run(1, ("cp",))
    return Play(env, folder, truth, 0, {})


def saved(folder: str, begins: Begins = lambda env: None) -> Play:
    """`dcp.save`, three times, the older ones of which go."""
    scheduler = Scheduler(0)
    env, truth = GatedEnv(scheduler), Truth()
    with on(scheduler, env):
        make_dirs(env, folder, 0o700)
        begins(env)
        for number in (1, 2, 3):
            truth.events.append(Event(AttemptId(number, number, number)))
            dcp.save({"w": value(number)}, storage_writer=LayerwiseWriter(folder, keep_last=1), no_dist=True)
            env.mark(f"said {number}")
    return Play(env, folder, truth, 0, {})


@dataclass
class CopiedStory:
    """A copy of two ranks' checkpoint with its frozen parameters. It is said when the log is `said` long."""

    story: Story
    begins: int
    said: int


def copied_with_bases(folder: str, left_out: tuple[str, str] | None = None) -> CopiedStory:
    """`left_out`: operation and pattern of what the copy does not do. REQUIRES: bases of any size may be made."""
    scheduler, target = Scheduler(0), f"{folder}.copy"
    env = GatedEnv(scheduler)
    story = Story(env, folder, frozen=True)
    story.session(1, 2)
    begins = env.log_size
    if left_out is not None:
        env.drop(*left_out)
    with on(scheduler, env):
        source = CheckpointMetadataManager(env, folder)
        with CheckpointCopy(source, source.inventory().lineage()[0], target) as copy:
            copy.write(lambda nbytes: None)
            copy.verify(lambda nbytes: None)
            copy.publish()
    there = Story(env, target, frozen=True, states=story.states)
    return CopiedStory(there, begins, env.log_size)


class NoLock:
    """As the lock of a directory, and keeps nobody out."""

    def __init__(self, env: GatedEnv, path: str, mode: int) -> None:
        self._env, self._path = env, path
        env.lock(path, mode).release()

    def read(self, cap: int) -> bytes:
        return self._env.read_file(self._path, cap)

    def write(self, data: bytes) -> None:
        real = self._env.lock(self._path)
        real.write(data)
        real.release()

    def held_path_is_mine(self) -> bool:
        return True

    def release(self) -> None:
        pass
