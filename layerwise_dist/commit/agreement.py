# SPDX-License-Identifier: Apache-2.0
"""Agreement among all ranks: either all succeed, or the same error is raised on all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from layerwise_dist.commit.messages import Agree, Agreed, Closed, DescribedError, Gone, Outcome
from layerwise_dist.commit.transports import Transport
from layerwise_dist.commit.votes import describe_error, rebuild_error
from layerwise_dist.commit.waits import Waits
from layerwise_dist.errors import CommitError, DamageError

log = logging.getLogger("layerwise_dist")

T = TypeVar("T")


class Agreement:
    """One rank's part in rounds of votes, which rank 0 decides; and, on rank 0, which ranks have left.

    Rounds go by their number, so all ranks have them in the same order.
    """

    def __init__(self, transport: Transport, waits: Waits, timeout_s: float) -> None:
        """`timeout_s` seconds are a round's deadline if it has none of its own."""
        self._transport, self._waits, self._timeout_s = transport, waits, timeout_s
        self._rounds = 0
        self._votes: dict[str, dict[int, Any]] = {}  # by round, of those that are not decided
        self._decisions: dict[str, Outcome] = {}  # by round, of those that were not taken up
        self._left: set[int] = set()
        self._gone: dict[int, str] = {}  # of those, the ones that left without a word, and why

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any], timeout_s: float | None) -> Any:
        """As `Participant.agree`."""
        timeout = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout
        self._rounds += 1
        key = f"{self._rounds}:{what}"
        self._transport.post({"t": "agree", "key": key, "rank": self._transport.rank, "payload": payload})
        if self._transport.rank == 0:
            self._decide(key, what, decide, timeout, deadline)
        with self._waits.changed:
            self._waits.wait_for(
                lambda: key in self._decisions, deadline, lambda: f"{what}: waited {timeout:g} s for rank 0's decision"
            )
            decision = self._decisions.pop(key)
        if "error" in decision:
            raise rebuild_error(decision["error"])
        return decision["value"]

    def _decide(self, key: str, what: str, decide: Callable[[list[Any]], Any], timeout: float, deadline: float) -> None:
        """Rank 0: waits for all votes, and tells all what follows from them."""
        ranks = set(range(self._transport.world_size))
        with self._waits.changed:
            votes = self._votes.setdefault(key, {})
            self._waits.wait_for(
                lambda: len(votes) == len(ranks) or self._left - votes.keys(), deadline,
                lambda: f"{what}: waited {timeout:g} s for rank(s) {sorted(ranks - votes.keys())}",
            )  # fmt: skip
            del self._votes[key]
            gone = {rank: self._gone.get(rank, "it has left") for rank in self._left - votes.keys()}
        decision: Outcome
        try:
            if gone:
                raise CommitError(f"{what}: " + "; ".join(f"rank {rank}: {why}" for rank, why in gone.items()))
            decision = {"value": decide([votes[rank] for rank in sorted(ranks)])}
        except Exception as error:  # the other ranks wait for a decision
            decision = {"error": describe_error(error)}
        self._transport.announce({"t": "agreed", "key": key, "decision": decision})

    def voted(self, message: Agree) -> None:
        """Rank 0 hears a rank's vote. REQUIRES: the lock is held, here and below."""
        self._votes.setdefault(message["key"], {})[message["rank"]] = message["payload"]

    def decided(self, message: Agreed) -> None:
        """This rank hears what rank 0 decided."""
        self._decisions[message["key"]] = message["decision"]

    def left(self, message: Closed | Gone) -> None:
        """Rank 0 hears that nothing more comes from a rank."""
        self._left.add(message["rank"])
        if message["t"] == "gone":
            self._gone[message["rank"]] = message["why"]

    def missing(self) -> list[int]:
        """Rank 0: the ranks that have not left."""
        return sorted(set(range(self._transport.world_size)) - self._left)


class Agreeing(Protocol):
    """One that votes for its rank (`participant.Participant`)."""

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any]) -> Any: ...


def together(participant: Agreeing, what: str, action: Callable[[], T]) -> tuple[bool, T | None]:
    """Runs `action` on every rank. (True, its value) if it went well everywhere, (False, None) if some rank found
    damage, which every rank logs. Any other exception of any rank is raised on all of them; one that nobody expected as
    a CommitError, from the exception itself where it was raised.
    """
    vote: dict[str, Any] = {}
    value: T | None = None
    met: Exception | None = None
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
            described: DescribedError = error.copy()
            described["message"] = f"rank {rank}: {error['message']}"
            raise rebuild_error(described)
        return {"damage": [f"rank {rank}: {vote['damage']}" for rank, vote in enumerate(votes) if "damage" in vote]}

    try:
        decision = participant.agree(what, vote, decide)
    except Exception as error:
        raise error from met
    for message in decision["damage"]:
        log.warning("%s: %s", what, message)
    return not decision["damage"], value
