# SPDX-License-Identifier: Apache-2.0
"""The records of a directory taken together: the commits, the damage, and the lineage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from layerwise_dist.commit.records import Branch, Manifest, Span
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId


@dataclass(frozen=True, slots=True)
class Inventory:
    """What lies in a directory: sound manifests and branch records by seq, damage, and everything without a manifest.

    `bases` are the attempts that have a folder of frozen parameters. `identity` is the directory's, None where
    its file is missing or damaged. `odd` are entries whose names are like ours and are none, with what is wrong.
    `taken` are seqs for which no branch record can be written, since something that is not ours lies there.
    """

    manifests: dict[int, Manifest]
    branches: dict[int, Branch]
    damaged: dict[str, str]
    unfinished: list[AttemptId]
    bases: list[str] = field(default_factory=list)
    identity: str | None = None
    odd: dict[str, str] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.manifests and not self.branches and not self.damaged

    @property
    def last_seq(self) -> int:
        seqs = [*self.manifests, *self.branches, *(attempt.seq for attempt in self.unfinished)]
        seqs += [*self._damaged_seqs, *self._damaged_branches, *self.taken]
        seqs += [seq for _, seq in self._wrote_bases]
        return max(seqs, default=0)

    @property
    def identities(self) -> Counter[str]:
        """What the sound records say whose they are, with how many say so."""
        records: list[Manifest | Branch] = [*self.manifests.values(), *self.branches.values()]
        return Counter(record.identity for record in records)

    @property
    def newest(self) -> Manifest | Branch | None:
        """The sound record of this directory that was written last."""
        records: dict[int, Manifest | Branch] = {**self.manifests, **self.branches}
        mine = [seq for seq, record in records.items() if self.identity in (None, record.identity)]
        return records[max(mine)] if mine else None

    @property
    def damaged_commits(self) -> dict[AttemptId, str]:
        """What is wrong with damaged manifests, by what the folder's name says."""
        named = ((filenames.parse_folder(name), problem) for name, problem in self.damaged.items())
        return {attempt: problem for attempt, problem in named if attempt is not None}

    @property
    def _damaged_seqs(self) -> list[int]:
        return [attempt.seq for attempt in self.damaged_commits]

    @property
    def newest_damage(self) -> int:
        """The seq of the newest damaged manifest; 0 if there is none. Retention leaves what is older alone."""
        return max(self._damaged_seqs, default=0)

    @property
    def _damaged_branches(self) -> dict[int, str]:
        named = ((filenames.parse_branch(name), problem) for name, problem in self.damaged.items())
        return {seq: problem for seq, problem in named if seq is not None}

    @property
    def lost(self) -> str | None:
        """Why it is unclear where the lineage continues, if it is. Any guess could bring an abandoned branch back.

        The newest branch record is never removed. So if newer commits than the newest sound record are damaged, either
        they are of its own branch, or the damaged record of theirs is here.
        """
        newest = self.newest
        for seq, problem in self._damaged_branches.items():
            if newest is None or seq > newest.seq:
                return f"{problem}; it said which commit the newest branch continues"
        if newest is None and self.manifests:
            return f"every checkpoint here is of another directory than {filenames.IDENTITY} ({self.identity})"
        if newest is None or self.dangling is None:
            return None
        newer = [problem for attempt, problem in self.damaged_commits.items() if attempt.seq > newest.seq]
        return "; ".join([*newer, self.dangling])

    @property
    def dangling(self) -> str | None:
        """What is wrong with the newest sound record if that is a branch record whose parent is gone.

        Retention removes that only when there are newer commits on the branch.
        """
        newest = self.newest
        parent = newest.parent if isinstance(newest, Branch) else None
        if newest is None or parent is None or parent.seq in self._damaged_seqs:
            return None
        found = self.manifests.get(parent.seq)
        if found is not None and found.ref == parent:
            return None
        return (
            f"{filenames.branch_file(newest.seq)}: the commit that it continues (seq {parent.seq}, attempt "
            f"{parent.attempt}) is not there"
        )

    def lineage(self) -> list[Manifest]:
        """The commits that restore may choose from, newest first: what the newest record descends from. None if that is
        `lost`. A commit that is missing or damaged hides none before it. One that was copied here from elsewhere counts
        only if it is gone on from.
        """
        newest = self.newest
        if newest is None or self.lost is not None:
            return []

        def belongs(manifest: Manifest) -> bool:
            mine = manifest.identity == newest.identity and any(span.holds(manifest.seq) for span in newest.spans)
            return mine or manifest.ref == newest.parent

        return sorted(filter(belongs, self.manifests.values()), key=lambda manifest: -manifest.seq)

    def lineage_damage(self) -> dict[AttemptId, str]:
        """What is wrong with damaged manifests that are, or may be, of the lineage."""
        newest = self.newest
        if newest is None:
            return self.damaged_commits

        def belongs(seq: int) -> bool:
            return seq > newest.seq or any(span.holds(seq) for span in newest.spans)

        return {attempt: problem for attempt, problem in self.damaged_commits.items() if belongs(attempt.seq)}

    def family(self) -> list[Manifest]:
        """The lineage, and the abandoned branches that have grown from the same start; oldest first."""
        newest = self.newest
        if newest is None or self.lost is not None:
            return []
        mine = (newest.identity, newest.root)
        return [found for _, found in sorted(self.manifests.items()) if (found.identity, found.root) == mine]

    def spans_after(self, parent: Manifest | None) -> list[Span]:
        """What a branch that continues from `parent` descends from, as far as there is anything left of it."""
        there = [*self.manifests, *(attempt.seq for attempt in self.damaged_commits)]
        return [span for span in (parent.spans if parent is not None else []) if any(map(span.holds, there))]

    def is_next(self, manifest: Manifest) -> bool:
        """Whether the lineage continues from this commit with nothing left behind: no newer commit of it, sound or
        damaged.
        """
        newest = self.newest
        if newest is None or self.newest_damage > newest.seq:
            return False
        return manifest.ref == (newest.ref if isinstance(newest, Manifest) else newest.parent)

    @property
    def last_epoch(self) -> int:
        epochs = [manifest.epoch for manifest in self.manifests.values()] + [a.epoch for a in self.unfinished]
        epochs += [attempt.epoch for attempt in self.damaged_commits]
        epochs += [epoch for epoch, _ in self._wrote_bases]
        return max(epochs, default=0)

    @property
    def _wrote_bases(self) -> list[tuple[int, int]]:
        return [found for base in self.bases if (found := filenames.parse_base(base)) is not None]

    def light(self) -> Inventory:
        """Without the lists of shards, which are most of it: enough to know the lineage by. Its own to change."""
        manifests = {seq: manifest.light() for seq, manifest in self.manifests.items()}
        return replace(
            self, manifests=manifests, branches=dict(self.branches), damaged=dict(self.damaged),
            unfinished=list(self.unfinished), bases=list(self.bases), taken=list(self.taken),
        )  # fmt: skip


def drop_copies(
    of_seq: dict[int, dict[str, Manifest | Branch]],
    identity: str | None,
    manifests: dict[int, Manifest],
    branches: dict[int, Branch],
    damaged: dict[str, str],
) -> None:
    """Of several records of one seq (`of_seq`, by file) only the directory's own stays; the rest are `damaged`."""
    for seq, found in of_seq.items():
        if len(found) == 1:
            continue
        mine = [record for record in found.values() if record.identity == identity]
        manifests.pop(seq, None)
        branches.pop(seq, None)
        if len(mine) == 1:  # the others came from elsewhere
            (own,) = mine
            if isinstance(own, Manifest):
                manifests[seq] = own
            else:
                branches[seq] = own
        # Else which of them the lineage means can't be told.
        for name in found:
            if len(mine) != 1 or found[name] is not mine[0]:
                others = ", ".join(other for other in found if other != name)
                damaged[name] = f"{name}: {others} has the same seq: one of them was copied here"
