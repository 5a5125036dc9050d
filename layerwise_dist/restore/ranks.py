"""What a rank takes up that is no tensor, where the checkpoint's ranks are not this job's: numbers and positions that
belong to a rank, objects, counters. One state, as this rank would have sealed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from layerwise_dist.errors import MismatchError
from layerwise_dist.frameworks.composite import CompositeFramework, framework_of
from layerwise_dist.frameworks.deepspeed.groups import spread
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.loop import rng
from layerwise_dist.loop.elastic import elsewhere
from layerwise_dist.loop.sealed import BoundaryState, SealedState
from layerwise_dist.restore.sealed_state import optimizers_of
from layerwise_dist.tensors.values import alike

_FROM_RANK_0 = "rank0"


def for_rank(
    sealed: Sequence[SealedState], rank: int, world_size: int, *, choose: Mapping[str, str]
) -> tuple[SealedState, list[str]]:
    """The state that this rank takes, and what of it is rank 0's though ranks differ, in words.

    A rank that the checkpoint has keeps its own objects, extra states and random numbers; a new one takes rank 0's, and
    random numbers of its own. `choose` names objects that all are to take from rank 0, and says of loaders what
    `loop.elastic.elsewhere` takes.

    Raises MismatchError for an object of another world size that holds tensors, and not the same on all ranks; for a
    loader within an epoch that no other number of ranks can go on with.
    """
    saved_world = len(sealed)
    own = sealed[rank] if rank < saved_world else sealed[0]
    known = {*own["objects"], *own["boundary"]["loaders"]}
    if unknown := sorted(choose.keys() - known):
        raise MismatchError(
            f"objects: the checkpoint has no {unknown[0]!r} in its state, but {sorted(known) or 'nothing'}"
        )
    taken: list[str] = []
    objects = dict(own["objects"])
    for name in objects:
        if choose.get(name) == _FROM_RANK_0:
            objects[name] = sealed[0]["objects"].get(name)
        elif world_size != saved_world and not _agree([state["objects"].get(name) for state in sealed]):
            if _holds_tensors(sealed[0]["objects"].get(name)):
                raise MismatchError(
                    f"state[{name!r}] holds tensors that differ between the {saved_world} ranks of the checkpoint, and "
                    f"this job has {world_size}: nothing says which are whose. restore(objects={{{name!r}: "
                    f'"{_FROM_RANK_0}"}}) gives rank 0\'s to all'
                )
            taken.append(f"state[{name!r}]")
    for name in own["extra_state"]:
        if world_size != saved_world and not _agree([state["extra_state"].get(name) for state in sealed]):
            taken.append(f"the extra state of {name}")
    if world_size != saved_world and not _agree([state["client_state"] for state in sealed]):
        taken.append("client_state")
    state: SealedState = {**own, "objects": objects, "boundary": _boundary(sealed, rank, own["step"])}
    if world_size != saved_world:
        positions = {number: each["boundary"]["loaders"] for number, each in enumerate(sealed)}
        state["boundary"] = {**state["boundary"], "loaders": elsewhere(positions, rank, choose)}
    return state, taken


def fit_schedules(sealed: SealedState, names: Sequence[str]) -> list[str]:
    """Where param groups are others than the checkpoint's, gives what LR schedulers keep for each group to the groups
    of now. Changes `sealed`; returns what cannot be, in words.
    """
    optimizers = [cast(dict[str, Any], each) for each in optimizers_of(sealed)]
    origins = [each["origins"] for each in optimizers]
    if not names or all(found == list(range(before)) for found, before in origins):
        return []
    found, before = origins[0]
    if len(origins) > 1 or None in found:
        return [
            f"state[{names[0]!r}] keeps learning rates for the param groups of the checkpoint, and those are grouped "
            "otherwise here: make the groups that the checkpoint has"
        ]
    sealed["objects"] = {
        name: spread(each, found, before) if name in names and isinstance(each, Mapping) else each
        for name, each in sealed["objects"].items()
    }
    return []


def _agree(values: Sequence[Any]) -> bool:
    return all(alike(values[0], value) for value in values[1:])


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(each) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(each) for each in value)
    return isinstance(value, torch.Tensor) and value.numel() > 1


def _boundary(sealed: Sequence[SealedState], rank: int, step: int) -> BoundaryState:
    """A new rank's random numbers follow from rank 0's, the step and the rank: the same in every restore."""
    if rank < len(sealed):
        return sealed[rank]["boundary"]
    first = sealed[0]["boundary"]
    return {**first, "rng": rng.derived(first["rng"], step, rank), "rng_event": "boundary", "rng_after": None}


def carried(framework: Framework, sealed: SealedState, saved: str, *, same_world: bool) -> Any:
    """What the wrapper takes up (`Framework.take_up`) of what one by the name of `saved` had come to."""
    return _carried(framework, sealed["wrapper"], saved, sealed["step"], same_world)


def _carried(framework: Framework, there: Any, saved: str, step: int, same_world: bool) -> Any:
    if isinstance(framework, CompositeFramework):
        named = framework_of(saved)
        each = there if isinstance(there, dict) else {}
        return {
            name: _carried(part, each.get(name), named.get(name, ""), step, same_world)
            for name, part in framework.parts.items()
        }
    return framework.carry_on(there if saved == framework.name else None, step, same_world=same_world)
