"""All ranks restore the same commit, or all raise the same error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from layerwise_dist.commit.metadata import Inventory, Manifest
from layerwise_dist.commit.participant import Participant, describe_error, rebuild_error
from layerwise_dist.errors import DamageError, LayerwiseError, NotFoundError
from layerwise_dist.storage.layout import AttemptId

log = logging.getLogger("layerwise_dist")


def candidates(inventory: Inventory, step: int | None, root: str) -> list[Manifest]:
    """What may be restored, best first. Raises NotFoundError when a step is asked for that is not there."""
    lineage = inventory.lineage()
    if step is None:
        return lineage
    for manifest in [*lineage, *sorted(inventory.manifests.values(), key=lambda m: -m.seq)]:
        if manifest.step == step:
            return [manifest]
    there = sorted({manifest.step for manifest in inventory.manifests.values()})
    raise NotFoundError(f"{root} has no committed checkpoint of step {step}; committed are {there or 'none'}")


def offer(participant: Participant, read: Callable[[], Inventory], step: int | None, root: str) -> list[AttemptId]:
    """Rank 0's candidates, on every rank. Damaged records are warned about by rank 0, with what is wrong with them."""

    def decide(_: list[Any]) -> list[list[int]]:
        inventory = read()
        for message in inventory.damaged.values():
            log.warning("skipped: %s", message)
        if step is None and inventory.lost_branch is not None:
            raise DamageError(
                f"{inventory.lost_branch}; it said from which commit the newest branch goes on: "
                "choose one yourself with restore(step=...)"
            )
        return [[m.epoch, m.seq, m.step] for m in candidates(inventory, step, root)]

    chosen = participant.agree("choose a checkpoint", None, decide)
    return [AttemptId(*item) for item in chosen]


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
