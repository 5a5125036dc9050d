"""Which committed checkpoints may go, and which frozen parameters. Pure: it names them, commit/ removes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from layerwise_dist.storage import layout


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

    While ranks write, only those of attempts before `below`, the newest commit's seq: what an attempt behind it refers
    to is that commit's too, or its own, since no rank takes up again what it has stopped referring to.
    """
    needed = {base for manifest in manifests for base in manifest.bases}
    gone = []
    for base in found:
        wrote = layout.parse_base(base)
        if base not in needed and wrote is not None and (below is None or wrote[1] < below):
            gone.append(base)
    return gone


def retired(
    lineage: Sequence[Commit], family: Iterable[Commit], *, keep_last: int, keep_every_n_steps: int | None
) -> list[int]:
    """Seqs that retention may remove, oldest first.

    `lineage` is newest first; `family` also holds the abandoned branches that grew from the same first commit. A commit
    goes only when `keep_last` newer commits of the lineage are durable; multiples of `keep_every_n_steps` in the
    lineage stay, and so does the newest commit under each tag. Checkpoints of unrelated lineages (a `fresh=True` start
    in the same directory) are not named.
    """
    if len(lineage) <= keep_last:
        return []
    oldest_kept = lineage[keep_last - 1].seq
    mine = {commit.seq for commit in lineage}
    family = sorted(family, key=lambda commit: commit.seq)
    tagged = set({commit.tag: commit.seq for commit in family if commit.tag is not None}.values())
    gone = []
    for commit in family:
        archived = keep_every_n_steps is not None and commit.seq in mine and commit.step % keep_every_n_steps == 0
        if commit.seq < oldest_kept and not archived and commit.seq not in tagged:
            gone.append(commit.seq)
    return gone
