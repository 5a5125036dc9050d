# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a job make together of what each has found that fits: it is refused, or rank 0 says what moves."""

from __future__ import annotations

import logging

from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import named
from layerwise_dist.restore.anywhere import Fit
from layerwise_dist.restore.loader import another_model, listing

log = logging.getLogger("layerwise_dist")

_NAMED = 8  # in a warning


def refuse(participant: Participant, where: str, fit: Fit) -> None:
    """All ranks together. Raises MismatchError for what does not fit on any of them, and for what has no place on any.

    `where` is the checkpoint.
    """

    def decide(votes: list[list[list[str]]]) -> None:
        found = [(rank, problems) for rank, (problems, _) in enumerate(votes) if problems]
        unknown = sorted(set.intersection(*(set(names) for _, names in votes)))
        said = (found[0][1] if found else []) + listing("unexpected in the checkpoint", unknown)
        if said:
            raise another_model(f"rank {found[0][0]}: {where}" if found else where, said)

    participant.agree("compare what fits", [fit.problems, sorted(fit.unknown)], decide)


def say_moved(manifest: Manifest, world_size: int, fit: Fit) -> None:
    """`world_size` of this job. Warns of what is another one from here on."""
    if manifest.world_size != world_size:
        log.warning(
            "step %d was written by %d rank(s), this job has %d: unless you change the batch of each rank, the "
            "global batch differs from here on",
            manifest.step, manifest.world_size, world_size,
        )  # fmt: skip
    if fit.taken:
        log.warning(
            "step %d: its ranks differ in %s; buffers are rank 0's from here on, and so is what new ranks take",
            manifest.step, named(fit.taken, _NAMED),
        )  # fmt: skip
    if fit.lost:
        log.warning("step %d: %s of the checkpoint has no place here", manifest.step, " and ".join(fit.lost))
