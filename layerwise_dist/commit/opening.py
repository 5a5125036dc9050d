# SPDX-License-Identifier: Apache-2.0
"""Opens a session in one directory.

A *place* is a directory with the ranks that share it; its lowest rank is its *keeper*. With a shared file system there
is one place, kept by rank 0. With a disk in each node there are several, and a checkpoint exists if its manifest lies
in any of them: what a crash left in some only is brought to the others here, by the plan that `merging` makes.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from layerwise_dist.commit.metadata import Branch, CheckpointMetadataManager, Identity, Inventory, Manifest, decode
from layerwise_dist.commit.owner import Owner, read_owner
from layerwise_dist.errors import DamageError, DirectoryError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.odd import kind_at, oddity
from layerwise_dist.storage.protocols import Env

log = logging.getLogger("layerwise_dist")

# Of commit.timeout_s: how long a monitor may take to finish when its job has ended, and how long a job that was started
# again waits for it. So it is never an error to start again.
FINISHING_SHARE, PATIENCE_SHARE = 0.5, 0.75


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What all ranks know of the session.

    `first_seq` is the seq of its first attempt; `places` are the ranks of each.
    """

    session: str
    identity: str
    epoch: int
    first_seq: int
    empty: bool
    places: list[list[int]]

    @property
    def shared(self) -> bool:
        """Whether all ranks see one directory."""
        return len(self.places) == 1


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What all keepers do. `kept`: attempts that nobody collects, since there may be a manifest of them somewhere.
    `lacking`: (file name of a record, who has it, who has not). `pinned`: attempts that are, in any place. `host`: that
    of rank 0.
    """

    session: str
    identity: str
    epoch: int
    first_seq: int
    empty: bool
    kept: list[list[int]]
    lacking: list[tuple[str, int, list[int]]]
    pinned: list[list[int]]
    host: str

    def info(self, places: list[list[int]]) -> SessionInfo:
        return SessionInfo(self.session, self.identity, self.epoch, self.first_seq, self.empty, places)


class Seen(TypedDict):
    """What is in a place's directory, as JSON; attempts as epoch, seq and step."""

    host: str
    ranks: list[int]
    identity: str | None
    epoch: int
    last_seq: int
    empty: bool
    manifests: list[list[int]]
    branches: list[int]
    doubtful: list[list[int]]
    records: list[tuple[int, str, str]]  # of manifests and branches: seq, name, and the session that wrote it
    world_size: int  # of the newest manifest; 0 without one
    pinned: list[list[int]]
    shards: dict[str, list[int]]  # ranks whose shards are here, by attempt: of the newest manifest, and of later ones


class Place:
    """A keeper's part. In order: `look`, `texts` if it is asked for some, `settle`; `release` if anything fails."""

    def __init__(
        self, env: Env, root: str, manager: CheckpointMetadataManager, *, ranks: Sequence[int], file_mode: int,
        dir_mode: int, who: str, patience_s: float = 0.0, monitored: bool = False,
    ) -> None:  # fmt: skip
        self._env, self._root, self._manager = env, root, manager
        self._ranks, self._file_mode, self._dir_mode, self._who = list(ranks), file_mode, dir_mode, who
        self._patience_s, self._monitored = patience_s, monitored
        self.owner: Owner | None = None

    def look(self) -> Seen:
        """Takes the directory, and says what is in it. Raises OwnerError or DirectoryError."""
        doing = f"write in {self._root}"
        try:
            make_dirs(self._env, self._root, self._dir_mode)
            self.owner = Owner(
                self._env, self._root, file_mode=self._file_mode, who=self._who, patience_s=self._patience_s,
                monitored=self._monitored,
            )  # fmt: skip
            doing = f"read the records in {self._root}"
            found = self._manager.inventory()
            doubtful = self._manager.flush_records(found)
            newest = max(found.manifests, default=0)
            attempts = [*found.unfinished, *(each.attempt_id for each in found.manifests.values())]
            shards = {each.text: self._ranks_in(each) for each in attempts if each.seq >= newest}
            committed = [each.attempt_id for each in found.manifests.values()]
            pinned = [each for each in committed if self._manager.pinned(each)]
            identity = found.identity or told_identity(found, self._root)
        except DirectoryError:
            raise
        except OSError as error:
            raise DirectoryError(f"rank {self._ranks[0]} cannot {doing}: {error}") from error
        return {
            "host": socket.gethostname(), "ranks": self._ranks, "identity": identity,
            "epoch": max(self.owner.previous, found.last_epoch), "last_seq": found.last_seq, "empty": found.empty,
            "manifests": [[m.epoch, m.seq, m.step] for m in found.manifests.values()],
            "branches": sorted(found.branches),
            "doubtful": [[each.epoch, each.seq, each.step] for each in doubtful],
            "records": [
                *((seq, each.attempt_id.folder, each.session) for seq, each in found.manifests.items()),
                *((seq, filenames.branch_file(seq), each.session) for seq, each in found.branches.items()),
            ],
            "world_size": found.manifests[newest].world_size if newest else 0, "shards": shards,
            "pinned": [[each.epoch, each.seq, each.step] for each in pinned],
        }  # fmt: skip

    def _ranks_in(self, attempt: AttemptId) -> list[int]:
        try:
            names = self._env.list_dir(self._manager.folder(attempt))
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and oddity(error, attempt.folder) is None:
                raise
            return []
        return sorted(rank for name in names if (rank := filenames.parse_shard(name)) is not None)

    def _write_identity(self, identity: str) -> None:
        """If it is not there; or is damaged, and all records here said what it was."""
        damage: DamageError | None = None
        try:
            self._manager.read_identity()
            return
        except FileNotFoundError:
            pass
        except DamageError as error:
            damage = error
        self._manager.write_identity(Identity(identity=identity))
        if damage is not None:
            log.warning("%s; it was rewritten", damage)

    def texts(self, plan: StartPlan) -> dict[str, str]:
        """The records that only this place can give to others, by name."""
        mine = [name for name, holder, _ in plan.lacking if holder == self._ranks[0]]
        return {name: self._manager.record_text(name) for name in mine}

    def settle(self, plan: StartPlan, texts: dict[str, str]) -> list[str]:
        """The directory is this session's now, holds every record that it can hold, and no leftovers of dead attempts.

        Returns what could not be brought here. Raises OSError or DamageError.
        """
        assert self.owner is not None
        first = self._ranks[0] == 0
        self.owner.begin(plan.session, plan.epoch, decided_on=None if first else plan.host)
        self._write_identity(plan.identity)
        wanting = []
        for name, _, lacking in plan.lacking:
            if self._ranks[0] in lacking and (why := self._bring(name, texts[name])) is not None:
                wanting.append(why)
        kept = {AttemptId(*each) for each in plan.kept}
        here = self._manager.inventory()
        self._manager.collect_leftovers(here, kept)
        if first:
            for manifest in here.manifests.values():
                attempt = manifest.attempt_id
                wanted = [attempt.epoch, attempt.seq, attempt.step] in plan.pinned
                if wanted and not self._manager.pinned(attempt):
                    self._manager.pin(attempt)
        return wanting

    def let_pins_go(self, plan: StartPlan) -> None:
        """They lie where rank 0 is now, as `settle` has made sure on all ranks: here they would outlive an `unpin`.
        Raises OSError.
        """
        for each in plan.pinned if self._ranks[0] else ():
            self._manager.unpin(AttemptId(*each))

    def _bring(self, name: str, text: str) -> str | None:
        """Writes a record of another place's here. Why not, where something else lies there.

        A manifest lies in each place, whatever of its shards is here: a restore looks for these by what ranks see
        then, which need not be the ranks that were here when it was made.
        """
        if (seq := filenames.parse_branch(name)) is not None:
            self._manager.write_branch(decode(text.encode(), Branch, filenames.branch_file(seq)))
            return None
        manifest = decode(text.encode(), Manifest, name)
        try:
            try:
                self._env.make_dir(self._manager.folder(manifest.attempt_id), self._dir_mode)
            except FileExistsError:
                pass
            self._env.sync_dir(self._root)
            self._manager.prepare(manifest)
            self._manager.publish(manifest.attempt_id)
        except OSError as error:
            if (what := oddity(error, name)) is None:
                raise
            return f"the manifest of step {manifest.step} can't be written on {socket.gethostname()}: {what}"
        return None

    def release(self) -> None:
        """Where a start has failed. Raises nothing."""
        if self.owner is not None:
            self.owner.let_go()


def unusable(manager: CheckpointMetadataManager, found: Inventory) -> dict[str, str]:
    """What keeps a session from beginning in a directory, or from restoring what is in it, by the file's name; what
    `Place.look` reads is read here. `found` is what the directory holds.
    """
    problems: dict[str, str] = {}
    epoch = found.last_epoch
    try:
        epoch = max(epoch, read_owner(manager.env, manager.root).get("epoch", 0))
    except OSError as error:
        problems[filenames.OWNER] = f"no job can take {os.path.join(manager.root, filenames.OWNER)}: {error}"
    if problem := too_few(manager.root, epoch, found.last_seq):
        problems["numbers"] = problem
    path = os.path.join(manager.root, filenames.IDENTITY)
    try:
        manager.read_identity()
        if found.manifests and found.newest is None and found.lost is not None:
            problems[filenames.IDENTITY] = found.lost
    except FileNotFoundError:
        if not found.empty:
            problems[filenames.IDENTITY] = f"{path} is missing: {_way_out(manager, found)}"
    except DamageError as error:
        # What is no file is not written over.
        written = kind_at(manager.env, path) == "file"
        problems[filenames.IDENTITY] = f"{error}: {_way_out(manager, found)}" if written else str(error)
    except OSError as error:
        problems[filenames.IDENTITY] = str(error)
    return problems


def too_few(root: str, epoch: int, seq: int) -> str | None:
    """Why no session can begin after these, the highest in the directory, if so."""
    for what, number in (("epoch", epoch), ("seq", seq)):
        if number + 1 >= filenames.BEGIN_BELOW:
            return (
                f"{root} holds a checkpoint or an attempt of {what} {number}: after it there are too few numbers for "
                f"a session, which begins below {filenames.BEGIN_BELOW}. Continue in a new directory, or move away "
                "what has that number"
            )
    return None


def _way_out(manager: CheckpointMetadataManager, found: Inventory) -> str:
    try:
        told = told_identity(found, manager.root)
    except DirectoryError as error:
        return str(error)
    if told is None:
        return "no sound record here says what was in it: only attach(fresh=True) makes a new one"
    return f"the next attach() rewrites it from the records here ({told})"


def told_identity(found: Inventory, root: str) -> str | None:
    """What `identity.json` was, as all sound records say; None if there are none. Raises DirectoryError where they are
    of several directories.
    """
    said = found.identities.most_common()
    if len(said) > 1:
        listed = ", ".join(f"{times} of {identity}" for identity, times in said[:4])
        raise DirectoryError(
            f"{os.path.join(root, filenames.IDENTITY)} is missing or damaged, and the records in {root} are of several "
            f"directories ({listed}): move away those that were copied here, and start again"
        )
    return said[0][0] if said else None


def as_start_plan(tree: dict[str, Any]) -> StartPlan:
    return StartPlan(**{**tree, "lacking": [tuple(each) for each in tree["lacking"]]})


def as_tree(plan: StartPlan) -> dict[str, Any]:
    return asdict(plan)


# Of a flush of a directory above ours: we may not read it (so nothing in it is ours), or its kind has no flush.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS, errno.EOPNOTSUPP}


def make_dirs(env: Env, root: str, mode: int) -> None:
    """Makes `root` and what is missing above it, and flushes all names on the way there.

    Those that are there already too: a start that made them may have died, or failed, before they were durable.
    """
    missing = []
    path = root
    while True:
        try:
            kind, _ = env.stat(path)
            if kind == "link":
                kind = env.stat(os.path.join(path, "."))[0]
            if kind != "dir":
                raise DirectoryError(f"{path} is not a directory")
            break
        except FileNotFoundError:
            missing.append(path)
            path = os.path.dirname(path)
    while path != (parent := os.path.dirname(path)):
        try:
            env.sync_dir(parent)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
        path = parent
    for path in reversed(missing):
        try:
            env.make_dir(path, mode)
        except FileExistsError:
            pass
        env.sync_dir(os.path.dirname(path))
