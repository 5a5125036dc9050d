# SPDX-License-Identifier: Apache-2.0
"""Messages between ranks and the coordinator: one class for each kind `t` and direction.

What they mean is in docs/tables/messages.md. On a wire they are JSON objects. Once sent, none changes.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, final

# -- values and errors as JSON --------------------------------------------------------------------------------------


class _Described(TypedDict):
    type: str
    message: str


class DescribedError(_Described, total=False):
    """An error that another rank can raise (`votes.rebuild_error`): `path` of a StateError, `errno` of an OSError."""

    path: str
    errno: int


@final
class Value(TypedDict):
    """What an action returned, as JSON."""

    value: Any


@final
class Failure(TypedDict):
    """What it raised."""

    error: DescribedError


Outcome = Value | Failure

# -- from a rank to the coordinator ---------------------------------------------------------------------------------


class Agree(TypedDict):
    t: Literal["agree"]
    key: str
    rank: int
    payload: Any


class At(TypedDict):
    """`b`: the boundary, counted from the session's start."""

    t: Literal["at"]
    rank: int
    b: int


class OfAttempt(TypedDict):
    """Who speaks, about which attempt."""

    rank: int
    world_size: int
    seq: int
    attempt: str
    step: int


@final
class Sampled(TypedDict):
    """Hashes of blocks that the checkpoint of `seq` has compared, one after the other, 16 hexadecimal digits each: of
    parameters, and of optimizer state. `blocks`: which these are, in words, from the first of the ranks. `late`: they
    come with a later checkpoint, since they had yet to be computed.
    """

    seq: int
    step: int
    late: bool
    params: str
    state: str
    blocks: list[str]


@final
class AlikeGroup(TypedDict):
    """`count` ranks, as text, hold something alike; hashes of what that is, and of what of it is new (none, or two).
    Samples are of this checkpoint, and what had yet to be computed of earlier ones.
    """

    ranks: str
    count: int
    listing: str
    samples: list[Sampled]
    new: list[str]


class AlikeSaid(OfAttempt):
    t: Literal["alike"]
    groups: list[AlikeGroup]


class Staged(OfAttempt):
    t: Literal["staged"]


class Durable(OfAttempt):
    """As `storage.reports.ShardReport`; hashes are 16 hexadecimal digits."""

    t: Literal["durable"]
    file: str
    nbytes: int
    header_bytes: int
    header_hash: str
    base: DurableBase | None


class DurableBase(TypedDict):
    """As `storage.reports.BaseReport`."""

    attempt: str
    nbytes: int
    header_bytes: int
    header_hash: str


class Failed(OfAttempt):
    t: Literal["failed"]
    error: str
    final: bool


class Skipped(OfAttempt):
    t: Literal["skipped"]
    reason: str


class Ask(TypedDict):
    t: Literal["ask"]
    rank: int
    b: int
    leave: bool
    why: str


class Pace(TypedDict):
    """Of rank 0: a checkpoint every `steps` steps would be better, and why."""

    t: Literal["pace"]
    rank: int
    steps: int
    why: str


class Held(TypedDict):
    t: Literal["held"]
    rank: int
    round: int
    b: int


class _Kept(TypedDict):
    t: Literal["kept"]
    what: Literal["prepare", "publish", "withdraw"]
    rank: int
    error: str | None


class Kept(_Kept, total=False):
    """`batch` of ``withdraw``, `seq` of the others."""

    seq: int
    batch: int


class Closed(TypedDict):
    t: Literal["closed"]
    rank: int


class Broke(TypedDict):
    t: Literal["broke"]
    rank: int
    why: str


class Gone(TypedDict):
    t: Literal["gone"]
    rank: int
    why: str


class Orphaned(TypedDict):
    t: Literal["orphaned"]
    rank: int
    why: str


# -- from rank 0 to all ranks ---------------------------------------------------------------------------------------


class Agreed(TypedDict):
    t: Literal["agreed"]
    key: str
    decision: Outcome


class Grant(TypedDict):
    """`b`: the boundary before which all may go on; `tell`: the one from which on they say ``at``."""

    t: Literal["grant"]
    b: int
    tell: int


class Stop(TypedDict):
    """`at`: the boundary to raise at."""

    t: Literal["stop"]
    at: int
    reason: str


class Reached(TypedDict):
    """All ranks have."""

    t: Literal["staged", "durable", "committed"]
    seq: int
    step: int


class Aborted(TypedDict):
    """`unlike`: the ranks, as text, that do not share optimizer state from now on; empty where that is not why."""

    t: Literal["aborted"]
    seq: int
    step: int
    reason: str
    failure: bool
    skipped: bool
    unlike: str


class Drifted(TypedDict):
    """Ranks do not hold the same parameters, and the checkpoint goes on all the same. `first`: as not said before."""

    t: Literal["drifted"]
    seq: int
    step: int
    reason: str
    first: bool


class Interval(TypedDict):
    """A checkpoint every `steps` steps, from boundary `at` on, which no rank has passed."""

    t: Literal["interval"]
    at: int
    steps: int
    why: str


class RetiredForGood(TypedDict):
    t: Literal["retired"]
    epoch: int
    seq: int
    step: int


class Unneeded(TypedDict):
    t: Literal["unneeded"]
    bases: list[str]


class HoldBoundary(TypedDict):
    t: Literal["hold"]
    round: int
    leave: bool
    why: str


class Meet(TypedDict):
    """`b`: the boundary; None: they do not meet."""

    t: Literal["meet"]
    round: int
    b: int | None
    leave: bool
    why: str


class Prepare(TypedDict):
    t: Literal["prepare"]
    seq: int
    step: int
    manifest: str


class Publish(TypedDict):
    t: Literal["publish"]
    seq: int
    step: int


class Withdraw(TypedDict):
    """`attempts`: epoch, seq and step of each."""

    t: Literal["withdraw"]
    batch: int
    attempts: list[list[int]]


# -- of transports and monitors -------------------------------------------------------------------------------------


class Cut(TypedDict):
    t: Literal["cut"]
    why: str


class SaidOfTraining(TypedDict):
    """Between monitors: what a training process says to that of rank 0."""

    t: Literal["of training"]
    m: ToCoordinator


class DecidedOfTraining(TypedDict):
    """Between monitors: what rank 0's training process announces to the others."""

    t: Literal["of training"]
    m: ToRanks


ToCoordinator = (
    Agree | At | AlikeSaid | Staged | Durable | Failed | Skipped | Ask | Pace | Held | Kept | Closed | Broke | Gone
    | Orphaned | SaidOfTraining
)  # fmt: skip
ToKeepers = Prepare | Publish | Withdraw
ToRanks = (
    Agreed | Grant | Stop | Reached | Aborted | Drifted | Interval | RetiredForGood | Unneeded | HoldBoundary | Meet
    | ToKeepers | DecidedOfTraining
)  # fmt: skip
Message = ToCoordinator | ToRanks | Cut
