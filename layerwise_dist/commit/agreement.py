"""What all ranks do together goes well on all of them, or the same error is raised on all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from layerwise_dist.commit.participant import Participant
from layerwise_dist.commit.votes import describe_error, rebuild_error
from layerwise_dist.errors import DamageError

log = logging.getLogger("layerwise_dist")


def together(participant: Participant, what: str, action: Callable[[], Any]) -> tuple[bool, Any]:
    """Runs `action` on every rank. (True, its value) if it went well everywhere, (False, None) if some rank found
    damage, which every rank logs. Any other exception of any rank is raised on all of them; one that nobody expected as
    a CommitError, from the exception itself where it was raised.
    """
    vote: dict[str, Any] = {}
    value = met = None
    try:
        value = action()
    except DamageError as error:
        vote = {"damage": str(error)}
    except Exception as error:
        vote, met = {"error": describe_error(error)}, error

    def decide(votes: list[dict[str, Any]]) -> dict[str, Any]:
        errors = [(rank, vote["error"]) for rank, vote in enumerate(votes) if "error" in vote]
        if errors:
            rank, error = errors[0]
            raise rebuild_error({**error, "message": f"rank {rank}: {error['message']}"})
        return {"damage": [f"rank {rank}: {vote['damage']}" for rank, vote in enumerate(votes) if "damage" in vote]}

    try:
        decision = participant.agree(what, vote, decide)
    except Exception as error:
        raise error from met
    for message in decision["damage"]:
        log.warning("%s: %s", what, message)
    return not decision["damage"], value
