# SPDX-License-Identifier: Apache-2.0
"""Starts a session on all ranks together, for a training process, its monitor or a benchmark."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from layerwise_dist.commit.agreement import together
from layerwise_dist.commit.coordinator import Coordinator
from layerwise_dist.commit.coordinator_thread import CoordinatorThread
from layerwise_dist.commit.keeper import Keeper, KeeperThread
from layerwise_dist.commit.merging import merge
from layerwise_dist.commit.messages import Outcome
from layerwise_dist.commit.metadata import CheckpointMetadataManager, Identity
from layerwise_dist.commit.opening import Place, SessionInfo, StartPlan, as_start_plan, as_tree, make_dirs
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.places import find_places
from layerwise_dist.commit.session import WORK, Committer
from layerwise_dist.commit.transports import Transport
from layerwise_dist.commit.votes import tried, values
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.errors import DirectoryError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.protocols import Env
from layerwise_dist.supervision.patience import DISK_SHARE

log = logging.getLogger("layerwise_dist")


@dataclass(frozen=True, slots=True)
class Rules:
    """What rank 0 commits by, and what it writes of the job into each manifest. The names are the configuration's."""

    framework: str
    software: dict[str, str]
    keep_last: int
    keep_every_n_steps: int | None
    timeout_s: float
    on_failure: str
    raise_after: int
    keep_tags: int | None = None
    replica_drift: str = "raise"

    @classmethod
    def of(cls, config: LayerwiseConfig, framework: str, software: dict[str, str]) -> Rules:
        return cls(
            framework, software, keep_last=config.keep_last, keep_every_n_steps=config.keep_every_n_steps,
            timeout_s=config.commit.timeout_s, on_failure=config.commit.on_failure,
            raise_after=config.commit.raise_after, keep_tags=config.keep_tags, replica_drift=config.replica_drift,
        )  # fmt: skip


class Session(NamedTuple):
    """What a rank has of a session that has begun. `owner` is there on keepers, the last two on rank 0."""

    info: SessionInfo
    manager: CheckpointMetadataManager
    owner: Owner | None
    committer: Committer | None
    coordinator: CoordinatorThread | None


def start_session(
    env: Env, root: str, transport: Transport, participant: Participant, rules: Rules, *, file_mode: int, dir_mode: int,
    who: str, fresh: bool = False, mock: bool = False, patience_s: float = 0.0, monitored: bool = False,
    check: Callable[[SessionInfo], None] = lambda info: None,
) -> Session:  # fmt: skip
    """All ranks together: the directory is this session's, and rank 0 decides what is committed, until the participant
    is closed, and after it the coordinator.

    `check(info)` raises where such a session can't go on, on all ranks alike. The other arguments are those of
    `open_session`. What fails here leaves the directory to others.
    """
    info, manager, owner = open_session(
        env, root, participant, file_mode=file_mode, dir_mode=dir_mode, who=who, fresh=fresh, mock=mock,
        patience_s=patience_s, monitored=monitored,
    )  # fmt: skip
    committer = coordinator = keeper = None
    try:
        check(info)
        if owner is not None and participant.rank == 0:
            committer, coordinator = start_coordinator(transport, manager, owner, info, rules)
        elif owner is not None:
            keeper = KeeperThread(
                Keeper(participant.rank, manager, owner, info), participant.post, participant.broke
            )  # fmt: skip
    except BaseException:
        if owner is not None:
            owner.let_go()
        raise
    participant.opened(apart=not info.shared, coordinator=coordinator, keeper=keeper)
    return Session(info, manager, owner, committer, coordinator)


def start_coordinator(
    transport: Transport, manager: CheckpointMetadataManager, owner: Owner, info: SessionInfo, rules: Rules
) -> tuple[Committer, CoordinatorThread]:
    """Rank 0's part from `open_session` on: the caller leads messages to the coordinator."""
    committer = Committer(
        manager, owner, info, world_size=transport.world_size, framework=rules.framework, software=rules.software,
        keep_last=rules.keep_last, keep_every_n_steps=rules.keep_every_n_steps, keep_tags=rules.keep_tags,
        patience_s=DISK_SHARE * rules.timeout_s,
    )  # fmt: skip
    logic = Coordinator(
        transport.world_size, timeout_s=rules.timeout_s, on_failure=rules.on_failure, raise_after=rules.raise_after,
        now=time.monotonic(), keepers=[place[0] for place in info.places[1:]],
        replica_drift=rules.replica_drift,
    )  # fmt: skip
    return committer, CoordinatorThread(logic, committer, transport.announce)


def start_writer(participant: Participant, begin: Callable[[], PCCheckAdapter]) -> PCCheckAdapter:
    """All ranks together: `begin()` opens this rank's writer in the session's directory. What it raises on one is
    raised on all. From then on the writer hears of checkpoints that are gone, whose files it may use again.
    """
    _, adapter = together(participant, "start the writer", begin)
    assert adapter is not None, "nothing is read here that could be damaged"
    participant.recycle(adapter.recycler.retire)
    return adapter


def open_session(
    env: Env, root: str, participant: Participant, *, file_mode: int, dir_mode: int, who: str, fresh: bool = False,
    mock: bool = False, patience_s: float = 0.0, monitored: bool = False,
) -> tuple[SessionInfo, CheckpointMetadataManager, Owner | None]:  # fmt: skip
    """All ranks together. Who shares a directory finds out that it does; the lowest rank of each place takes the lock,
    brings what is committed elsewhere, and collects leftovers. Raises OwnerError or DirectoryError on every rank alike.

    `patience_s` is how long a monitor is waited for that finishes the checkpoints of a job which has ended; `monitored`
    says that this process is one. With `mock`, each rank's Env is a directory of its own that nothing was ever in and
    nothing will be.
    """
    manager = CheckpointMetadataManager(env, root, file_mode=file_mode)
    modes = {"file_mode": file_mode, "dir_mode": dir_mode}
    rank = participant.rank
    places = [list(range(participant.world_size))] if mock else find_places(env, root, participant, **modes)
    ranks = next(place for place in places if rank in place)
    place = None
    if rank == ranks[0]:
        place = Place(env, root, manager, ranks=ranks, who=who, patience_s=patience_s, monitored=monitored, **modes)
    try:
        plan = _plan(participant, place, root, fresh=fresh, timeout_s=participant.disk_s / 4 + patience_s)
        texts: dict[str, str] = {}
        if plan.lacking:
            given = tried(participant.disk_s, WORK, lambda: place.texts(plan) if place is not None else {})
            texts = participant.agree("bring what is committed to all", given, _collected)
        info = plan.info(places)
        settled = tried(participant.disk_s, WORK, lambda: place.settle(plan, texts) if place is not None else [])
        for why in participant.agree("settle the checkpoint directory", settled, _settled):
            log.warning("%s", why)

        def check() -> list[str]:
            if mock and place is None:
                make_dirs(env, root, dir_mode)
                manager.write_identity(Identity(identity=info.identity))
            _check_directory(env, root, manager, info)
            if place is not None:
                place.let_pins_go(plan)
            return []

        participant.agree("see the same checkpoint directory", tried(participant.disk_s, WORK, check), _settled)
    except BaseException:
        if place is not None:
            place.release()
        raise
    return info, manager, place.owner if place is not None else None


def _plan(participant: Participant, place: Place | None, root: str, *, fresh: bool, timeout_s: float) -> StartPlan:
    def decide(votes: list[Outcome]) -> dict[str, Any]:
        return as_tree(merge([found for found in values(votes) if found is not None], root, fresh=fresh))

    seen = tried(timeout_s, WORK, lambda: place.look() if place is not None else None)
    return as_start_plan(participant.agree("open the checkpoint directory", seen, decide))


def _collected(votes: list[Outcome]) -> dict[str, str]:
    return {name: text for given in values(votes) for name, text in given.items()}


def _settled(votes: list[Outcome]) -> list[str]:
    bad = [f"rank {rank}: {vote['error']['message']}" for rank, vote in enumerate(votes) if "error" in vote]
    if bad:
        raise DirectoryError("; ".join(bad))
    return [why for value in values(votes) for why in value]


def _check_directory(env: Env, root: str, manager: CheckpointMetadataManager, info: SessionInfo) -> None:
    try:
        found = manager.read_identity().identity
    except FileNotFoundError:
        raise DirectoryError(
            f"{os.path.join(root, filenames.IDENTITY)}, which was made for all ranks, is not there: is a mount missing?"
        ) from None
    if found != info.identity:
        raise DirectoryError(
            f"{root} is another directory (identity {found}) than rank 0's ({info.identity}): is a mount missing?"
        )
