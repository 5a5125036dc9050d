# SPDX-License-Identifier: Apache-2.0
"""What a training process and its monitor say to each other: one class for each kind `t` and direction.

What they mean is in docs/rooms/monitor.md, "The wire".
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, final

from layerwise_dist.commit.messages import DescribedError, ToCoordinator, ToRanks
from layerwise_dist.commit.records import BoundaryKind

# -- from the training process --------------------------------------------------------------------------------------


class _Question(TypedDict, total=False):
    """`id`: of the ``answer``; given by `MonitorLink.ask`."""

    id: int


class Start(_Question):
    t: Literal["start"]
    config: dict[str, Any]  # a LayerwiseConfig
    rank: int
    world_size: int


class Open(_Question):
    t: Literal["open"]
    framework: str
    software: dict[str, str]
    fresh: bool


class Opened(TypedDict):
    """The answer to ``open``: a `commit.opening.SessionInfo`, and what the directory allows."""

    info: dict[str, Any]
    direct: bool
    memory_align: int


class HoldRetention(_Question):
    t: Literal["hold"]


class Follow(_Question):
    t: Literal["follow"]
    head: dict[str, Any] | None  # a ParentRef
    branch_seq: int | None


class Times(_Question):
    t: Literal["times"]
    seq: int


Question = Start | Open | HoldRetention | Follow | Times


class Release(TypedDict):
    t: Literal["release"]


class Gathered(TypedDict):
    t: Literal["gathered"]
    records: list[dict[str, Any]]


class Listening(TypedDict):
    t: Literal["listening"]


class Posted(TypedDict):
    t: Literal["post"]
    m: ToCoordinator


class Announced(TypedDict):
    t: Literal["announce"]
    m: ToRanks


class SaidBoundaryKind(TypedDict):
    t: Literal["boundary kind"]
    kind: BoundaryKind


class Tag(TypedDict):
    t: Literal["tag"]
    seq: int
    tag: str


class Pool(TypedDict):
    """Bytes of the memory file."""

    t: Literal["pool"]
    begin: int
    nbytes: int


# A `storage.shard_layout.Source`: the members of its slice, its `address_mod`, and whether it is `wrapped`.
SaidSource = tuple[dict[str, Any], int, bool]


class Layout(TypedDict):
    t: Literal["layout"]
    number: int
    layers: list[tuple[str, list[SaidSource]]]


class Begin(TypedDict):
    t: Literal["begin"]
    seq: int
    step: int
    layout: int


class Give(TypedDict):
    """A buffer of `nbytes` bytes at `place` of the memory file, in which the extent lies as in the file."""

    t: Literal["give"]
    seq: int
    extent: int
    place: int
    nbytes: int


class State(TypedDict):
    """The same, of a piece of the state."""

    t: Literal["state"]
    seq: int
    place: int
    nbytes: int


class Sealed(TypedDict):
    """`state`: bytes of its text and of its blob."""

    t: Literal["sealed"]
    seq: int
    state: tuple[int, int]


class Drop(TypedDict):
    t: Literal["drop"]
    seq: int


Staging = Pool | Layout | Begin | Give | State | Sealed | Drop
ToMonitor = Question | Release | Gathered | Listening | Posted | Announced | SaidBoundaryKind | Tag | Staging

# -- from the monitor -----------------------------------------------------------------------------------------------


@final
class Answer(TypedDict):
    t: Literal["answer"]
    id: int
    value: Any


@final
class Refusal(TypedDict):
    """The answer that is an error."""

    t: Literal["answer"]
    id: int
    error: DescribedError


class GatherRecord(TypedDict):
    t: Literal["gather"]
    record: dict[str, Any]


class Log(TypedDict):
    """`level` as in `logging`."""

    t: Literal["log"]
    level: int
    text: str


class Heard(TypedDict):
    t: Literal["heard"]
    m: ToRanks


class Asked(TypedDict):
    t: Literal["asked"]
    m: ToCoordinator


class Lost(TypedDict):
    t: Literal["lost"]
    why: str


class Returned(TypedDict):
    t: Literal["returned"]
    places: list[int]


class Counts(TypedDict, total=False):
    """Of a shard that is durable; empty before."""

    writes: int
    bytes_written: int
    bytes_copied: int


class Written(TypedDict):
    t: Literal["written"]
    seq: int
    counts: Counts


class Bye(TypedDict):
    t: Literal["bye"]


ToTraining = Answer | Refusal | GatherRecord | Log | Heard | Asked | Lost | Returned | Written | Bye
