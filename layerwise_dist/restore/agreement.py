"""All ranks restore the same commit, or all raise the same error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layerwise_dist.commit.metadata import Inventory
from layerwise_dist.commit.participant import Participant, describe_error, rebuild_error
from layerwise_dist.commit.records import Manifest
from layerwise_dist.errors import DamageError, LayerwiseError, NotFoundError
from layerwise_dist.storage.layout import AttemptId

log = logging.getLogger("layerwise_dist")


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

    def __str__(self) -> str:
        if self.tag is not None:
            return f"checkpoint under the tag {self.tag!r}"
        return "checkpoint" if self.step is None else f"checkpoint of step {self.step}"


def candidates(inventory: Inventory, wish: Wish, root: str) -> list[Manifest]:
    """What may be restored, best first. Raises NotFoundError when one is asked for that is not there."""
    lineage = inventory.lineage()
    if not wish.certain:
        return [manifest for manifest in lineage if manifest.tag is not None or not wish.saved]
    for manifest in [*lineage, *sorted(inventory.manifests.values(), key=lambda m: -m.seq)]:
        if manifest.step == wish.step or (wish.tag is not None and manifest.tag == wish.tag):
            return [manifest]
    there: list[Any] = sorted({manifest.step for manifest in inventory.manifests.values()})
    if wish.tag is not None:
        there = sorted({manifest.tag for manifest in inventory.manifests.values() if manifest.tag is not None})
    raise NotFoundError(f"{root} has no committed {wish}; committed are {there or 'none'}")


def offer(
    participant: Participant, read: Callable[[], Inventory], wish: Wish, root: str
) -> list[tuple[AttemptId, bool]]:
    """Rank 0's candidates, on every rank, each with whether newer commits of the lineage are left behind with it.

    Damaged records are warned about by rank 0, with what is wrong with them.
    """

    def decide(_: list[Any]) -> list[list[Any]]:
        inventory = read()
        for message in inventory.damaged.values():
            log.warning("skipped: %s", message)
        if not wish.certain and inventory.lost_branch is not None:
            raise DamageError(
                f"{inventory.lost_branch}; it said from which commit the newest branch goes on: "
                "choose one yourself with restore(step=...)"
            )
        newest = inventory.lineage()[:1]

        def leaves(manifest: Manifest) -> bool:
            return wish.certain or (wish.saved and [manifest] != newest)

        return [[m.epoch, m.seq, m.step, leaves(m)] for m in candidates(inventory, wish, root)]

    chosen = participant.agree("choose a checkpoint", None, decide)
    return [(AttemptId(epoch, seq, step), leaves) for epoch, seq, step, leaves in chosen]


def together(participant: Participant, what: str, action: Callable[[], Any]) -> tuple[bool, Any]:
    """Runs `action` on every rank. (True, its value) if it went well everywhere, (False, None) if some rank found
    damage, which every rank logs. Any other error of any rank is raised on all of them.
    """
    vote: dict[str, Any] = {}
    value = None
    try:
        value = action()
    except DamageError as error:
        vote = {"damage": str(error)}
    except (LayerwiseError, OSError) as error:
        vote = {"error": describe_error(error)}

    def decide(votes: list[dict[str, Any]]) -> dict[str, Any]:
        errors = [(rank, vote["error"]) for rank, vote in enumerate(votes) if "error" in vote]
        if errors:
            rank, error = errors[0]
            raise rebuild_error({**error, "message": f"rank {rank}: {error['message']}"})
        return {"damage": [f"rank {rank}: {vote['damage']}" for rank, vote in enumerate(votes) if "damage" in vote]}

    decision = participant.agree(what, vote, decide)
    for message in decision["damage"]:
        log.warning("%s: %s", what, message)
    return not decision["damage"], value
