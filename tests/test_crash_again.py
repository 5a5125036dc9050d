# SPDX-License-Identifier: Apache-2.0
"""Power fails, a job starts on what is left, maybe with another number of ranks, and power fails again."""

from __future__ import annotations

import random
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.crash import POLICIES, Story, build, in_ranks, settings, tensors_of, train
from kit.crash_stories import place
from kit.crash_stories import reuse as reuse_for
from kit.drawing import drawn
from kit.shards import Tensors, differing
from kit.swept import Swept, Told

from layerwise_dist.capture import survey
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly


@pytest.fixture(autouse=True)
def _bases_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)


def reuse(story: Story) -> None:
    reuse_for(story, 4)


def branches(story: Story) -> None:
    story.session(1, 2, keep_last=2)
    story.session(2, 3, keep_last=2, restore=1)


def frozen(story: Story) -> None:
    story.frozen = True
    story.session(1, 3, keep_last=1)


STORIES = {story.__name__: story for story in (reuse, branches, frozen)}


def seeded() -> random.Random:
    """Which is said where a test fails."""
    seed = drawn(range(1 << 30), __name__)
    print(f"seed {seed}")
    return random.Random(seed)


def twice(story: Story, first: int, then: int, draw: random.Random) -> Swept:
    """Power fails at `first` moments, and at `then` of the job that starts on what is left, which are counted."""
    swept = Swept()
    for number in range(first):
        prefix, policy = draw.randrange(story.env.log_size + 1), draw.choice([*POLICIES, "random"])
        left = story.env.crash(prefix, draw.randrange(1 << 30), policy)
        step = story.check(left, story.promised(prefix))[1]
        again = Story(left, frozen=story.frozen, states=story.states, branches=dict(story.branches))
        again.published, again.compared = story.published, story.compared
        phase = 90
        for key in [key for key in story.states if key[0] == phase]:
            del story.states[key]
        again.session(phase, step + 2, keep_last=1)
        for _ in range(then):
            second, policy = draw.randrange(again.env.log_size + 1), draw.choice([*POLICIES, "random"])
            try:
                found = again.env.crash(second, draw.randrange(1 << 30), policy)
                promised, attached = max(again.promised(second), story.promised(prefix)), again.attached(second)
                if swept.is_new(found, number, promised, attached):
                    again.check(found, promised, attached)
            except AssertionError as error:
                where = f"prefix {prefix}, then {place(again, second)}, policy {policy}"
                raise AssertionError(f"{where}: {error}") from error
    return swept


@pytest.mark.parametrize("name", STORIES)
def test_power_that_fails_again_while_a_job_starts_on_what_is_left_takes_nothing_back(
    name: str, long: bool, told: Told
) -> None:
    story = Story(testing.MemoryEnv())
    STORIES[name](story)
    swept = twice(story, 200 if long else 4, 100 if long else 40, seeded())
    told.crashes(f"power fails again, {name}", swept)
    assert swept.states > 100


class Replicas:
    """Jobs of any number of ranks that hold the same, in one directory."""

    def __init__(self, env: Any) -> None:
        self.env, self.states, self.said = env, dict[int, Tensors](), [(0, 0)]

    def session(self, world: int, total: int) -> int:
        """Starts from what is there; returns from which step."""

        def run(transport: LocalTransport) -> int:
            model, optimizer = build(0, world)
            with assembly.assemble(
                model, optimizer, settings(keep_last=1), transport, self.env, state={"world": {"size": world}}
            ) as engine:
                step = engine.restore()
                if step:
                    wrong = differing(tensors_of(model, optimizer), self.states[step])
                    assert not wrong, f"{world} ranks restored step {step} with other contents: {wrong}"
                if transport.rank == 0:
                    self.said.append((self.env.log_size, step))
                for now in engine.steps(total):
                    train(model, optimizer, 0, 1, now)
                    self.states[now + 1] = tensors_of(model, optimizer)
                    if now > step:
                        engine.wait(now)
                    if transport.rank == 0:
                        self.said.append((self.env.log_size, now))
            if transport.rank == 0:
                self.said.append((self.env.log_size, total))
            return step

        return in_ranks(run, world=world)[0]

    def check(self, prefix: int, env: Any) -> int:
        """What power loss left is one committed step, not older than was said. Returns it."""
        said = max(step for at, step in self.said if at <= prefix)
        manager = CheckpointMetadataManager(env, "/ckpt")
        try:
            found = manager.inventory()
        except FileNotFoundError:
            assert said == 0
            return 0
        assert not found.damaged and found.lost is None
        lineage = found.lineage()
        step = lineage[0].step if lineage else 0
        assert step >= said, f"step {step} is the newest, {said} was said to be committed"
        return step


def test_a_job_of_other_ranks_starts_after_power_loss_and_loses_power_too(long: bool, told: Told) -> None:
    story, draw, swept = Replicas(testing.MemoryEnv()), seeded(), Swept()
    story.session(2, 3)
    for _ in range(60 if long else 3):
        prefix, policy = draw.randrange(story.env.log_size + 1), draw.choice([*POLICIES, "random"])
        left = story.env.crash(prefix, draw.randrange(1 << 30), policy)
        newest = story.check(prefix, left)
        swept.is_new(left)
        again = Replicas(left)
        again.states, again.said = dict(story.states), [(0, newest)]
        world = draw.choice([1, 3])
        assert again.session(world, newest + 1) == newest
        for _ in range(20):
            second = draw.randrange(left.log_size + 1)
            found = left.crash(second, draw.randrange(1 << 30), draw.choice([*POLICIES, "random"]))
            step = again.check(second, found)
            swept.is_new(found)
        third = Replicas(found)
        third.states, third.said = again.states, [(0, step)]
        assert third.session(2, step) == step
    told.crashes("power fails again, other ranks", swept)
