# SPDX-License-Identifier: Apache-2.0
"""Chooses the commit to restore: the same on all ranks, or the same error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layerwise_dist.commit.metadata import Inventory
from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, NotFoundError
from layerwise_dist.storage.filenames import AttemptId

log = logging.getLogger("layerwise_dist")


@dataclass(frozen=True, slots=True)
class Candidate:
    """`leaves`: whether commits of the lineage are left behind with it. `apart`: whether its shards lay on disks of
    nodes when it was made.
    """

    attempt: AttemptId
    leaves: bool
    apart: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """Which checkpoint is asked for: that of a step, the newest under a tag, the lineage's newest that has any tag
    (`saved`), or else the lineage's newest.
    """

    step: int | None = None
    tag: str | None = None
    saved: bool = False

    @property
    def certain(self) -> bool:
        """Whether exactly one will do, on whichever branch it lies."""
        return self.step is not None or self.tag is not None

    def fits(self, step: int, tag: str | None) -> bool:
        """Whether a commit is what is asked for for certain."""
        return step == self.step if self.tag is None else tag == self.tag

    def __str__(self) -> str:
        if self.tag is not None:
            return f"checkpoint under the tag {self.tag!r}"
        return "checkpoint" if self.step is None else f"checkpoint of step {self.step}"


def candidates(inventory: Inventory, wish: Wish, root: str) -> list[Manifest]:
    """What may be restored, best first. Raises NotFoundError when one is asked for that is not there, and DamageError
    where damage leaves it open which one it is.
    """
    lineage = inventory.lineage()
    if not wish.certain:
        if inventory.lost is not None:
            raise DamageError(f"{inventory.lost}: {_others(inventory)}")
        found = [manifest for manifest in lineage if manifest.tag is not None or not wish.saved]
        if not found and (damage := inventory.lineage_damage()):
            raise DamageError(
                f"no checkpoint of the lineage in {root} is sound ({_said(damage)}), and those of other branches "
                f"are never chosen automatically: {_others(inventory)}"
            )
        return found
    chosen = next((manifest for manifest in _by_preference(inventory) if wish.fits(manifest.step, manifest.tag)), None)
    if chosen is not None and chosen in lineage:
        return [chosen]
    damage = inventory.damaged_commits if chosen is None else inventory.lineage_damage()
    damage = {attempt: problem for attempt, problem in damage.items() if wish.tag or attempt.step == wish.step}
    if damage and inventory.lost is None:
        other = f"; {chosen.attempt_id.folder} is of another branch" if chosen is not None else ""
        raise DamageError(
            f"the {wish} may be a damaged one ({_said(damage)}){other}: {_others(inventory)}, or move away what is "
            "damaged"
        )
    if chosen is not None:
        return [chosen]
    there: list[int] | list[str] = sorted({manifest.step for manifest in inventory.manifests.values()})
    if wish.tag is not None:
        there = sorted({manifest.tag for manifest in inventory.manifests.values() if manifest.tag is not None})
    raise NotFoundError(f"{root} has no committed {wish}; committed are {there or 'none'}")


def passed_by(inventory: Inventory, chosen: Manifest, wish: Wish) -> list[str]:
    """What is wrong with each newer commit of the lineage whose record is damaged, where the newest is asked for."""
    damage = inventory.lineage_damage() if not wish.certain else {}
    return [problem for attempt, problem in damage.items() if attempt.seq > chosen.seq]


def tell_passed_by(inventory: Inventory, chosen: Manifest, wish: Wish) -> None:
    """Warns of what was `passed_by`."""
    for problem in passed_by(inventory, chosen, wish):
        log.warning("passed by: %s", problem)


def _by_preference(inventory: Inventory) -> list[Manifest]:
    """The lineage's before others, then the newest first."""
    return [*inventory.lineage(), *sorted(inventory.manifests.values(), key=lambda manifest: -manifest.seq)]


def _said(damage: dict[AttemptId, str]) -> str:
    return "; ".join(problem for _, problem in sorted(damage.items(), key=lambda item: -item[0].seq))


def _others(inventory: Inventory) -> str:
    steps = sorted({manifest.step for manifest in inventory.manifests.values()})
    return f"choose one yourself with restore(step=...); committed and sound are {steps or 'none'}"


def offer(participant: Participant, read: Callable[[], Inventory], wish: Wish, root: str) -> list[Candidate]:
    """Rank 0's candidates, on every rank.

    Damaged records are warned about by rank 0, with what is wrong with them. Raises as `candidates`, on every rank.
    """

    def decide(_: list[Any]) -> list[list[Any]]:
        inventory = read()
        for message in inventory.damaged.values():
            log.warning("skipped: %s", message)
        found = candidates(inventory, wish, root)
        return [[m.epoch, m.seq, m.step, wish.certain or not inventory.is_next(m), m.places is not None] for m in found]

    chosen = participant.agree("choose a checkpoint", None, decide)
    return [Candidate(AttemptId(epoch, seq, step), leaves, apart) for epoch, seq, step, leaves, apart in chosen]
