# SPDX-License-Identifier: Apache-2.0
"""Compares the ranks' configurations at the start: one that differs, or is bad, is an error on all of them.

First over the job's default group, if there is one: ranks that would meet in different ways would wait for each other.
Then all other keys, over the session's own messages, which have deadlines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from layerwise_dist.commit.agreement import Agreeing
from layerwise_dist.commit.transports.rendezvous import Gather
from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.config.ranks import MEETING, common
from layerwise_dist.errors import ConfigError, shown
from layerwise_dist.tensors.slices import ranks_text

_PROBLEM = 480  # characters of ASCII; JSON may need two for each: a gather's record has 1024 bytes
_LISTED = 4  # values of one key


def compare_meeting(config: LayerwiseConfig, problem: ConfigError | None, gather: Gather) -> None:
    """Collective, for ranks that are not enabled too: the keys that decide how ranks meet. `problem`: this rank's
    configuration is bad, and `config` stands in for it. Raises ConfigError, on all ranks alike.
    """
    mine = {key: value for key, value in common(config).items() if key in MEETING}
    if problem is not None:
        text = shown(str(problem), _PROBLEM).encode("ascii", "backslashreplace").decode()
        mine = {"problem": text[:_PROBLEM]}
    said = gather(mine)
    try:
        _raise_problem([each.get("problem") for each in said])
    except ConfigError as error:
        raise error from problem
    _raise_difference(said)


def compare(participant: Agreeing, config: LayerwiseConfig, problem: ConfigError | None) -> None:
    """All ranks together. As `compare_meeting`, for all keys that must be the same."""
    mine = common(config)
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()

    def decide(votes: list[dict[str, str]]) -> bool:
        _raise_problem([vote.get("problem") for vote in votes])
        return len({vote["digest"] for vote in votes}) == 1

    vote = {"digest": digest} if problem is None else {"problem": str(problem)}
    try:
        same = participant.agree("compare the configurations", vote, decide)
    except ConfigError as error:
        raise error from problem
    if not same:
        participant.agree("name what differs", mine, _raise_difference)


def _raise_problem(said: Sequence[str | None]) -> None:
    for rank, problem in enumerate(said):
        if problem is not None:
            raise ConfigError(f"rank {rank}: {problem}")


def _raise_difference(said: Sequence[Mapping[str, str]]) -> None:
    """By rank, the text of each key's value."""
    found = [
        f"{key} = {_sides([each.get(key, 'unknown') for each in said])}"
        for key in dict.fromkeys(key for each in said for key in each)
        if len({each.get(key) for each in said}) > 1
    ]
    if found:
        raise ConfigError(
            f"the ranks' configurations differ: {'; '.join(found)}. Give every rank the same; docs/configuration.md "
            "says which keys may differ"
        )


def _sides(values: Sequence[str]) -> str:
    by: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        by.setdefault(value, []).append(rank)
    sides = [
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {ranks_text(ranks) or ranks[0]}" for value, ranks in by.items()
    ]
    more = [f"{len(sides) - _LISTED} more values"] if len(sides) > _LISTED else []
    *first, last = [*sides[:_LISTED], *more]
    return f"{', '.join(first)} and {last}"
