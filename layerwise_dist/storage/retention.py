# SPDX-License-Identifier: Apache-2.0
"""Which committed checkpoints, and which frozen parameters, may go. Pure: commit/ removes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from layerwise_dist.storage import filenames


class Commit(Protocol):
    @property
    def seq(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def tag(self) -> str | None: ...


class Referring(Protocol):
    @property
    def bases(self) -> list[str]: ...


def unneeded_bases(found: Iterable[str], manifests: Iterable[Referring], below: int | None = None) -> list[str]:
    """Of the bases that were found, those that no manifest refers to. REQUIRES: every manifest is known.

    While ranks write, only those of attempts before `below`, the newest commit's seq: what an attempt after it refers
    to is that commit's too, or its own, since no rank takes up again what it has stopped referring to.
    """
    needed = {base for manifest in manifests for base in manifest.bases}
    gone = []
    for base in found:
        wrote = filenames.parse_base(base)
        if base not in needed and wrote is not None and (below is None or wrote[1] < below):
            gone.append(base)
    return gone


def _series(tag: str) -> str:
    """What `global_step100` and `global_step200` have in common."""
    return re.sub(r"\d+", "0", tag)


def staying(
    lineage: Sequence[Commit], family: Iterable[Commit], *, keep_every_n_steps: int | None, keep_tags: int | None,
    above: int = 0,
) -> set[int]:  # fmt: skip
    """Seqs of commits that stay however many newer ones follow.

    Multiples of `keep_every_n_steps` in the lineage; what `restore(tag=...)` finds, which is the lineage's newest under
    each tag, or the newest under one that only abandoned branches have; and all that are older than `above`, the newest
    damaged commit. With `keep_tags`, of tags that differ in their digits only so many, the newest: those of the lineage
    before those of abandoned branches. `family` is all of the lineage and the abandoned branches that grew from the
    same start.
    """
    mine = {commit.seq for commit in lineage}
    by_preference = sorted(family, key=lambda commit: (commit.seq in mine, commit.seq))
    tagged = {commit.tag: commit.seq for commit in by_preference if commit.tag is not None}
    stay: set[int] = set()
    kept: Counter[str] = Counter()
    for tag, seq in sorted(tagged.items(), key=lambda item: (item[1] in mine, item[1]), reverse=True):
        if keep_tags is None or kept[_series(tag)] < keep_tags:
            stay.add(seq)
            kept[_series(tag)] += 1
    for commit in by_preference:
        archived = keep_every_n_steps is not None and commit.seq in mine and commit.step % keep_every_n_steps == 0
        if archived or commit.seq < above:
            stay.add(commit.seq)
    return stay


def retired(
    lineage: Sequence[Commit],
    family: Sequence[Commit],
    *,
    keep_last: int,
    keep_every_n_steps: int | None,
    keep_tags: int | None = None,
    above: int = 0,
) -> list[int]:
    """Seqs that retention may remove, oldest first.

    `lineage` is newest first. A commit goes only when `keep_last` newer commits of the lineage are durable, and it is
    not `staying`. Checkpoints of unrelated lineages (a `fresh=True` start in the same directory) are not of the family.
    """
    if len(lineage) <= keep_last:
        return []
    oldest_kept = lineage[keep_last - 1].seq
    stay = staying(lineage, family, keep_every_n_steps=keep_every_n_steps, keep_tags=keep_tags, above=above)
    return sorted(commit.seq for commit in family if commit.seq < oldest_kept and commit.seq not in stay)
