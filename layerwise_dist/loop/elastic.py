# SPDX-License-Identifier: Apache-2.0
"""A loader's position in samples of all ranks, so that a job of other ranks can continue within the epoch.

What a rank's loader has drawn says where all are only if the ranks are those of then. So a loader whose
`ElasticDistributedSampler` deals out the epoch seals, beside its draws, the global position (`ElasticPosition`):

- the ranks are as they were: the draws are replayed, from where that iteration began;
- their number is another (`elsewhere`), or that of replicas, or the batch size (`Elastic.fitted`): a new iteration
  begins at the position. Its generators are new ones, which the sealed ones and the rank decide, so that workers do not
  draw again what they drew in this epoch.

A loader that stands within an epoch without such a sampler can't be placed among other ranks, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from layerwise_dist.data import ElasticDistributedSampler
from layerwise_dist.errors import MismatchError
from layerwise_dist.loop.generators import alike_own, derived, epochs, samplers
from layerwise_dist.loop.sealed import ElasticPosition, LoaderNow, LoaderState

FROM_RANK_0 = "rank0"
CHOICES = ("anew", FROM_RANK_0)
_ORDER: tuple[Literal["samples", "seed", "shuffle"], ...] = ("samples", "seed", "shuffle")
_WAYS = (
    "only layerwise_dist.data.ElasticDistributedSampler, in batches of torch's BatchSampler or none, divides the "
    "rest of an epoch among other ranks. It divides as DistributedSampler does: on as many ranks as before, put it "
    "in that one's place, restore, and save once. Or restore what save() made between two epochs, or give "
    "restore(objects={{{name!r}: 'anew'}}) to restart the epoch, or 'rank0' if there are as many replicas as before "
    "or all ranks draw the same"
)
_ITER = ElasticDistributedSampler.__iter__  # a subclass with another one has another order


def sampler_of(loader: DataLoader[Any]) -> ElasticDistributedSampler | None:
    """The one whose samples the loader's batches are, one after the other."""
    batches = loader.batch_sampler
    if batches is None:
        sampler: Any = loader.sampler
    elif type(batches) is BatchSampler or type(batches).__module__.startswith("torchdata."):
        sampler = batches.sampler  # type: ignore[attr-defined]
    else:
        return None  # it may take samples in another order, and ahead
    return sampler if isinstance(sampler, ElasticDistributedSampler) and type(sampler).__iter__ is _ITER else None


class Elastic:
    """Of one loader; `name` is how messages call it. Without such a sampler there is nothing that it seals or does."""

    def __init__(self, loader: DataLoader[Any], name: str) -> None:
        self._loader, self._name = loader, name

    @property
    def begin(self) -> int:
        """The position at which the next iteration begins."""
        sampler = sampler_of(self._loader)
        return 0 if sampler is None else sampler.begin

    def seal(self, snapshot: LoaderState, begin: int, draws: int) -> None:
        """Adds what it knows of an iteration that began at that position, after as many batches."""
        if (replicas := self._replicas) is not None:
            snapshot["replicas"] = replicas
        if (at := self._take(begin, draws)) is not None:
            snapshot["elastic"] = at

    def _take(self, begin: int, draws: int) -> ElasticPosition | None:
        sampler = sampler_of(self._loader)
        if sampler is None:
            return None
        batch_size = self._batch_size
        at: ElasticPosition = {
            "begin": begin,
            "draws": draws,
            "position": sampler.position(begin, draws * (batch_size or 1)),
            "batch_size": batch_size,
            "samples": len(sampler.dataset),  # type: ignore[arg-type]
            "seed": int(sampler.seed),
            "shuffle": bool(sampler.shuffle),
        }
        return at

    def check(self, snapshot: LoaderState) -> None:
        """Raises MismatchError if the snapshot stands within an order that this loader does not deal out."""
        at, here = snapshot.get("elastic"), self._take(0, 0)
        if at is None:
            self._check_replicas(snapshot)
        if at is None or at["position"] == 0:
            return
        if here is None:
            raise MismatchError(
                f"loader {self._name!r}: the checkpoint stands at sample {at['position']} of an epoch that a "
                "layerwise_dist.data.ElasticDistributedSampler divides, and here it has none, or a BatchSampler that "
                "is not torch's"
            )
        if differ := [f"{key} {at[key]}, here {here[key]}" for key in _ORDER if at[key] != here[key]]:
            raise MismatchError(
                f"loader {self._name!r}: the checkpoint stands at sample {at['position']} of an epoch, and its "
                f"samples are ordered differently here: {', '.join(differ)}"
            )

    def fitted(self, snapshot: LoaderState) -> LoaderState:
        """The snapshot; or, where the replicas or the batch size are others than of then, begun at its position."""
        at, sampler = snapshot.get("elastic"), sampler_of(self._loader)
        if at is None or sampler is None or not snapshot["iterating"] or not at["draws"]:
            return snapshot
        if (snapshot.get("replicas"), at["batch_size"]) == (sampler.num_replicas, self._batch_size):
            return snapshot
        return _begun(snapshot, at, sampler.rank)

    def start(self, snapshot: LoaderState) -> int:
        """The next iteration begins where that of the snapshot did. Returns that position."""
        at, sampler = snapshot.get("elastic"), sampler_of(self._loader)
        begin = 0 if at is None else at["begin"]
        if sampler is not None:
            sampler.start_at(begin)
        return begin

    def gone_on(self, snapshot: LoaderState) -> bool:
        """Has the script gone to another epoch than that of the snapshot, which waits for `iter()`?"""
        then, here = snapshot["now"]["epochs"], epochs(self._loader)
        return "elastic" in snapshot and any(then[name] != here[name] for name in then.keys() & here.keys())

    def lost(self, snapshot: LoaderState) -> str | None:
        """What goes with it, if anything of that epoch was left."""
        at, sampler = snapshot.get("elastic"), sampler_of(self._loader)
        if at is None or sampler is None or not at["position"] or not sampler.length_from(at["position"]):
            return None
        return (
            f"set_epoch({sampler.epoch}) came after restore(), and the checkpoint stands at sample {at['position']} "
            f"of epoch {max(snapshot['now']['epochs'].values(), default=0)}; the rest of it is left out"
        )

    def _check_replicas(self, snapshot: LoaderState) -> None:
        """The same ranks may be other replicas, in another wrapper."""
        was, here = snapshot.get("replicas"), self._replicas
        if was not in (None, here) and _within(snapshot):
            raise MismatchError(
                f"loader {self._name!r} stands within an epoch that was divided among {was} replicas, here it would be "
                f"among {here or 'whoever draws'}: {_WAYS.format(name=self._name)}"
            )

    @property
    def _replicas(self) -> int | None:
        """To how many a sampler of torch's kind deals the samples out; None without one."""
        found = [each for each in samplers(self._loader).values() if isinstance(each, DistributedSampler)]
        return found[0].num_replicas if found else None

    @property
    def _batch_size(self) -> int | None:
        batches = self._loader.batch_sampler
        return None if batches is None else int(batches.batch_size)  # type: ignore[attr-defined]


def elsewhere(
    saved: Mapping[int, Mapping[str, LoaderState]], rank: int, choices: Mapping[str, str] | None = None
) -> dict[str, LoaderState]:
    """Where the loaders of one rank begin in a job of another world size than the checkpoint's.

    Args:
        saved: `BoundaryState["loaders"]` of each rank that saved, by rank.
        rank: of this job.
        choices: by name of a loader. "anew": it begins its epoch anew. "rank0": it goes on after as many batches as
            rank 0's, where replicas are as many as before, or the loaders of all ranks yield the same.

    Returns what `Boundary.restore` takes as `loaders`. A rank that there was has the generators of then. A new one has
    those that all had alike, else new ones that rank 0's and its own rank decide.

    Raises MismatchError for a loader that stands within an epoch, unless an `ElasticDistributedSampler` deals it out
    and all ranks stand at the same position; ValueError for another choice.
    """
    choices = choices or {}
    own = saved.get(rank)
    names = list(own) if own is not None else sorted(set.intersection(*(set(each) for each in saved.values())))
    return {
        name: _elsewhere(name, {each: saved[each][name] for each in sorted(saved) if name in saved[each]}, rank,
                         choices.get(name))
        for name in names
    }  # fmt: skip


def _elsewhere(name: str, saved: Mapping[int, LoaderState], rank: int, choice: str | None) -> LoaderState:
    if choice not in (None, *CHOICES):
        raise ValueError(f"loader {name!r}: choices are {', '.join(map(repr, CHOICES))}, not {choice!r}")
    first = saved[min(saved)]
    if choice == FROM_RANK_0:
        return first
    state = saved.get(rank, first).copy()
    if rank not in saved:
        state["now"] = _now_of_new([each["now"] for each in saved.values()], rank)
    if choice == "anew" or not any(map(_within, saved.values())):
        return _stopped(state, anew=choice == "anew")
    at = state.get("elastic")
    if at is None:
        raise MismatchError(
            f"loader {name!r} stands within an epoch, and this job has not the {len(saved)} ranks of then: "
            f"{_WAYS.format(name=name)}"
        )
    stand = {each: _stand(state) for each, state in saved.items()}
    for each, where in stand.items():
        if where != stand[min(saved)]:
            raise MismatchError(
                f"loader {name!r} stood {stand[min(saved)]} on rank {min(saved)} and {where} on rank {each}: ranks "
                "that draw unevenly have no common position to continue from"
            )
    return _begun(state, at, rank)


def _within(state: LoaderState) -> bool:
    """Has anything of an epoch been consumed, and may more of it come?"""
    return state["iterating"] and (state["kind"] == "stateful" or state["draws"] > 0 or "elastic" in state)


def _stand(state: LoaderState) -> str:
    at = state.get("elastic")
    return f"at sample {at['position']}" if at is not None and _within(state) else "between epochs"


def _now_of_new(saved: Sequence[LoaderNow], rank: int) -> LoaderNow:
    own = saved[0]["own"]
    if not all(alike_own(own, each["own"]) for each in saved):
        own = {name: derived(state, name, rank) for name, state in own.items()}
    return {"own": own, "epochs": saved[0]["epochs"]}


def _begun(state: LoaderState, at: ElasticPosition, rank: int) -> LoaderState:
    """A new iteration on that rank, which begins at the position and has drawn nothing."""
    start = state["start"]
    assert start is not None, "an iteration that is under way has begun"
    salt = (rank, at["position"])
    state = _stopped(state)
    state["iterating"] = True
    state["start"] = {
        "rng": {**start["rng"], "torch": derived(start["rng"]["torch"], *salt), "cuda": {}},
        "own": {name: derived(each, name, *salt) for name, each in start["own"].items()},
    }
    state["elastic"] = {**at, "begin": at["position"], "draws": 0}
    return state


def _stopped(state: LoaderState, *, anew: bool = False) -> LoaderState:
    """No iteration is under way. With `anew` the next one begins its epoch, whatever was to come."""
    state = state.copy()
    state["iterating"], state["start"] = False, None
    if state["kind"] == "stateful":
        state["state"] = None
    else:
        state["draws"], state["first"], state["later"], state["again"] = 0, None, {}, False
    if anew and "elastic" in state:
        state["elastic"] = {**state["elastic"], "begin": 0, "draws": 0, "position": 0}
    return state
