# SPDX-License-Identifier: Apache-2.0
"""Merges what the directories of several nodes hold at the start of a session."""

from __future__ import annotations

import logging
import uuid

from layerwise_dist.commit.opening import Seen, StartPlan, too_few
from layerwise_dist.errors import DirectoryError
from layerwise_dist.storage import filenames
from layerwise_dist.storage.filenames import AttemptId

log = logging.getLogger("layerwise_dist")


def merge(found: list[Seen], root: str, *, fresh: bool) -> StartPlan:
    """What the places make together. Raises DirectoryError where they cannot be of one job's disks."""
    identities = {each["identity"] for each in found if each["identity"] is not None}
    if len(identities) > 1:
        said = "; ".join(f"{_whose(each)}: {each['identity']}" for each in found if each["identity"] is not None)
        raise DirectoryError(f"{root} holds checkpoints of different jobs ({said}): is a mount missing?")
    manifests = {each[1]: each for place in found for each in sorted(place["manifests"])}
    _check_one_history(found, root)
    bare = [each for each in found if each["identity"] is None]
    full = [each for each in found if not each["empty"]]
    if bare and full and not fresh:
        newest = manifests[max(manifests)] if manifests else None
        missing = _missing(found, newest)
        there = f"{'; '.join(map(_whose, full))}: checkpoints up to step {newest[2] if newest else 0}"
        if missing is None or missing:
            lost = f", whose shards of ranks {_spans(missing)} are on no node of this job" if missing else ""
            raise DirectoryError(
                f"{'; '.join(map(_whose, bare))}: {root} holds nothing, and {there}{lost}. Was a disk replaced, or is "
                "a mount missing? Bring that node's directory back from a copy, or start anew with attach(fresh=True). "
                f"To continue from an older step without it, copy {filenames.IDENTITY} of another node there"
            )
        log.warning("%s: %s holds nothing; %s, and all of its shards", "; ".join(map(_whose, bare)), root, there)
    lacking: list[tuple[str, list[Seen]]] = []
    for attempt in manifests.values():
        lacking.append((AttemptId(*attempt).folder, [place for place in found if attempt in place["manifests"]]))
    for seq in sorted({seq for place in found for seq in place["branches"]}):
        lacking.append((filenames.branch_file(seq), [place for place in found if seq in place["branches"]]))
    epoch, last_seq = max(each["epoch"] for each in found), max(each["last_seq"] for each in found)
    if problem := too_few(root, epoch, last_seq):
        raise DirectoryError(problem)
    return StartPlan(
        session=uuid.uuid4().hex,
        identity=identities.pop() if identities else uuid.uuid4().hex,
        epoch=epoch + 1,
        first_seq=last_seq + 1,
        empty=all(each["empty"] for each in found),
        kept=[*manifests.values(), *(each for place in found for each in place["doubtful"])],
        lacking=[
            (name, have[0]["ranks"][0], [each["ranks"][0] for each in found if each not in have])
            for name, have in lacking
            if len(have) < len(found)
        ],
        pinned=[list(each) for each in sorted({tuple(each) for place in found for each in place["pinned"]})],
        host=found[0]["host"],
    )


def _check_one_history(found: list[Seen], root: str) -> None:
    """Raises DirectoryError where jobs continued on some nodes without the others, and on those without these."""
    of_seq: dict[int, tuple[str, str, Seen]] = {}
    for place in found:
        for seq, name, session in place["records"]:
            other, its, where = of_seq.setdefault(seq, (name, session, place))
            if (other, its) != (name, session):
                raise DirectoryError(
                    f"{root}: {other} on {_whose(where)} and {name} on {_whose(place)} are of different sessions and "
                    "have one number: different jobs continued on these nodes. Start with the nodes of one of "
                    "them, or move the directory of the other away"
                )


def _missing(found: list[Seen], newest: list[int] | None) -> list[int] | None:
    """Ranks whose shards of the newest commit are on no node; None if it is not known."""
    if newest is None:
        return None
    text = AttemptId(*newest).text
    have = {rank for place in found for rank in place["shards"].get(text, ())}
    world_size = next(place["world_size"] for place in found if newest in place["manifests"])
    return [rank for rank in range(world_size) if rank not in have]


def _whose(found: Seen) -> str:
    ranks = found["ranks"]
    return f"rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)} on {found['host']}"


def _spans(ranks: list[int]) -> str:
    """``0-3, 8``"""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
