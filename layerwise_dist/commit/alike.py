# SPDX-License-Identifier: Apache-2.0
"""Compares what ranks claim to hold alike, for each checkpoint, in the coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise_dist.commit.messages import AlikeSaid

_WAY_OUT = (
    "If they are meant to differ, tell the wrapper (DDP ignores what "
    "_set_params_and_buffers_to_ignore_for_model names), or set replicas = 'apart': then each rank saves its own"
)


@dataclass(frozen=True, slots=True)
class Unlike:
    """Of `ranks`, two do not hold the same: other parameters (`final`), or not the same optimizer state."""

    ranks: str
    why: str
    final: bool


class Alike:
    """Of one attempt: for each group of ranks what the first of them said, with which all others must agree."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, str, str, str, list[str]]] = {}

    def compare(self, message: AlikeSaid) -> Unlike | None:
        """Takes one rank's ``alike``: the first group in it that does not fit what another rank said."""
        rank = message["rank"]
        for ranks, listing, params, state, what, new in message["groups"]:
            other, *first, news = self._first.setdefault(ranks, (rank, listing, params, state, new))
            sides = f"ranks {min(rank, other)} and {max(rank, other)}"
            if first[0] == listing and first[1] != params:
                return Unlike(ranks, unequal(what, sides), final=True)
            # Of another listing the samples are of other tensors. What is new is said once: a rank that took no part in
            # an attempt may say it of another one.
            if first != [listing, params, state] or (news[:1] == new[:1] and news != new):
                why = (
                    f"{sides} do not have the same optimizer state for what ranks {ranks} are said to hold alike; from "
                    "now on each of them saves its own"
                )
                return Unlike(ranks, why, final=False)
        return None


def unequal(what: str, sides: str) -> str:
    """What is wrong where replicas are none, in words."""
    return (
        f"{sides} hold different values of {what}, which their wrapper says they hold alike: trained under no_sync(), "
        f"changed on one rank, or computed with other bits there? A checkpoint would mix them. {_WAY_OUT}"
    )
