# SPDX-License-Identifier: Apache-2.0
"""A training, its retention, roll-backs, pins, copies and readers of every kind at work in one directory, in orders
that are drawn, and power failures in the middle of it.

A reader finds what was committed when it looked, or something newer, and never an error; what is held or pinned stays;
after power loss there is one committed step, never older than was said, and everything that was said to be kept.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kit import actors
from kit.actors import Training
from kit.interleaving import GatedEnv, Scheduler
from kit.made import NoLock, copied
from kit.plays import POLICIES, Play, check_left, play
from kit.swept import Swept, Told

from layerwise_dist.commit import owner, pruning, session
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.session import Committer
from layerwise_dist.storage import retention
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.removal import remove


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """It is there for whoever looks for it with the operating system's calls; what is in it is in memory."""
    path = tmp_path / "ckpt"
    path.mkdir()
    return str(path)


def crashed(found: Play, draw: random.Random, count: int, swept: Swept, *, again: int = 0) -> None:
    """Power fails at `count` moments, each with what a policy leaves. In `again` of them a job starts on that, and
    power fails once more.
    """
    known: dict[Any, None] = {}
    for number in range(count):
        prefix, policy = draw.randrange(found.env.log_size + 1), draw.choice(POLICIES)
        left = found.env.crash(prefix, draw.randrange(1 << 30), policy)
        swept.is_new(left)
        try:
            taken = check_left(found, left, prefix, known=known)
        except AssertionError as error:
            raise AssertionError(f"power loss after {prefix} operations, policy {policy}: {error}") from error
        if number < again:
            recovered(found, left, taken, draw, swept)


def recovered(found: Play, env: Any, taken: Any, draw: random.Random, swept: Swept) -> None:
    """A job starts on what power loss left, or a prune does, and loses power too. At any moment there is what it
    started from, or what it committed.
    """
    scheduler, truth = Scheduler(draw.randrange(1 << 30)), actors.Truth()
    if taken is not None:
        there = {each.attempt_id for each in CheckpointMetadataManager(env, found.root).inventory().manifests.values()}
        truth.tags = {attempt: tag for attempt, tag in found.truth.tags.items() if attempt in there}
        truth.events.append(actors.Event(taken, said=True))
        env.mark("said 1")
    training = Training(scheduler, env, found.root, truth, random.Random(draw.random()), keep_last=1)
    with actors.on(scheduler, env):
        if taken is not None and draw.random() < 0.3:
            pruned(training.manager)
        else:
            scheduler.spawn("training", lambda: training.run(2))
            scheduler.run()
    second = Play(env, found.root, truth, 0, {})
    known: dict[Any, None] = {}
    for _ in range(8):
        prefix, policy = draw.randrange(env.log_size + 1), draw.choice(POLICIES)
        left = env.crash(prefix, draw.randrange(1 << 30), policy)
        swept.is_new(left)
        try:
            check_left(second, left, prefix, known=known)
        except AssertionError as error:
            raise AssertionError(f"second power loss, after {prefix} operations, policy {policy}: {error}") from error


def pruned(manager: CheckpointMetadataManager) -> None:
    work = pruning.Pruning(manager, pruning.Kept(1, None, None))
    try:
        work.run(lambda manifest: None)
    finally:
        work.close()


class Explored(NamedTuple):
    """How often each way to look was tried, and in how many orders a job lost the directory to another."""

    looks: Counter[str]
    turns: int
    thrown_out: int
    swept: Swept


def explored(folder: str, seeds: range, states: int, again: int, **options: Any) -> Explored:
    looks, turns, thrown_out, swept = Counter[str](), 0, 0, Swept()
    for seed in seeds:
        found = play(seed, folder, GatedEnv, **options)
        looks.update(found.looks)
        turns += found.turns
        thrown_out += found.thrown_out
        try:
            crashed(found, random.Random(seed), states, swept, again=again)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    return Explored(looks, turns, thrown_out, swept)


BESIDE = {
    "readers beside a job": {},
    "readers beside a job, and a prune when it has ended": {"pruned": True},
    "readers beside a job, and a prune and a second job that want its directory": {"rivals": True},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_in_any_order_readers_find_what_is_committed_and_power_loss_leaves_it(
    folder: str, beside: str, long: bool, told: Told
) -> None:
    first, orders = random.randrange(1 << 30), 200 if long else 8
    seeds, states, again = range(first, first + orders), 60 if long else 24, 6 if long else 2
    looks, turns, thrown_out, swept = explored(folder, seeds, states, again, **BESIDE[beside])
    told.crashes(f"{beside}: {orders} orders, {turns:,} turns, {sum(looks.values()):,} looks", swept)
    assert set(looks) == {*actors.READING, *actors.KEEPING} and not thrown_out


def readers_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention does not ask who reads."""
    monkeypatch.setattr(CheckpointMetadataManager, "_hold_alone", lambda self, path: None)


def pins_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointMetadataManager, "pinned", lambda self, attempt: False)


def retention_goes_on_beside_a_roll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Committer, "hold", lambda self, held: None)


def tags_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    retired = retention.retired

    def of_no_tag(lineage: list[Any], family: list[Any], **kept: Any) -> list[int]:
        untagged = [[each.model_copy(update={"tag": None}) for each in some] for some in (lineage, family)]
        return retired(*untagged, **kept)

    monkeypatch.setattr(session, "retired", of_no_tag)
    monkeypatch.setattr(pruning, "retired", of_no_tag)


def shards_go_before_their_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    withdraw = CheckpointMetadataManager.withdraw

    def shards_first(self: CheckpointMetadataManager, attempt: Any, *, anyway: bool = False) -> None:
        remove(self.env, self.folder(attempt), ["rank_00000.safetensors"])
        withdraw(self, attempt, anyway=anyway)

    monkeypatch.setattr(CheckpointMetadataManager, "withdraw", shards_first)


@pytest.mark.parametrize(
    ("broken", "seed"),
    [
        (readers_hold_nothing, 12), (pins_are_not_looked_for, 15),
        (retention_goes_on_beside_a_roll_back, 2), (shards_go_before_their_manifest, 2), (tags_are_not_looked_for, 45),
    ],
)  # fmt: skip
def test_mutation_a_rule_between_actors_that_is_left_out_is_found(
    folder: str, broken: Callable[[pytest.MonkeyPatch], None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any seed finds it in the end; this one begins shortly before a run that does."""
    broken(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        explored(folder, range(seed, seed + 400), 12, 0)


def test_mutation_a_directory_without_a_lock_is_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second job, or a prune, takes what the first one writes for leftovers of a dead one. Most seeds find it."""
    monkeypatch.setattr(owner, "_take", lambda env, root, path, mode, *rest: NoLock(env, path, mode))
    with pytest.raises(AssertionError, match="seed .*(gone|No such file|File exists|another directory)"):
        explored(folder, range(1, 401), 12, 0, rivals=True)


def test_mutation_a_pin_that_is_not_flushed_is_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention of the next job would have what was said to be kept."""

    def pin(self: CheckpointMetadataManager, attempt: AttemptId) -> bool:
        self.env.write_file(self.pin_path(attempt), b"", 0o600)
        return True

    monkeypatch.setattr(CheckpointMetadataManager, "pin", pin)
    with pytest.raises(AssertionError, match="pinned"):
        explored(folder, range(400), 12, 0)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "what is there is not flushed"])
def test_who_is_told_that_it_is_pinned_already_can_rely_on_it(
    folder: str, careless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever pinned it before may have died between the file and its flush."""
    found = copied(folder)
    manager = CheckpointMetadataManager(found.env, folder)
    (manifest,) = manager.inventory().manifests.values()
    attempt = manifest.attempt_id
    found.env.write_file(manager.pin_path(attempt), b"", 0o600)
    if careless:
        pin = CheckpointMetadataManager.pin
        monkeypatch.setattr(
            CheckpointMetadataManager, "pin", lambda self, attempt: not self.pinned(attempt) and pin(self, attempt)
        )
    assert not manager.pin(attempt)
    left = CheckpointMetadataManager(found.env.crash(found.env.log_size, 0, "none"), folder)
    assert left.pinned(attempt) is not careless


def test_mutation_the_end_of_a_pin_that_is_not_flushed_is_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said to be free to go would stay for good."""

    def unpin(self: CheckpointMetadataManager, attempt: AttemptId) -> bool:
        self.env.unlink(self.pin_path(attempt))
        return True

    monkeypatch.setattr(CheckpointMetadataManager, "unpin", unpin)
    with pytest.raises(AssertionError, match="was said to be unpinned"):
        explored(folder, range(400), 12, 0)
