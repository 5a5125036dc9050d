"""One run of the job in one checkpoint directory: opened by all ranks together, committed to by rank 0."""

from __future__ import annotations

import errno
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from layerwise_dist.commit.coordinator import Coordinator, CoordinatorThread
from layerwise_dist.commit.metadata import (
    MOST_ANCESTORS,
    Branch,
    CheckpointMetadataManager,
    Identity,
    InDoubt,
    Inventory,
    Manifest,
    ParentRef,
    ShardRecord,
)
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.transports import Message, Transport
from layerwise_dist.errors import DamageError, DirectoryError, OwnerError
from layerwise_dist.storage import layout
from layerwise_dist.storage.layout import AttemptId
from layerwise_dist.storage.retention import retired

log = logging.getLogger("layerwise_dist")

_REMEMBERED = 64  # retired attempts whose folders are looked after at the end
_SHARDS = TypeAdapter(list[ShardRecord])


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What all ranks know of the session. `first_seq` is the seq of its first attempt."""

    session: str
    identity: str
    epoch: int
    first_seq: int
    empty: bool


class Committer:
    """Rank 0's pen: the owner lock, the lineage's head, and what is written when all shards are durable."""

    def __init__(
        self, manager: CheckpointMetadataManager, owner: Owner, info: SessionInfo, *, world_size: int, framework: str,
        software: dict[str, str], keep_last: int, keep_every_n_steps: int | None,
    ) -> None:  # fmt: skip
        self._manager, self.owner, self.info = manager, owner, info
        self._world_size, self._framework, self._software = world_size, framework, software
        self._keep_last, self._keep_every = keep_last, keep_every_n_steps
        self._head: ParentRef | None = None
        self._ancestors: list[ParentRef] = []
        # Its own records are the only new ones: what lies in the directory is read once, not at each commit.
        self._known: Inventory | None = None
        self._announced: deque[AttemptId] = deque(maxlen=_REMEMBERED)
        self.boundary_kind = "explicit"
        self.tags: dict[int, str] = {}  # of attempts, by seq: set before they are sealed

    def follow(self, head: ParentRef | None, branch_seq: int | None) -> None:
        """The next commit continues from `head`. With `branch_seq`, a branch record makes that durable at once."""
        self._known = self._manager.inventory().light()
        chain = self._known.chain(head) if head is not None else []
        ancestors = [manifest.ref for manifest in chain[1 : 1 + MOST_ANCESTORS]]
        if branch_seq is not None:
            self.owner.check()
            branch = Branch(
                identity=self.info.identity, session=self.info.session, seq=branch_seq, parent=head, ancestors=ancestors
            )
            self._manager.write_branch(branch)
            self._known.branches[branch_seq] = branch
        self._head, self._ancestors = head, ancestors

    def commit(self, seq: int, step: int, reports: list[Message]) -> None:
        """Raises OSError, InDoubt or OwnerError, as `Coordinator` expects."""
        attempt = AttemptId(self.info.epoch, seq, step)
        shards = _SHARDS.validate_python(
            [{name: report[name] for name in ShardRecord.model_fields} for report in reports]
        )
        manifest = Manifest(
            identity=self.info.identity, session=self.info.session, epoch=self.info.epoch, seq=seq, attempt=attempt.text,
            parent=self._head, ancestors=self._ancestors, step=step, world_size=self._world_size, framework=self._framework,
            boundary=self.boundary_kind, tag=self.tags.pop(seq, None), created=time.time(), software=self._software, shards=shards,
        )  # fmt: skip
        self.owner.check()
        self._manager.commit(manifest)
        if self._known is not None:
            self._known.manifests[seq] = manifest.light()
        if self._head is not None:
            self._ancestors = [self._head, *self._ancestors][:MOST_ANCESTORS]
        self._head = manifest.ref

    def retire(self, announce: Callable[[Message], None]) -> None:
        """Removes what retention no longer keeps, and branch records that a newer commit has made history.

        Shards of this session are left to the ranks that wrote them, who may reuse them: it is announced to them once
        the manifest is gone for good. Those of earlier sessions are removed here, since nothing knows which queued
        writes may still reach them.
        """
        if self._known is None:
            self._known = self._manager.inventory().light()
        inventory = self._known
        lineage = inventory.lineage(unbroken=True)
        family = [inventory.manifests[seq] for seq in inventory.roots()]
        gone = retired(lineage, family, keep_last=self._keep_last, keep_every_n_steps=self._keep_every)
        for seq in gone:
            self.owner.check()
            attempt = inventory.manifests[seq].attempt_id
            try:
                self._manager.withdraw(attempt)
            except InDoubt:
                del inventory.manifests[seq]  # a flush that failed is not tried again
                raise
            del inventory.manifests[seq]
            if self._of_this_session(attempt):
                self._announced.append(attempt)
                announce({"t": "retired", "epoch": attempt.epoch, "seq": attempt.seq, "step": attempt.step})
            else:
                self._manager.collect(attempt)
        self._ancestors = [ref for ref in self._ancestors if ref.seq not in gone]
        kept = lineage[: self._keep_last]
        if len(kept) == self._keep_last:
            for seq in [seq for seq in inventory.branches if seq < kept[-1].seq]:
                self._manager.remove_branch(seq)
                del inventory.branches[seq]

    def _of_this_session(self, attempt: AttemptId) -> bool:
        return attempt.epoch == self.info.epoch

    def close(self) -> None:
        """REQUIRES: all ranks have left, or are given up. What they did not take of retired attempts is removed."""
        try:
            if self._announced:
                self.owner.check()
            for attempt in self._announced:
                self._manager.collect(attempt)
        except (OSError, OwnerError) as error:
            log.warning("leftovers of retired checkpoints stay until the next start: %s", error)
        self.owner.release()


def start_coordinator(
    transport: Transport, manager: CheckpointMetadataManager, owner: Owner, info: SessionInfo, *, framework: str,
    software: dict[str, str], keep_last: int, keep_every_n_steps: int | None, timeout_s: float, on_failure: str,
    raise_after: int,
) -> tuple[Committer, CoordinatorThread]:  # fmt: skip
    """Rank 0's part from `open_session` on: the caller leads messages to the coordinator's `post`."""
    committer = Committer(
        manager, owner, info, world_size=transport.world_size, framework=framework, software=software,
        keep_last=keep_last, keep_every_n_steps=keep_every_n_steps,
    )  # fmt: skip
    logic = Coordinator(
        transport.world_size, timeout_s=timeout_s, on_failure=on_failure, raise_after=raise_after, now=time.monotonic()
    )
    coordinator = CoordinatorThread(
        logic, send=transport.announce, commit=committer.commit, retire=lambda: committer.retire(transport.announce)
    )
    return committer, coordinator


def open_session(
    env: Any, root: str, participant: Participant, *, file_mode: int, dir_mode: int, who: str, mock: bool = False
) -> tuple[SessionInfo, CheckpointMetadataManager, Owner | None]:
    """All ranks together. Rank 0 makes the directory, takes the lock and collects leftovers; the others check that
    they see the same directory. Raises OwnerError or DirectoryError on every rank alike.

    With `mock`, each rank's Env is a directory of its own that nothing was ever in: the others make theirs too.
    """
    manager = CheckpointMetadataManager(env, root, file_mode=file_mode)
    held: list[Owner] = []

    def decide(_: list[Any]) -> dict[str, Any]:
        info, owner = claim(env, root, manager, file_mode=file_mode, dir_mode=dir_mode, who=who)
        held.append(owner)
        return {name: getattr(info, name) for name in SessionInfo.__slots__}

    try:
        info = SessionInfo(**participant.agree("open the checkpoint directory", None, decide))
        problem = None
        try:
            if mock and participant.rank > 0:
                _make_dirs(env, root, dir_mode)
                manager.write_identity(Identity(identity=info.identity))
            _check_directory(env, root, manager, info)
        except (OSError, DamageError) as error:
            problem = str(error)

        def all_see(problems: list[str | None]) -> None:
            bad = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
            if bad:
                raise DirectoryError("; ".join(bad))

        participant.agree("see the same checkpoint directory", problem, all_see)
    except BaseException:
        for owner in held:
            owner.release()
        raise
    return info, manager, held[0] if held else None


def claim(
    env: Any, root: str, manager: CheckpointMetadataManager, *, file_mode: int, dir_mode: int, who: str
) -> tuple[SessionInfo, Owner]:
    """Rank 0's part of `open_session`: the directory is this session's now. Raises OwnerError or DirectoryError."""
    doing = f"write in {root}"
    try:
        _make_dirs(env, root, dir_mode)
        doing = f"read the records in {root}"
        before = manager.inventory()
        doing = f"write in {root}"
        session = uuid.uuid4().hex
        owner = Owner(env, root, session, last_epoch=before.last_epoch, file_mode=file_mode, who=who)
    except OSError as error:
        raise DirectoryError(f"rank 0 cannot {doing}: {error}") from error
    try:
        # Read again under the lock: the former owner may have committed between the first look and its end.
        inventory = manager.inventory()
        try:
            identity = manager.read_identity()
        except FileNotFoundError:
            identity = Identity(identity=uuid.uuid4().hex)
            manager.write_identity(identity)
        manager.collect_leftovers(inventory)
        return SessionInfo(session, identity.identity, owner.epoch, inventory.last_seq + 1, inventory.empty), owner
    except DamageError as error:
        owner.release()
        raise DirectoryError(str(error)) from error
    except BaseException:
        owner.release()
        raise


# Of a flush of a directory above ours: we may not read it (so nothing in it is ours), or its kind has no flush.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS, errno.EOPNOTSUPP}


def _make_dirs(env: Any, root: str, mode: int) -> None:
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


def _check_directory(env: Any, root: str, manager: CheckpointMetadataManager, info: SessionInfo) -> None:
    try:
        found = manager.read_identity().identity
    except FileNotFoundError:
        raise DirectoryError(
            f"{os.path.join(root, layout.IDENTITY)}, which rank 0 made, is not there: is a mount missing?"
        ) from None
    if found != info.identity:
        raise DirectoryError(
            f"{root} is another directory (identity {found}) than rank 0's ({info.identity}): is a mount missing?"
        )
