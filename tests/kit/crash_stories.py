# SPDX-License-Identifier: Apache-2.0
"""Jobs that lose power after any operation, the check of what is left then, and the flushes and renames of theirs that
are left out on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kit.crash import POLICIES, Story
from kit.mutant_env import MutantEnv, Mutation
from kit.swept import Swept
from layerwise_dist.engine.engine import LayerwiseEngine, workings_of

SMALL = {"queue_depth": 2, "block_kb": 32}


def two_steps(story: Story) -> None:
    story.session(1, 2)


def in_flight(story: Story) -> None:
    story.session(1, 5, waiting=False, keep_last=2, max_in_flight=2)


def retention(story: Story) -> None:
    story.session(1, 3, keep_last=1, writer={**SMALL, "recycle": False})


def reuse(story: Story, steps: int = 6) -> None:
    """From step 3 on each shard is written over one that was retired."""
    story.session(1, steps, keep_last=1, spares_from=2, writer=SMALL)


def branches(story: Story) -> None:
    """Three steps, a restart, a roll-back to step 2 with two more, and a fresh start beside them."""
    story.session(1, 2, keep_last=2)
    story.session(2, 3, keep_last=2)
    story.session(3, 4, keep_last=2, restore=2)
    story.session(4, 1, keep_last=2, fresh=True)


def frozen(story: Story, last: int = 4) -> None:
    """A base; a change of what is in it, and so another one; retention; a restart that goes on with it; a roll-back."""
    story.frozen = True
    story.session(1, 3, keep_last=1, at_step=merge_at(1))
    if last > 3:
        story.session(2, last, keep_last=2)
        story.session(3, last, keep_last=2, restore=3, at_step=merge_at(3))


def merge_at(wanted: int) -> Callable[[LayerwiseEngine, int], None]:
    def merge(engine: LayerwiseEngine, step: int) -> None:
        if step == wanted:
            with torch.no_grad():
                workings_of(engine).framework.root[2].weight.add_(0.5)

    return merge


def captured_again(story: Story) -> None:
    """Each shard is begun twice: state moves after the attempt was opened. The last one takes up a retired file."""
    story.session(1, 3, keep_last=1, spares_from=2, writer=SMALL, at_step=move_state)


def move_state(engine: LayerwiseEngine, step: int) -> None:
    def move(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].clone()

    if step == 0:
        workings_of(engine).optimizer.optimizers[0].register_step_post_hook(move)


def shrinking(story: Story) -> None:
    """From the third on shards are shorter: the optimizer keeps nothing any more. The fourth is written over a longer
    one.
    """

    def forget(engine: LayerwiseEngine, step: int) -> None:
        if step == 2:
            (optimizer,) = workings_of(engine).optimizer.optimizers
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["momentum"] = 0.0

    story.session(1, 4, keep_last=1, spares_from=2, writer=SMALL, at_step=forget)


def one_branch(story: Story) -> None:
    story.session(1, 1)
    story.session(2, 2, restore=1)


def one_retired(story: Story) -> None:
    story.session(1, 2, keep_last=1)


def three_reusing(story: Story) -> None:
    reuse(story, 3)


def two_bases(story: Story) -> None:
    frozen(story, 3)


def base_of_one_rank(story: Story) -> None:
    story.frozen, story.frozen_ranks = True, (1,)
    story.session(1, 2)


STORIES = {
    story.__name__: story for story in (two_steps, in_flight, retention, reuse, branches, frozen, captured_again)
}


def place(story: Story, prefix: int) -> str:
    """Of a log, in words."""
    return f"prefix {prefix} (after {story.env.log_entry(prefix - 1) if prefix else 'nothing'})"


def sweep(story: Story, seeds: int, begins: int = 0) -> Swept:
    """Every prefix of the log from `begins` on, under each policy and `seeds` random draws."""
    swept = Swept()
    for prefix in range(begins, story.env.log_size + 1):
        promised, attached = story.promised(prefix), story.attached(prefix)
        cases = [(policy, 0) for policy in POLICIES] + [("random", 7919 * prefix + seed) for seed in range(seeds)]
        for policy, seed in cases:
            try:
                left = story.env.crash(prefix, seed, policy)
                if swept.is_new(left, promised, attached):
                    story.check(left, promised, attached)
            except AssertionError as error:
                raise AssertionError(f"{place(story, prefix)}, policy {policy}, seed {seed}: {error}") from error
    return swept


def check_found(run: Callable[[Story], None], mutation: Mutation) -> None:
    """With the mutation, what `run` tells breaks a promise after some power loss, and the sweep sees it."""
    env = MutantEnv(mutation)
    story = Story(env)
    run(story)
    assert env.mutated > 0
    with pytest.raises(AssertionError, match="^prefix"):
        sweep(story, 12)


MUTATIONS = {
    "sync of the shards": (two_steps, Mutation("sync", "*/rank_*.partial")),
    "sync of rank 1's shard alone": (two_steps, Mutation("sync", "*/rank_00001*.partial")),
    "rename of the shards": (two_steps, Mutation("rename", "*/rank_*.safetensors", "persist")),
    "rename of rank 1's shard alone": (two_steps, Mutation("rename", "*/rank_00001.safetensors", "persist")),
    "sync_dir of the attempt's folder after the shards": (two_steps, Mutation("sync_dir", "*/step_*", "persist")),
    "sync_dir of the root after the shards": (two_steps, Mutation("sync_dir", "/ckpt", "persist")),
    "sync of the manifest": (two_steps, Mutation("sync", "*/manifest.json.tmp")),
    "rename of the manifest": (two_steps, Mutation("rename", "*/manifest.json", "_into_place")),
    "sync_dir of the folder after the manifest": (two_steps, Mutation("sync_dir", "*/step_*", "_into_place")),
    "sync of the branch record": (one_branch, Mutation("sync", "*/branch_*")),
    "rename of the branch record": (one_branch, Mutation("rename", "*/branch_*.json", "_into_place")),
    "sync_dir of the root after the branch record": (one_branch, Mutation("sync_dir", "/ckpt", "_into_place")),
    "sync_dir after a retired manifest": (one_retired, Mutation("sync_dir", "*/step_*", "withdraw")),
    "sync_dir after a retired manifest whose shards are reused": (
        three_reusing,
        Mutation("sync_dir", "*/step_*", "withdraw"),
    ),
    "blanking of a retired header": (three_reusing, Mutation("write", "/ckpt/spare_*")),
    "sync of a blanked header": (three_reusing, Mutation("sync", "/ckpt/spare_*")),
    "sync of a shard in a reused file": (three_reusing, Mutation("sync", "*/step_0000000003*/rank_*.partial")),
    "sync of a base": (two_bases, Mutation("sync", "/ckpt/base/*.partial")),
    "rename of a base": (two_bases, Mutation("rename", "/ckpt/base/*", "publish")),
    "sync_dir of a base's folder": (two_bases, Mutation("sync_dir", "/ckpt/base/*", "publish")),
    "sync_dir of the folder of bases": (two_bases, Mutation("sync_dir", "/ckpt/base", "publish")),
    "sync of the identity": (two_steps, Mutation("sync", "*/identity.json*")),
    "sync_dir of the root after the identity": (two_steps, Mutation("sync_dir", "/ckpt", "_into_place")),
    "sync of the owner's epoch": (two_steps, Mutation("sync", "*/owner")),
    "sync_dir above the root": (two_steps, Mutation("sync_dir", "/", "make_dirs")),
}

# Left out by rank 1 alone, which comes after rank 0: no flush of rank 0's covers what it did.
OF_ONE_RANK = {
    "sync_dir of the attempt's folder by one rank": (two_steps, Mutation("sync_dir", "*/step_*", "persist", rank=1)),
    "sync_dir of the root by the only rank that has a base": (
        base_of_one_rank,
        Mutation("sync_dir", "/ckpt", "persist", rank=1),
    ),
    "sync_dir of the folder of bases by the only rank that has one": (
        base_of_one_rank,
        Mutation("sync_dir", "/ckpt/base", "publish", rank=1),
    ),
    "sync_dir of a base's folder by one rank": (two_bases, Mutation("sync_dir", "/ckpt/base/*", "publish", rank=1)),
}
