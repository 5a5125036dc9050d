# SPDX-License-Identifier: Apache-2.0
"""Actors in one directory at the same time, and the check of what power loss leaves of what they did."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kit.actors import KEEPING, READING, Reader, Training, Truth, check_contents, on
from kit.interleaving import Scheduler
from kit.swept import Swept
from layerwise_dist import _native
from layerwise_dist.commit import pruning
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import make_dirs
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, DirectoryError, OwnerError
from layerwise_dist.storage.filenames import AttemptId

POLICIES = ("none", "all", "names", "data", "random", "random")


@dataclass
class Play:
    """One run of all of them, in an order that a seed draws."""

    env: Any
    root: str
    truth: Truth
    turns: int
    looks: dict[str, int]
    thrown_out: bool = False  # whether a job lost the directory to another


def play(
    seed: int, root: str, make_env: Callable[[Scheduler], Any], *, commits: int = 6, pruned: bool = False,
    rivals: bool = False,
) -> Play:  # fmt: skip
    """`root` is a directory that is there and empty; what is in it is in the Env. With `pruned`, the job ends in the
    middle, and `layerwise prune` has the directory. With `rivals`, that and another job try to have it all the while.
    """
    draw = random.Random(seed)
    scheduler = Scheduler(draw.randrange(1 << 30))
    env = make_env(scheduler)
    truth = Truth()
    keep_last, keep_tags = draw.choice([1, 1, 2]), draw.choice([None, 1])
    training = Training(
        scheduler, env, root, truth, random.Random(draw.random()), keep_last=3 if pruned or rivals else keep_last,
        keep_tags=keep_tags, spares=draw.choice([0, 1, 2]),
    )  # fmt: skip
    readers = [Reader(scheduler, env, root, truth, random.Random(draw.random())) for _ in range(3)]
    second = Training(scheduler, env, root, truth, random.Random(draw.random()), keep_last=3, keep_tags=keep_tags)
    thrown_out: list[str] = []

    def prune() -> None:
        if not rivals:
            scheduler.gate(lambda: training.over)
        for _ in range(3 if rivals else 1):
            try:
                work = pruning.Pruning(training.manager, pruning.Kept(1, None, None))
            except (DirectoryError, OwnerError):
                assert rivals, "nobody has it"
                continue  # a job does, or has not made it yet
            try:
                work.run(lambda manifest: None)
            except OwnerError:
                thrown_out.append("prune")
            finally:
                work.close()

    with on(scheduler, env):
        make_dirs(env, root, 0o700)
        begin = training.run_after_others if rivals else training.run
        scheduler.spawn("training", lambda: begin(commits))
        for number, reader in enumerate(readers):
            ways = READING if number < 2 else KEEPING
            scheduler.spawn(f"reader {number}", lambda reader=reader, ways=ways: reader.run(8, ways))
        if pruned or rivals:
            scheduler.spawn("prune", prune)
        if rivals:
            scheduler.spawn("second training", lambda: second.run_after_others(2, roll_backs=False))
        try:
            scheduler.run()
        except (AssertionError, Exception) as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    looks: dict[str, int] = {}
    for reader in readers:
        for way, count in reader.looks.items():
            looks[way] = looks.get(way, 0) + count
    lost = bool(thrown_out) or training.thrown_out or second.thrown_out
    return Play(env, root, truth, scheduler.turns, looks, lost)


def check_left(
    play: Play, env: Any, prefix: int, *, known: dict[Any, None] | None = None
) -> AttemptId | None:  # fmt: skip
    """What power loss after `prefix` operations left: asserts that it holds what had been promised, and nothing torn.

    Returns what a restore takes.
    """
    promised, pinned, free, copies = 0, set[str](), set[str](), list[tuple[str, int]]()
    for index, text in play.env.marks():
        if index >= prefix:
            break
        what, rest = text.split(" ", 1)
        if what == "said":
            promised = int(rest)
        elif what == "pinned":
            pinned.add(rest)
        elif what == "pinning":
            free.discard(rest)
        elif what == "unpinned":
            pinned.discard(rest)
        elif what == "free":
            free.add(rest)
        elif what == "copied":
            target, seq = rest.rsplit(" ", 1)
            copies.append((target, int(seq)))
    manager = CheckpointMetadataManager(env, play.root)
    try:
        found = manager.inventory()
    except FileNotFoundError:
        assert not promised, "the directory is gone"
        return None
    assert not found.damaged and found.lost is None, (found.damaged, found.lost)
    tags = play.truth.tags
    for manifest in found.manifests.values():
        _check_once(manager, manifest, known)
        assert manifest.tag == tags.get(manifest.attempt_id), f"{manifest.attempt_id.folder}: tag {manifest.tag}"
    tagged = any(event.target in tags for event in play.truth.events[:promised])
    assert not tagged or any(each.tag for each in found.manifests.values()), "what was said to be under a tag is gone"
    taken = found.lineage()[0].attempt_id if found.lineage() else None
    allowed: set[AttemptId | None] = {*play.truth.targets(promised), *(() if promised else (None,))}
    assert taken in allowed, f"a restore takes {taken}, of {allowed}; {promised} were said"
    committed = {manifest.attempt_id.folder: manifest.attempt_id for manifest in found.manifests.values()}
    for folder in pinned:
        assert folder in committed and manager.pinned(committed[folder]), f"{folder} was pinned"
    for folder in free.intersection(committed):
        assert not manager.pinned(committed[folder]), f"{folder} was said to be unpinned"
    for target, seq in copies:
        other = CheckpointMetadataManager(env, target)
        copied = other.inventory()
        assert list(copied.manifests) == [seq] and not copied.damaged, f"{target} was a checkpoint"
        assert copied.identity is not None, f"{target} was a checkpoint, and its identity is gone"
        _check_once(other, copied.manifests[seq], known)
    if found.manifests:
        try:
            manager.read_identity()
        except (FileNotFoundError, DamageError) as error:
            raise AssertionError(f"there are records, and the identity is gone: {error}") from error
    return taken


def _check_once(manager: CheckpointMetadataManager, manifest: Manifest, known: dict[Any, None] | None) -> None:
    """The same bytes are seen many times over."""
    try:
        key = (manifest.attempt, _native.xxh3_64(manager.env.read_file(manager.shard_path(manifest, 0), 1 << 20)))
    except FileNotFoundError:
        raise AssertionError(f"{manifest.attempt_id.folder} has a manifest, and its shard is gone") from None
    if known is None or key not in known:
        try:
            check_contents(manager, manifest)
        except DamageError as error:
            raise AssertionError(f"{manifest.attempt_id.folder}: {error}") from error
        if known is not None:
            known[key] = None


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
