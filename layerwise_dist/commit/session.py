# SPDX-License-Identifier: Apache-2.0
"""One run of the job in one checkpoint directory: what rank 0 writes there, and where all ranks continue from."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from pydantic import TypeAdapter

from layerwise_dist.commit.messages import Durable
from layerwise_dist.commit.metadata import (
    Branch,
    CheckpointMetadataManager,
    InDoubt,
    Inventory,
    Manifest,
    ParentRef,
    ShardRecord,
    Span,
    encode,
)
from layerwise_dist.commit.opening import SessionInfo
from layerwise_dist.commit.owner import Owner
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import BoundaryKind, bases_of
from layerwise_dist.commit.votes import tried, values
from layerwise_dist.errors import DamageError, DeadlineError, OwnerError
from layerwise_dist.storage.filenames import AttemptId
from layerwise_dist.storage.odd import leave
from layerwise_dist.storage.retention import retired, unneeded_bases
from layerwise_dist.storage.schemas import members
from layerwise_dist.supervision.patience import stuck_calls, within

log = logging.getLogger("layerwise_dist")

WORK = "the work in the checkpoint directory"

_REMEMBERED = 64  # retired attempts whose folders are looked after at the end
_SHARDS = TypeAdapter(list[ShardRecord])


class CommitRequests(Protocol):
    """What rank 0's training thread says of commits, and asks for."""

    boundary_kind: BoundaryKind

    def tag(self, seq: int, tag: str) -> None:
        """Of an attempt, before it is sealed."""
        ...

    def hold(self, held: bool) -> None:
        """While a restore chooses and reads, nothing that it may have chosen is removed."""
        ...

    def follow(self, head: ParentRef | None, branch_seq: int | None) -> tuple[str | None, list[str]]: ...


class Committer:
    """What commits, on rank 0: the owner lock, the lineage's head, and what is written once all shards are durable."""

    def __init__(
        self, manager: CheckpointMetadataManager, owner: Owner, info: SessionInfo, *, world_size: int, framework: str,
        software: dict[str, str], keep_last: int, keep_every_n_steps: int | None,
        keep_tags: int | None = None, patience_s: float = threading.TIMEOUT_MAX,
    ) -> None:  # fmt: skip
        self._patience_s = patience_s
        self._manager, self.owner, self.info = manager, owner, info
        self._world_size, self._framework, self._software = world_size, framework, software
        self._keep_last, self._keep_every, self._keep_tags = keep_last, keep_every_n_steps, keep_tags
        self._head: ParentRef | None = None
        self._branch = self._root = 0  # of the next manifest, as the record says; so is `_before`
        self._before: list[Span] = []
        self._held = False
        # Its own records are the only new ones: what lies in the directory is read once, not at each commit.
        self._known: Inventory | None = None
        self._draft: Manifest | None = None
        # Removed here, and perhaps not for good: a flush failed, or they are still to be removed elsewhere.
        self._returning: dict[AttemptId, Manifest] = {}
        self._linked: set[int] = set()  # seqs of manifests that lie behind a link: nothing there is removed
        self._bases_are_used = False
        self._bases_named: set[str] = set()  # as unneeded
        self._bases_of_retired: set[str] = set()  # which need not lie in this directory: ranks have moved
        # `follow` comes from the training thread, while the coordinator's may still retire after the last commit.
        self._lock = threading.Lock()
        self._announced: deque[AttemptId] = deque(maxlen=_REMEMBERED)
        self.boundary_kind: BoundaryKind = "explicit"
        self._tags: dict[int, str] = {}  # of attempts, by seq

    def tag(self, seq: int, tag: str) -> None:
        """The attempt is committed under this name. Said before it is sealed."""
        self._tags[seq] = tag

    def hold(self, held: bool) -> None:
        """From when this returns until it is called with False, `retire` and `unneeded` find nothing: the next commit
        catches up. What is followed stays by itself until then, as the newest commit of the lineage. Raises
        DeadlineError if a removal does not end.
        """
        mine = self._lock.acquire(timeout=self._patience_s)  # a removal that is under way is over before anyone chooses
        if held and not mine:
            raise DeadlineError(f"old checkpoints were still being removed after {self._patience_s:g} s{stuck_calls()}")
        self._held = held
        if mine:
            self._lock.release()

    def follow(self, head: ParentRef | None, branch_seq: int | None) -> tuple[str | None, list[str]]:
        """The next commit continues from `head`. With `branch_seq`, a branch record makes that durable at once.

        Without, `head` is the newest commit of the lineage, or None if it has none yet. Returns the branch record's
        text, and the bases that `head` refers to, which stay from now on until a commit refers to others. Raises
        OSError, InDoubt, OwnerError, or DamageError if `head` is not there.
        """
        with self._lock:
            return self._follow(head, branch_seq)

    def _follow(self, head: ParentRef | None, branch_seq: int | None) -> tuple[str | None, list[str]]:
        text = None
        self._known = known = self._manager.inventory().light()
        parent = known.manifests.get(head.seq) if head is not None else None
        if head is not None and (parent is None or parent.ref != head):
            raise DamageError(
                f"the commit to continue from (seq {head.seq}, attempt {head.attempt}) is no longer there"
            )
        if branch_seq is None:
            newest = known.newest
            branch, before, root = (newest.branch, newest.before, newest.root) if newest is not None else (0, [], 0)
        else:
            branch, before = branch_seq, known.spans_after(parent)
            root = parent.root if parent is not None else branch_seq
            self.owner.check()
            record = Branch(
                identity=self.info.identity, session=self.info.session, seq=branch_seq, parent=head, before=before,
                root=root,
            )  # fmt: skip
            self._manager.write_branch(record)
            known.branches[branch_seq] = record
            text = encode(record).decode()
        self._head, self._branch, self._before, self._root = head, branch, before, root
        return text, parent.bases if parent is not None else []

    def compose(self, seq: int, step: int, reports: list[Durable]) -> str:
        """The manifest that `commit` will write, as it will lie in the file. Raises OwnerError."""
        self.owner.check()
        self._draft = self._manifest(seq, step, reports)
        return encode(self._draft).decode()

    def commit(self, seq: int, step: int, reports: list[Durable]) -> None:
        """Raises OSError, InDoubt or OwnerError, as `Coordinator.wrote` takes them."""
        draft, self._draft = self._draft, None
        manifest = draft if draft is not None and draft.seq == seq else self._manifest(seq, step, reports)
        self.owner.check()
        self._manager.commit(manifest)
        if self._known is not None:
            self._known.manifests[seq] = manifest.light()
        self._head = manifest.ref

    def _manifest(self, seq: int, step: int, reports: list[Durable]) -> Manifest:
        attempt = AttemptId(self.info.epoch, seq, step)
        known = members(ShardRecord)
        shards = _SHARDS.validate_python(
            [{name: value for name, value in report.items() if name in known} for report in reports]
        )
        return Manifest(
            identity=self.info.identity, session=self.info.session, epoch=self.info.epoch, seq=seq,
            attempt=attempt.text, parent=self._head, branch=self._branch, before=self._before, root=self._root,
            step=step, world_size=self._world_size, framework=self._framework,
            boundary=self.boundary_kind, tag=self._tags.pop(seq, None), created=time.time(), software=self._software,
            places=self.info.places if len(self.info.places) > 1 else None, bases=bases_of(shards), shards=shards,
        )  # fmt: skip

    def retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        """Removes the manifests that retention no longer keeps, and all branch records but the newest.

        Raises OSError, InDoubt or OwnerError; `withdrawn` is called with each manifest that is gone for good here.
        """
        with self._lock:
            if not self._held:
                self._retire(withdrawn)

    def _retire(self, withdrawn: Callable[[AttemptId], None]) -> None:
        if self._known is None:
            self._known = self._manager.inventory().light()
        inventory = self._known
        gone = retired(
            inventory.lineage(), inventory.family(), keep_last=self._keep_last, keep_every_n_steps=self._keep_every,
            keep_tags=self._keep_tags, above=inventory.newest_damage,
        )  # fmt: skip
        for seq in gone:
            if seq in self._linked:
                continue
            self.owner.check()
            attempt = inventory.manifests[seq].attempt_id
            try:
                self._manager.withdraw(attempt)
            except BlockingIOError:
                continue  # somebody reads it, or has pinned it: the next commit asks again
            except InDoubt:
                self._returning[attempt] = inventory.manifests.pop(seq)  # a flush that failed is not tried again
                raise
            except OSError as error:
                leave(error, attempt.folder)
                self._linked.add(seq)  # it stays a checkpoint, and keeps what it refers to
                continue
            self._returning[attempt] = gone_now = inventory.manifests.pop(seq)
            self._bases_of_retired.update(gone_now.bases)
            withdrawn(attempt)
        for seq in sorted(inventory.branches)[:-1]:
            self.owner.check()
            self._manager.remove_branch(seq)
            del inventory.branches[seq]

    def collect_old(self, attempt: AttemptId) -> None:
        """Shards of this session are left to the ranks that wrote them, who may reuse them. Those of earlier sessions
        are removed here, since nothing knows which queued writes may still reach them.
        """
        with self._lock:
            self._returning.pop(attempt, None)
        if attempt.epoch == self.info.epoch:
            self._announced.append(attempt)
        else:
            self.owner.check()
            self._manager.collect(attempt)

    def unneeded(self) -> list[str]:
        """Bases that no checkpoint refers to, or ever will; each is named once. Raises OSError.

        None as long as there may be references that are not known: in a damaged manifest, or in one whose removal by an
        earlier session could not be flushed.
        """
        with self._lock:
            inventory, head = self._known, self._head
            if inventory is None or head is None or self._held:
                return []
            referring = self._referring(inventory)
            self._bases_are_used |= bool(inventory.bases) or any(manifest.bases for manifest in referring)
            unknown = inventory.damaged or any(attempt.epoch < self.info.epoch for attempt in inventory.unfinished)
            if not self._bases_are_used or unknown:
                return []
            there = sorted({*self._manager.bases(), *self._bases_of_retired})
            found = unneeded_bases(there, referring, below=head.seq)
            found = [base for base in found if base not in self._bases_named]
            self._bases_named.update(found)
            return found

    def _referring(self, known: Inventory) -> list[Manifest]:
        """Manifests whose bases stay: those that are there, and those that a crash may bring back."""
        return [*known.manifests.values(), *self._returning.values()]

    def remove_bases(self, bases: Iterable[str]) -> None:
        for base in bases:
            self.owner.check()
            self._manager.remove_base(base)

    def close(self) -> None:
        """REQUIRES: all ranks have left, or are given up. What they did not take of retired attempts is removed. Raises
        nothing.
        """
        try:
            if self._announced:
                self.owner.check()
            for attempt in self._announced:
                self._manager.collect(attempt)
        except (OSError, OwnerError) as error:
            log.warning("leftovers of retired checkpoints stay until the next start: %s", error)
        self.owner.let_go()


def follow(
    participant: Participant, committer: CommitRequests | None, head: ParentRef | None, branch_seq: int | None
) -> list[str]:
    """All ranks together: the next commit continues from `head`. With `branch_seq`, a branch record makes that durable,
    in every place, before it returns. Raises OSError, InDoubt, OwnerError or DamageError on every rank.

    Returns the bases that `head` refers to, which are there and stay as long as checkpoints refer to them.
    """

    def decide(_: list[Any]) -> tuple[str | None, list[str]]:
        if committer is None:
            return None, []
        return within(participant.disk_s, "the lineage's record", lambda: committer.follow(head, branch_seq))

    text, bases = participant.agree("continue the lineage", None, decide)
    if text is not None and participant.apart:
        kept = tried(participant.disk_s, WORK, lambda: participant.keep_branch(text))
        participant.agree("continue the lineage everywhere", kept, values)
    return list(bases)
