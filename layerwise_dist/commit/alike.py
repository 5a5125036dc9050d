# SPDX-License-Identifier: Apache-2.0
"""Compares what ranks claim to hold alike, for each checkpoint, in the coordinator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layerwise_dist.commit.messages import AlikeGroup, AlikeSaid, Sampled
from layerwise_dist.errors import named

_WAY_OUT = (
    "If they are meant to differ, tell the wrapper (DDP ignores what "
    "_set_params_and_buffers_to_ignore_for_model names), or set replicas = 'apart': then each rank saves its own"
)
_DIGITS = 16  # of a hash
_LISTED = 3
_REMEMBERED = 16  # checkpoints whose samples wait for ranks that have not spoken yet


@dataclass(frozen=True, slots=True)
class Unlike:
    """Of `ranks`, two do not hold the same: other parameters (`final`), or not the same optimizer state. `sides`: which
    agree among themselves.
    """

    ranks: str
    why: str
    final: bool
    sides: str = ""


class Samples:
    """Hashes of the same blocks, by the ranks that hold them. They are judged once all of these have spoken, so that
    one that is alone can be told from the others; or, in `rest`, as far as they have.
    """

    def __init__(self) -> None:
        # By ranks, listing, seq, and whether they come late: ranks are not at the same checkpoint at one time.
        self._said: dict[tuple[str, str, int, bool], dict[int, Sampled]] = {}
        self._newest = 0

    def take(self, rank: int, group: AlikeGroup) -> Iterator[Unlike]:
        for sampled in group["samples"]:
            key = group["ranks"], group["listing"], sampled["seq"], sampled["late"]
            said = self._said.setdefault(key, {})
            said[rank] = sampled
            if len(said) == group["count"]:
                yield from _judged(group["ranks"], self._said.pop(key))
        self._forget_old(max((sampled["seq"] for sampled in group["samples"]), default=0))

    def _forget_old(self, seq: int) -> None:
        """By checkpoints, and not by how many samples there are: there is one for each group of ranks."""
        if seq > self._newest:
            self._newest = seq
            for key in [key for key in self._said if key[2] <= seq - _REMEMBERED]:
                del self._said[key]

    def rest(self, seq: int) -> Iterator[Unlike]:
        """The samples of checkpoint `seq` are complete, except for those that come late."""
        keys = [key for key in self._said if key[2:] == (seq, False)]
        taken = [(key[0], self._said.pop(key)) for key in keys]  # at once: whoever hears of one may ask again
        for ranks, said in taken:
            yield from _judged(ranks, said)


class Alike:
    """Of one attempt: for each group of ranks what the first of them said, with which all others must agree."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, str, list[str]]] = {}

    def compare(self, message: AlikeSaid) -> Unlike | None:
        """Takes one rank's ``alike``: the first group in it that is not what another rank said, or has new members that
        are not the same.
        """
        rank = message["rank"]
        for group in message["groups"]:
            listing, new = group["listing"], group["new"]
            other, first, news = self._first.setdefault(group["ranks"], (rank, listing, new))
            # What is new is said once: a rank that took no part in an attempt may say it of another one.
            if first != listing or (news[:1] == new[:1] and news != new):
                return _other_state(group["ranks"], f"ranks {min(rank, other)} and {max(rank, other)}", "")
        return None


def unequal(what: str, sides: str) -> str:
    """What is wrong where replicas are none, in words."""
    return (
        f"{sides} hold different values of {what}, which their wrapper should keep equal: trained under no_sync(), "
        "changed on one rank, a branch that only some ranks take, a missing all-reduce, flipped bits in memory, or "
        f"different arithmetic there? A checkpoint would mix them. {_WAY_OUT}"
    )


def _other_state(ranks: str, sides: str, where: str) -> Unlike:
    why = (
        f"{sides} do not have the same optimizer state for what ranks {ranks} are said to hold alike{where}; from now "
        "on each of them saves its own"
    )
    return Unlike(ranks, why, final=False)


def _judged(ranks: str, said: dict[int, Sampled]) -> Iterator[Unlike]:
    """The parameters' difference, or else the state's."""
    one = next(iter(said.values()))
    names = next((each["blocks"] for each in said.values() if each["blocks"]), [])
    count = len(one["params"]) // _DIGITS
    sides, text = _sides({rank: each["params"] for rank, each in said.items()})
    if len(sides) > 1:
        what = _blocks([each["params"] for each in said.values()], names[:count])
        why = unequal(f"{what} at step {one['step']}{_alone(sides)}", text)
        yield Unlike(ranks, why, final=True, sides=text)
        return
    sides, text = _sides({rank: each["state"] for rank, each in said.items()})
    if len(sides) > 1:
        what = _blocks([each["state"] for each in said.values()], names[count:])
        yield _other_state(ranks, text, f": {what} at step {one['step']}{_alone(sides)}")


def _sides(said: dict[int, str]) -> tuple[list[list[int]], str]:
    """Which ranks say the same, and that in words."""
    by: dict[str, list[int]] = {}
    for rank in sorted(said):
        by.setdefault(said[rank], []).append(rank)
    sides = list(by.values())
    return sides, " and ".join(map(_ranks, sides))


def _alone(sides: list[list[int]]) -> str:
    """Who differs from most of them."""
    most = max(sides, key=len)
    if 2 * len(most) <= sum(map(len, sides)):
        return ""
    others = [rank for side in sides if side is not most for rank in side]
    return f" ({_ranks(sorted(others))} against {len(most)} that agree)"


def _ranks(ranks: list[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {','.join('-'.join(map(str, run)) for run in runs)}"


def _blocks(said: list[str], names: list[str]) -> str:
    """The blocks whose hashes are not the same for all, in words."""
    found = [
        name for at, name in enumerate(names) if len({each[at * _DIGITS : (at + 1) * _DIGITS] for each in said}) > 1
    ]
    if not found:
        return "what they hold alike"
    return named(found, _LISTED)
