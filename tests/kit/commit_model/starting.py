# SPDX-License-Identifier: Apache-2.0
"""The start of a job: the real start of a session in each place, and what it goes on from."""

from __future__ import annotations

from kit.commit_model.disk import ROOT, Killed
from kit.commit_model.history import Course
from kit.commit_model.job import Job
from kit.commit_model.rules import Rules, need
from kit.commit_model.world import World
from layerwise_dist.commit.keeper import Keeper
from layerwise_dist.commit.merging import merge
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Manifest
from layerwise_dist.commit.opening import Place, SessionInfo
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.session import Committer
from layerwise_dist.errors import DirectoryError, OwnerError


def start(rules: Rules, world: World) -> Job | None:
    """None where a disk fails, or kills it."""
    try:
        return _start(rules, world)
    except (DirectoryError, OwnerError, OSError) as error:
        world.count[f"start: {type(error).__name__}"] += 1
    except Killed:
        pass
    world.unlock()
    return None


def _start(rules: Rules, world: World) -> Job:
    managers = [CheckpointMetadataManager(disk, ROOT) for disk in world.disks]
    info, owners = _open(managers, rules, world)
    committer = Committer(
        managers[0], owners[0], info, world_size=world.world_size, framework="model", software={},
        keep_last=world.keep_last, keep_every_n_steps=None,
    )  # fmt: skip
    rules.check(everywhere=True)
    places = list(zip(world.places, managers, owners, strict=True))
    keepers = [Keeper(ranks[0], manager, owner, info) for ranks, manager, owner in places[1:]]
    job = _begin(info, committer, keepers, rules, world)
    for keeper in keepers:
        job.ranks[keeper.rank].keeper = keeper
    return job


def _open(managers: list[CheckpointMetadataManager], rules: Rules, world: World) -> tuple[SessionInfo, list[Owner]]:
    """As `open_session` does with all ranks."""
    places = [
        Place(manager.env, ROOT, manager, ranks=ranks, file_mode=0o600, dir_mode=0o700, who="model")
        for manager, ranks in zip(managers, world.places, strict=True)
    ]
    plan = merge([place.look() for place in places], ROOT, fresh=False)
    texts = {name: text for place in places for name, text in place.texts(plan).items()}
    rules.epoch = plan.epoch
    wanting = [why for place in places for why in place.settle(plan, texts)]
    need(not wanting, f"the start finds {wanting}")
    owners = [place.owner for place in places if place.owner is not None]
    return plan.info(world.places), owners


def _begin(info: SessionInfo, committer: Committer, keepers: list[Keeper], rules: Rules, world: World) -> Job:
    """Goes on from the newest commit; at times back to another one, or afresh beside what is there."""
    dice, history = world.dice, rules.history
    inventory = CheckpointMetadataManager(world.disks[0].memory, ROOT).inventory()
    lineage = inventory.lineage()
    luck = dice.random()
    branch = bool(inventory.manifests) and luck < 0.25
    chosen: Manifest | None = lineage[0] if lineage else None
    if branch:
        chosen = dice.choice(list(inventory.manifests.values())) if luck < 0.18 else None
    origin = history.origin(chosen, inventory)
    text, kept = committer.follow(chosen.ref if chosen is not None else None, info.first_seq if branch else None)
    if text is not None:
        for keeper in keepers:
            keeper.keep_branch(text)
        world.count["branch"] += 1
        rules.follows(info.first_seq)
    course = Course(info.epoch, list(origin.chain), origin.descent)
    job = Job(info, committer, course, chosen.step if chosen is not None else 0, branch, rules=rules, world=world)
    for rank, base in zip(job.ranks, history.bases[chosen.seq] if chosen is not None else (), strict=False):
        if base in kept and dice.random() < 0.8:
            rank.refers_to(base)
    rules.begins(course)
    world.count["start"] += 1
    return job
