# SPDX-License-Identifier: Apache-2.0
"""Removes old checkpoints where no job runs, by retention's rules and in an order that is safe at any crash."""

from __future__ import annotations

import os
import socket
import stat
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from layerwise_dist.commit.inventory import Inventory
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.opening import unusable
from layerwise_dist.commit.owner import Owner, read_owner
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, DirectoryError, OwnerError, shown
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.odd import oddity
from layerwise_dist.storage.retention import retired, staying, unneeded_bases

OPEN = "open: somebody is reading it"
PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class Kept:
    """As the members of the configuration are called."""

    keep_last: int
    keep_every_n_steps: int | None
    keep_tags: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What would go, oldest first, and why the others stay, by seq.

    `bases` are frozen parameters that nothing refers to then, `leftovers` what crashes left of attempts.
    """

    going: list[Manifest]
    staying: dict[int, str]
    bases: list[str]
    leftovers: list[AttemptId]


def plan(manager: CheckpointMetadataManager, found: Inventory, kept: Kept) -> Plan:
    """Raises DamageError where the lineage is not known, DirectoryError where this directory alone can't decide, or
    OSError.
    """
    if found.lost is not None:
        raise DamageError(f"nothing is removed, since it is unclear where the lineage continues: {found.lost}")
    if problems := unusable(manager, found):
        raise DirectoryError(f"nothing is removed, since no job could start here: {'; '.join(problems.values())}")
    for manifest in found.manifests.values():
        if manifest.places is not None:
            raise DirectoryError(
                f"{manager.root} holds the shards of only some ranks; the others' are on their nodes: set "
                "keep_last in the configuration, and the job's own retention removes old checkpoints on all nodes"
            )
    lineage, family = found.lineage(), found.family()
    every, tags, above = kept.keep_every_n_steps, kept.keep_tags, found.newest_damage
    gone = retired(
        lineage, family, keep_last=kept.keep_last, keep_every_n_steps=every, keep_tags=tags, above=above
    )  # fmt: skip
    stay = staying(lineage, family, keep_every_n_steps=every, keep_tags=tags, above=above)
    related = {manifest.seq for manifest in family}
    why: dict[int, str] = {}
    newest = [manifest.seq for manifest in lineage[: kept.keep_last]]
    for seq, manifest in found.manifests.items():
        if manager.pinned(manifest.attempt_id):
            why[seq] = PINNED
        elif seq not in gone:
            why[seq] = _why(manifest, newest, stay, related, kept, above)
    going = [found.manifests[seq] for seq in gone if seq not in why]
    rest = [manifest for seq, manifest in found.manifests.items() if seq in why]
    bases = [] if found.damaged else unneeded_bases(found.bases, rest)
    return Plan(going, why, bases, sorted(found.unfinished))


def _why(
    manifest: Manifest, newest: list[int], stay: set[int], family: set[int], kept: Kept, damage: int
) -> str:  # fmt: skip
    if manifest.seq in newest:
        return "newest" if manifest.seq == newest[0] else f"of the newest {kept.keep_last}"
    if manifest.seq not in family:
        return "of another lineage"
    if manifest.seq not in stay:
        return "not older than what the lineage keeps"
    if manifest.seq < damage:
        return "older than a damaged one"
    every = kept.keep_every_n_steps
    if every is not None and manifest.step % every == 0:
        return f"a multiple of {every}"
    return "the newest under its tag"


def _mode(manager: CheckpointMetadataManager) -> int:
    """Of the files there: the next job, maybe another user's, must be able to take the lock too."""
    try:
        return stat.S_IMODE(os.lstat(os.path.join(manager.root, filenames.IDENTITY)).st_mode) & 0o666
    except FileNotFoundError:
        return 0o600


class Pruning:
    """Holds the directory as a job does, from the constructor until `close`: a job that starts meanwhile waits."""

    def __init__(self, manager: CheckpointMetadataManager, kept: Kept) -> None:
        """Raises OwnerError naming the job that runs here, as `plan` does, or OSError."""
        self._manager, self._kept = manager, kept
        who = f"layerwise prune (pid {os.getpid()} on {socket.gethostname()})"
        try:
            self._owner = Owner(manager.env, manager.root, file_mode=_mode(manager), who=who, monitored=True)
        except OwnerError:
            holder = shown(str(read_owner(manager.env, manager.root).get("who", "unknown")), 200)
            raise OwnerError(
                f"a job writes in {manager.root} ({holder}), and removes old checkpoints by its own keep_last: prune "
                "when it has ended. To keep one meanwhile: layerwise pin"
            ) from None
        try:
            found = manager.inventory()
            self.plan = plan(manager, found, kept)
            # As each start of a job does: what stays must survive a power failure before anything else goes, and who
            # lost the lock without noticing must find that the directory is another's now.
            self._owner.begin(uuid.uuid4().hex, max(self._owner.previous, found.last_epoch) + 1)
            self._owner.end("removes old checkpoints")
            self._doubtful = manager.flush_records(found)
        except BaseException:
            self._owner.let_go()
            raise

    def run(self, removed: Callable[[Manifest], None]) -> dict[int, str]:
        """Removes what is planned, oldest first: of each checkpoint the manifest, durably, and only then what it
        names. `removed` hears of each. Returns why others stay, by seq. Raises OwnerError, OSError or InDoubt; what
        was removed until then is.
        """
        manager, stays = self._manager, dict[int, str]()
        for manifest in self.plan.going:
            attempt = manifest.attempt_id
            self._owner.check()
            try:
                manager.withdraw(attempt)
            except BlockingIOError:
                stays[manifest.seq] = PINNED if manager.pinned(attempt) else OPEN
                continue
            except OSError as error:
                if (what := oddity(error, attempt.folder)) is None:
                    raise
                stays[manifest.seq] = what
                continue
            manager.collect(attempt)
            removed(manifest)
        self._owner.check()
        manager.collect_leftovers(manager.inventory(), self._doubtful)
        return stays

    def close(self) -> None:
        """Raises nothing."""
        self._owner.let_go()
