# SPDX-License-Identifier: Apache-2.0
"""What a rank takes up that is no tensor, where the checkpoint's ranks are not this job's: numbers and positions that
belong to a rank, objects, counters. One state, as this rank would have sealed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from layerwise_dist.errors import MismatchError
from layerwise_dist.frameworks.composite import CompositeFramework, framework_of
from layerwise_dist.frameworks.deepspeed.counters import adapts
from layerwise_dist.frameworks.deepspeed.groups import spread
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.parts import Parts
from layerwise_dist.loop import rng
from layerwise_dist.loop.elastic import FROM_RANK_0, elsewhere
from layerwise_dist.loop.objects import StateObjects
from layerwise_dist.loop.sealed import BoundaryState, SealedState
from layerwise_dist.tensors.values import alike, leaves

# Of each of an optimizer's groups the number of the checkpoint's, if it is of one; and how many those were.
Origins = tuple[Sequence[int | None], int]


def for_rank(
    sealed: Sequence[SealedState], rank: int, world_size: int, *, choose: Mapping[str, str], objects: StateObjects
) -> tuple[SealedState, list[str]]:
    """The state that this rank takes, and what of it is rank 0's though ranks differ, in words.

    A rank that the checkpoint has keeps its own objects, extra states and random numbers; a new one takes rank 0's, and
    random numbers of its own. `choose` names objects that all are to take from rank 0, and says of loaders what
    `loop.elastic.elsewhere` takes; `objects` knows which of them are generators.

    Raises MismatchError for an object that holds tensors, and not the same on all ranks; for a loader within an epoch
    that no other number of ranks can go on with; for a choice of something that the checkpoint has not.
    """
    own = sealed[rank] if rank < len(sealed) else sealed[0]
    _check_choices(own, choose)
    taken: list[str] = []
    found = dict(own["objects"])
    for name in found:
        values = [state["objects"].get(name) for state in sealed]
        if choose.get(name) == FROM_RANK_0:
            found[name] = values[0]
        elif _agree(values):
            continue
        elif name in objects.generators():
            if rank >= len(sealed):
                found[name] = objects.derived(name, values[0], own["step"], rank)
        elif any(map(_holds_tensors, values)):
            raise MismatchError(
                f"state[{name!r}] holds tensors that differ between the {len(sealed)} ranks of the checkpoint, and "
                f"this job of {world_size} has another cut: nothing says which are whose. restore(objects={{{name!r}: "
                f'"{FROM_RANK_0}"}}) gives rank 0\'s to all'
            )
        elif world_size != len(sealed):
            taken.append(f"state[{name!r}]")
    if world_size != len(sealed):
        for name in own["extra_state"]:
            if not _agree([state["extra_state"].get(name) for state in sealed]):
                taken.append(f"the extra state of {name}")
        if not _agree([state["client_state"] for state in sealed]):
            taken.append("client_state")
    boundary = _boundary(sealed, rank, own["step"])
    return {**own, "objects": found, "boundary": _placed(boundary, sealed, rank, world_size, choose)}, taken


def chosen(sealed: Sequence[SealedState], rank: int, *, choose: Mapping[str, str]) -> SealedState:
    """This rank's state in a job that is cut as the checkpoint is, but for what `choose` says, as in `for_rank`."""
    own = sealed[rank]
    _check_choices(own, choose)
    first = sealed[0]["objects"]
    objects = {name: first.get(name) if name in choose else value for name, value in own["objects"].items()}
    boundary = _placed(own["boundary"], sealed, rank, len(sealed), choose)
    return {**own, "objects": objects, "boundary": boundary}


def _check_choices(own: SealedState, choose: Mapping[str, str]) -> None:
    known = {*own["objects"], *own["boundary"]["loaders"]}
    if unknown := sorted(choose.keys() - known):
        raise MismatchError(f"objects: the checkpoint has no {unknown[0]!r} in its state, but {sorted(known)}")
    for name, choice in choose.items():
        if choice != FROM_RANK_0 and name in own["objects"]:
            raise MismatchError(f"objects: {name!r} is not a loader and accepts {FROM_RANK_0!r} only, not {choice!r}")


def _placed(
    boundary: BoundaryState, sealed: Sequence[SealedState], rank: int, world_size: int, choose: Mapping[str, str]
) -> BoundaryState:
    """With loaders where they go on in a job of so many ranks, or where `choose` has them."""
    moved = world_size != len(sealed)
    positions = {
        number: {name: at for name, at in state["boundary"]["loaders"].items() if moved or name in choose}
        for number, state in enumerate(sealed)
    }
    kept = {} if moved else boundary["loaders"]
    return {**boundary, "loaders": {**kept, **elsewhere(positions, rank, choose)}}


def fit_schedules(sealed: SealedState, objects: StateObjects, origins: Sequence[Origins]) -> list[str]:
    """Where param groups are others than the checkpoint's, gives what LR schedulers keep for each group to the groups
    of now. `origins` of each optimizer. Changes `sealed`; returns what cannot be, in words.
    """
    names = objects.schedules()
    if not names or all(found == list(range(before)) for found, before in origins):
        return []
    found, before = origins[0]
    known = [origin for origin in found if origin is not None and origin < before]
    if len(origins) > 1 or len(known) < len(found):
        return [
            f"state[{names[0]!r}] keeps learning rates for the param groups of the checkpoint, but the groups here "
            "are others: build the same groups as the checkpoint has"
        ]
    live, fitted = objects.take(), dict(sealed["objects"])
    for name in names:
        if isinstance(fitted.get(name), Mapping):
            try:
                fitted[name] = spread(fitted[name], known, before, live[name])
            except MismatchError as error:
                return [f"state[{name!r}]: {error}"]
    sealed["objects"] = fitted
    return []


def _agree(values: Sequence[Any]) -> bool:
    return all(alike(values[0], value) for value in values[1:])


def _holds_tensors(value: Any) -> bool:
    return any(
        each.numel() > 1 if isinstance(each, torch.Tensor) else isinstance(each, np.ndarray) and each.size > 1
        for each in leaves(value)
    )


def _boundary(sealed: Sequence[SealedState], rank: int, step: int) -> BoundaryState:
    """A new rank's random numbers follow from rank 0's, the step and the rank: the same in every restore."""
    if rank < len(sealed):
        return sealed[rank]["boundary"]
    first = sealed[0]["boundary"]
    return {**first, "rng": rng.derived(first["rng"], step, rank), "rng_event": "boundary", "rng_after": None}


def carried(
    framework: Framework, sealed: SealedState, saved: str, parts: Parts, *, same_world: bool,
    given: dict[str, Any] | None = None,
) -> tuple[Any, list[str]]:  # fmt: skip
    """What the wrapper takes up (`Framework.take_up`) of what one by the name of `saved` had come to, or of what it is
    `given` (`stand_ins.exchange`); and what of that has no place here, in words.
    """
    if given is not None:
        return framework.carry_on(given, sealed["step"], parts, same_world=same_world), []
    lost: list[str] = []
    return _carried(framework, sealed["wrapper"], saved, sealed["step"], parts, same_world, lost), lost


def _carried(
    framework: Framework, there: Any, saved: str, step: int, parts: Parts, same_world: bool, lost: list[str]
) -> Any:
    if isinstance(framework, CompositeFramework):
        named = framework_of(saved)
        each = there if isinstance(there, dict) else {}
        return {
            name: _carried(part, each.get(name), named.get(name, ""), step, parts, same_world, lost)
            for name, part in framework.parts.items()
        }
    if saved == framework.name:
        return framework.carry_on(there, step, parts, same_world=same_world)
    if saved == "deepspeed":
        if there["lr_scheduler"] is not None:
            lost.append(f"DeepSpeed's LR scheduler ({there.get('lr_scheduler_class', 'of a class that is not known')})")
        if adapts(there["loss_scale"]):
            lost.append("DeepSpeed's loss scale")
    return framework.carry_on(None, step, parts, same_world=same_world)
