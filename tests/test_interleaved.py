# SPDX-License-Identifier: Apache-2.0
"""A training, its retention, roll-backs, pins, copies and readers of every kind at work in one directory, in orders
that are drawn, and power failures in the middle of it.

A reader finds what was committed when it looked, or something newer, and never an error; what is held or pinned stays;
after power loss there is one committed step, never older than was said, and everything that was said to be kept.
"""

from __future__ import annotations

import bisect
import fnmatch
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import actors
from kit.actors import Play, Training, check_left, play
from kit.interleaving import GatedEnv, Scheduler
from kit.swept import Swept, Told

from layerwise_dist.commit import pruning, session
from layerwise_dist.commit.copying import CheckpointCopy, CopiedFile
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import make_dirs
from layerwise_dist.commit.session import Committer
from layerwise_dist.errors import DamageError
from layerwise_dist.interop import importing
from layerwise_dist.interop.gathered_state import Found, Imported
from layerwise_dist.storage import retention
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.removal import remove

POLICIES = ("none", "all", "names", "data", "random", "random")


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
    """A job starts on what power loss left, and loses power too: at any moment of that there is what it started from,
    or what it committed.
    """
    scheduler, truth = Scheduler(draw.randrange(1 << 30)), actors.Truth()
    truth.tags = dict(found.truth.tags)
    if taken is not None:
        truth.events.append(actors.Event(taken, said=True))
        env.mark("said 1")
    training = Training(scheduler, env, found.root, truth, random.Random(draw.random()), keep_last=1)
    with actors.on(scheduler, env):
        scheduler.spawn("training", lambda: training.run(2, roll_backs=False))
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


def explored(folder: str, seeds: range, states: int, again: int, **options: Any) -> tuple[Counter[str], int, Swept]:
    """How often each way to look was tried, turns, and states after power loss."""
    looks, turns, swept = Counter[str](), 0, Swept()
    for seed in seeds:
        found = play(seed, folder, GatedEnv, **options)
        looks.update(found.looks)
        turns += found.turns
        try:
            crashed(found, random.Random(seed), states, swept, again=again)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    return looks, turns, swept


@pytest.mark.parametrize("pruned", [False, True], ids=["a job goes on", "a job ends, and prune has the directory"])
def test_in_any_order_readers_find_what_is_committed_and_power_loss_leaves_it(
    folder: str, pruned: bool, long: bool, told: Told
) -> None:
    first, orders = random.randrange(1 << 30), 600 if long else 12
    looks, turns, swept = explored(
        folder, range(first, first + orders), 60 if long else 24, 6 if long else 2, pruned=pruned
    )
    what = "a job beside readers, then a prune" if pruned else "a job beside readers"
    told.crashes(f"{what}, {orders} orders, {turns:,} turns, {sum(looks.values()):,} looks", swept)
    assert set(looks) == {*actors.READING, *actors.KEEPING}


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


def sweep(found: Play, seeds: int) -> Swept:
    """Every prefix of the log, under each policy."""
    known: dict[Any, None] = {}
    swept, marks = Swept(), [index for index, _ in found.env.marks()]
    for prefix in range(found.env.log_size + 1):
        for policy in POLICIES[:4] + ("random",) * seeds:
            left = found.env.crash(prefix, 7919 * prefix + swept.states, policy)
            try:
                if swept.is_new(left, bisect.bisect_left(marks, prefix)):
                    check_left(found, left, prefix, known=known)
            except AssertionError as error:
                raise AssertionError(f"power loss after {prefix} operations, policy {policy}: {error}") from error
    return swept


def imported(folder: str, begins: Callable[[Any], None] = lambda env: None) -> Play:
    """Another tool's checkpoint becomes one of this directory. `begins` gets the Env just before."""
    scheduler = Scheduler(0)
    env, attempt = GatedEnv(scheduler), AttemptId(1, 1, 7)
    with actors.on(scheduler, env):
        begins(env)
        found = Imported("a test", step=7, tensors={"param/w": Found.of(actors.value(1))})
        importing.write(found, folder, importing.Wanted())
        env.mark("said 1")
    return Play(env, folder, actors.Truth([actors.Event(attempt)]), 0, {})


def copied(folder: str, begins: Callable[[Any], None] = lambda env: None) -> Play:
    """`layerwise cp`, of the only checkpoint of a directory. `begins` gets the Env just before."""
    scheduler = Scheduler(0)
    env, truth = GatedEnv(scheduler), actors.Truth()
    training = Training(scheduler, env, folder, truth, random.Random(0))
    with actors.on(scheduler, env):
        make_dirs(env, folder, 0o700)
        scheduler.spawn("training", lambda: training.run(1))
        scheduler.run()
        begins(env)
        actors.Reader(scheduler, env, folder, truth, random.Random(0)).run(1, ("cp",))
    return Play(env, folder, truth, 0, {})


MADE = pytest.mark.parametrize("made", [imported, copied], ids=lambda made: made.__name__)


@MADE
def test_an_import_and_a_copy_are_whole_or_not_there_after_power_loss(
    folder: str, made: Callable[..., Play], long: bool, told: Told
) -> None:
    found = made(folder)
    swept = sweep(found, 100 if long else 1)
    told.crashes(made.__name__, swept)
    assert swept.states > 4 * found.env.log_size


# Flushes and renames of these, by what is done and to what. Of a copy's, all lie in a directory of its own.
OF_IMPORT = [
    ("sync", "*/rank_00000.safetensors.partial"), ("rename", "*/rank_00000.safetensors"),
    ("sync_dir", "{root}/step_*"), ("sync_dir", "{root}"), ("sync", "*/manifest.json.tmp"),
    ("rename", "*/manifest.json"),
]  # fmt: skip
OF_COPY = [
    ("sync", "{root}.copy*/rank_00000.safetensors"), ("sync", "{root}.copy*/identity.json.tmp"),
    ("rename", "{root}.copy*/identity.json"), ("sync_dir", "{root}.copy*/step_*"), ("sync_dir", "{root}.copy*-1"),
    ("sync_dir", "{above}"), ("sync", "{root}.copy*/manifest.json.tmp"), ("rename", "{root}.copy*/manifest.json"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "operation", "pattern"),
    [*((imported, *each) for each in OF_IMPORT), *((copied, *each) for each in OF_COPY)],
)
def test_mutation_an_import_and_a_copy_without_one_of_their_flushes_are_found(
    folder: str, made: Callable[..., Play], operation: str, pattern: str
) -> None:
    envs: list[Any] = []

    def forgetful(env: Any) -> None:
        env.drop(operation, pattern.format(root=folder, above=os.path.dirname(folder)))
        envs.append(env)

    with pytest.raises((AssertionError, DamageError, OSError)):
        sweep(made(folder, forgetful), 8)
    assert envs[0].dropped > 0


def test_each_flush_and_rename_of_an_import_and_a_copy_has_a_mutation(folder: str) -> None:
    """The start of an import is that of a job."""
    for made, mutations, first in ((imported, OF_IMPORT, f"{folder}/step_"), (copied, OF_COPY, f"{folder}.copy")):
        found = made(folder)
        patterns = [(kind, text.format(root=folder, above=os.path.dirname(folder))) for kind, text in mutations]
        log = [found.env.log_entry(number).split() for number in range(found.env.log_size)]
        begins = next(number for number, entry in enumerate(log) if entry[1].startswith(first))
        done = {(kind, rest[-1]) for kind, *rest in log[begins:] if kind in ("sync", "sync_dir", "rename")}
        without = [
            (kind, path)
            for kind, path in sorted(done)
            if not any(kind == each and fnmatch.fnmatchcase(path, pattern) for each, pattern in patterns)
        ]
        assert not without, without


def shards_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, publish = CheckpointCopy._copy, CheckpointCopy.publish
    later: list[tuple[CopiedFile, Callable[[int], None]]] = []

    def first(self: CheckpointCopy) -> None:
        publish(self)
        for each in later:
            copy(self, *each)

    monkeypatch.setattr(CheckpointCopy, "_copy", lambda self, *file: later.append(file))
    monkeypatch.setattr(CheckpointCopy, "verify", lambda self, advance: None)
    monkeypatch.setattr(CheckpointCopy, "publish", first)


def test_mutation_a_copy_whose_manifest_comes_first_is_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep(copied(folder), 1).states
    shards_come_last(monkeypatch)
    with pytest.raises(AssertionError, match="power loss.*its shard is gone"):
        sweep(copied(folder), 1)


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
