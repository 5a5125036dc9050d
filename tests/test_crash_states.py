# SPDX-License-Identifier: Apache-2.0
"""Power fails after any operation: the disk then always holds one committed step, never an older one than was said.

The whole log of real two-rank runs is cut at every entry. What the disk may hold then (any subset of what was not
flushed) is read by the engine's own code. Leaving out any one flush or rename must make that check fail.
"""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.crash import POLICIES, Story
from kit.crash_stories import MUTATIONS, STORIES, check_found, merge_at, sweep, three_reusing, two_bases, two_steps
from kit.mutant_env import Deferred, MutantEnv, Mutation, Recording
from kit.swept import Swept, Told

from layerwise_dist.capture import survey
from layerwise_dist.commit import opening, places
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.session import Committer
from layerwise_dist.engine.engine import LayerwiseEngine, workings_of
from layerwise_dist.errors import CommitError, DirectoryError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.frozen_file import BaseFile
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.storage.retention import unneeded_bases


@pytest.fixture(autouse=True)
def _bases_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LEAST_BASE_BYTES", 1)


@pytest.mark.parametrize("name", STORIES)
def test_after_power_loss_at_any_moment_there_is_one_committed_step(name: str, long: bool, told: Told) -> None:
    story = Story(testing.MemoryEnv())
    STORIES[name](story)
    swept = sweep(story, 200 if long else 3)
    told.crashes(f"a job, {name}", swept)
    assert swept.states > 7 * story.env.log_size


@pytest.mark.parametrize("name", STORIES)
def test_a_job_restarts_from_what_power_loss_left_and_saves_again(name: str, long: bool, told: Told) -> None:
    story = Story(testing.MemoryEnv())
    STORIES[name](story)
    draw, swept = random.Random(name), Swept()
    for _ in range(300 if long else 25):
        prefix, seed = draw.randrange(story.env.log_size + 1), draw.randrange(1 << 30)
        crashed = story.env.crash(prefix, seed, draw.choice([*POLICIES, "random", "random"]))
        swept.is_new(crashed)
        newest = story.check(crashed, story.promised(prefix))
        step = story.restart(crashed, go_on=True)
        if newest[1]:
            assert step == newest[1], (
                f"prefix {prefix}, seed {seed}: restored step {step}, the newest record is {newest}"
            )
    told.crashes(f"a job that starts again, {name}", swept)


NO_IDENTITY = Mutation("rename", "/ckpt/identity.json", "_into_place")
# Left out by tests of their own, below: these need a flush of an earlier session that failed, or end the start.
AT_STARTS = [Mutation("sync_dir", "*/step_*", "flush_records"), Mutation("sync_dir", "/ckpt", "begin"), NO_IDENTITY]


def test_each_flush_and_rename_has_a_mutation() -> None:
    """Of all that jobs do, roll-backs, reuse, bases and restarts among it."""
    calls, flushed = set[tuple[str, str, str]](), set[str]()
    for run in STORIES.values():
        env = Recording()
        run(Story(env))
        calls |= env.calls
        flushed |= env.flushed
    mutations = [mutation for _, mutation in MUTATIONS.values()]
    without = {call for call in calls if not any(each.is_of(*call) for each in [*mutations, *AT_STARTS])}
    assert not without, sorted(without)
    # A probe is a file that no session reads again.
    of_content = ["/ckpt/probe_*", *(each.pattern for each in mutations if each.operation == "sync")]
    assert not [path for path in flushed if not any(fnmatch.fnmatchcase(path, each) for each in of_content)]


def test_a_start_whose_identity_is_not_there_is_refused() -> None:
    env = MutantEnv(NO_IDENTITY)
    with pytest.raises(DirectoryError, match="identity.json, which was made for all ranks, is not there"):
        Story(env).session(1, 1)
    assert env.mutated == 1


@pytest.mark.parametrize("left_out", MUTATIONS)
def test_leaving_out_one_flush_or_rename_is_found(left_out: str) -> None:
    """The proof that the sweep can fail: each of these is needed, and the check sees it."""
    check_found(*MUTATIONS[left_out])


def retire_one_commit_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a manifest is said, and comes after the next commit."""
    withdraw, late = CheckpointMetadataManager.withdraw, []

    def one_commit_later(manager: CheckpointMetadataManager, attempt: AttemptId) -> None:
        late.append(attempt)
        if len(late) > 1:
            withdraw(manager, late.pop(0))

    monkeypatch.setattr(CheckpointMetadataManager, "withdraw", one_commit_later)


def test_announcing_what_is_retired_before_its_manifest_is_gone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    retire_one_commit_late(monkeypatch)
    story = Story(testing.MemoryEnv())
    three_reusing(story)
    with pytest.raises(AssertionError, match="^prefix"):
        sweep(story, 4)


def test_reporting_a_shard_before_the_base_that_it_refers_to_is_durable_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish, late = BaseFile.publish, []

    def early(file: BaseFile) -> BaseReport:
        file._env = Deferred(file._env)
        late.append(file._env)
        return publish(file)

    def after_the_commit(engine: LayerwiseEngine, step: int) -> None:
        if workings_of(engine).adapter.rank == 0:
            while late:
                late.pop().do()

    monkeypatch.setattr(BaseFile, "publish", early)
    story = Story(testing.MemoryEnv(), frozen=True)
    story.session(1, 2, at_step=after_the_commit)
    with pytest.raises(AssertionError, match="^prefix.*file is missing"):
        sweep(story, 4)


def test_removing_a_base_before_the_manifest_that_refers_to_it_is_gone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retire_one_commit_late(monkeypatch)
    story = Story(testing.MemoryEnv())
    two_bases(story)
    with pytest.raises(AssertionError, match="^prefix.*file is missing"):
        sweep(story, 4)


AT_START = pytest.mark.parametrize(
    "left_out",
    [None, Mutation("sync_dir", "*/step_*", "flush_records")],
    ids=["whole", "without the flush at the start"],
)


def swept(story: Story, seeds: int, left_out: Mutation | None) -> None:
    """The sweep finds nothing, or, with a flush left out, something."""
    if left_out is None:
        sweep(story, seeds)
    else:
        with pytest.raises(AssertionError, match="^prefix"):
            sweep(story, seeds)


@AT_START
def test_what_a_restart_reports_as_committed_survives_power_loss_even_if_the_first_job_could_not_flush_it(
    left_out: Mutation | None,
) -> None:
    """A job ends between the manifest's rename and its flush. The next one finds it and must flush it first."""
    env = MutantEnv(Mutation("sync_dir", "*/step_*2-*", "_into_place", forget=False))
    story = Story(env)
    with pytest.raises(CommitError):
        story.session(1, 3)
    assert env.mutated == 1
    env.mutation = left_out
    assert story.restart(env) == 2
    env.mark("committed 1 2")
    swept(story, 4, left_out)


@pytest.mark.parametrize("careless", [False, True], ids=["whole", "only what it makes is flushed"])
def test_a_directory_that_one_start_made_and_could_not_flush_is_flushed_by_the_next(
    careless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = MutantEnv(Mutation("sync_dir", "/", "make_dirs", forget=False))
    story = Story(env)
    with pytest.raises(DirectoryError):
        story.session(1, 1)
    env.mutation = None
    if careless:
        for module in (opening, places):
            monkeypatch.setattr(module, "make_dirs", lambda env, root, mode: env.stat(root))
    story.session(2, 1)
    if careless:
        with pytest.raises(AssertionError, match="^prefix.*owner is gone or torn"):
            sweep(story, 2)
    else:
        sweep(story, 2)


@AT_START
def test_a_checkpoint_is_not_removed_before_the_end_of_its_manifest_is_durable_even_over_a_restart(
    left_out: Mutation | None,
) -> None:
    """The flush between manifest and shards fails; the next start collects the shards: it must flush first."""
    env = MutantEnv(Mutation("sync_dir", "*/step_*1-*", "withdraw", forget=False))
    story = Story(env)
    story.session(1, 2, keep_last=1)
    assert env.mutated == 1
    env.mutation = left_out
    assert story.restart(env) == 2
    swept(story, 8, left_out)


@pytest.mark.parametrize("run", [two_steps, three_reusing, two_bases])
def test_leftovers_of_a_crash_are_gone_after_the_next_start(run: Callable[[Story], None]) -> None:
    story = Story(testing.MemoryEnv())
    run(story)
    for prefix in range(0, story.env.log_size + 1, 3 if run is two_steps else 7):
        crashed = story.env.crash(prefix, 0, "all")
        step = story.restart(crashed)
        folders = [name for name in crashed.list_dir("/ckpt") if name.startswith("step_")]
        assert len(folders) in ([step] if run is two_steps else [1, 2] if step else [0])
        assert not [name for name in crashed.list_dir("/ckpt") if name.startswith("spare_")]
        inventory = CheckpointMetadataManager(crashed, "/ckpt").inventory()
        assert set(inventory.bases) == {base for m in inventory.manifests.values() for base in m.bases}
        for folder in folders:
            assert crashed.list_dir(f"/ckpt/{folder}") == [
                "manifest.json",
                "rank_00000.safetensors",
                "rank_00001.safetensors",
            ]


@pytest.mark.parametrize(
    "left_out", [None, Mutation("sync_dir", "/ckpt", "begin")], ids=["whole", "without the owner's flush"]
)
def test_a_roll_back_that_a_restart_follows_stays_even_if_the_first_job_could_not_flush_it(
    left_out: Mutation | None,
) -> None:
    env = MutantEnv()
    story = Story(env)
    story.session(1, 2)
    env.mutation = Mutation("sync_dir", "/ckpt", "_into_place", forget=False)
    with pytest.raises((OSError, CommitError)):
        story.session(2, 2, restore=1)
    assert env.mutated == 1
    (branch,) = (name for name in env.list_dir("/ckpt") if name.startswith("branch_"))
    story.branches[int(branch[7:17])] = 2
    env.mutation = left_out
    assert story.restart(env) == 1
    env.mark("committed 2 0")
    swept(story, 4, left_out)


@pytest.mark.parametrize("careless", [None, "collect_leftovers", "retire"])
def test_a_base_stays_while_a_crash_may_bring_back_the_manifest_that_refers_to_it(
    monkeypatch: pytest.MonkeyPatch, careless: str | None
) -> None:
    """Neither the job that withdrew the manifest nor the start after it could flush that."""
    env = MutantEnv(Mutation("sync_dir", "*/step_*1-*", "withdraw", forget=False))
    story = Story(env, frozen=True)
    story.session(1, 2, keep_last=1, at_step=merge_at(1))
    assert env.mutated == 1
    env.mutation = Mutation("sync_dir", "*/step_*1-*", "flush_records", forget=False)
    if careless is not None:
        owner = Committer if careless == "retire" else CheckpointMetadataManager
        method = getattr(owner, careless)

        def and_bases(self: Any, *args: Any) -> None:
            method(self, *args)
            manager = getattr(self, "_manager", self)
            inventory = manager.inventory()
            for base in unneeded_bases(inventory.bases, inventory.manifests.values()):
                manager.remove_base(base)

        monkeypatch.setattr(owner, careless, and_bases)
    story.session(2, 3, keep_last=1)
    assert env.mutated == 2
    if careless is None:
        sweep(story, 1)
    else:
        with pytest.raises(AssertionError, match="^prefix.*file is missing"):
            sweep(story, 12)
