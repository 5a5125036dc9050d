# SPDX-License-Identifier: Apache-2.0
"""Imports DeepSpeed's own checkpoints, ZeRO 1 to 3, whatever the number of ranks that wrote them.

What is where in them is DeepSpeed 0.19's, as its `zero_to_fp32` and `ds_to_universal` read it. Stages 1 and 2: each
rank has a part of each group's flat tensor, and says which parameter lies where in it (`param_slice_mappings`). Stage
3: each parameter is cut into as many equal parts as there are ranks, the last one padded; a rank has its parts one
after the other, in the order of `param_shapes`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.interop.deepspeed_files import (
    MODEL,
    OPTIM,
    Part,
    files_of,
    hyper_parameters,
    member,
    put_together,
    same,
    stage_of,
    take_counters,
    take_model,
)  # fmt: skip
from layerwise_dist.interop.gathered_state import Imported, guess_optimizer
from layerwise_dist.interop.pickles import Inert, load


def read(folder: str, *, allowed: bool, buffers: Sequence[str], optimizer: str | None) -> Imported:
    """Raises UnsupportedError, naming what cannot be read; DamageError; OSError."""
    models, optims = files_of(folder, MODEL), files_of(folder, OPTIM)
    if odd := [name for name in os.listdir(folder) if name.startswith(("layer_", "expert_"))]:
        raise UnsupportedError(f"{folder}: {odd[0]}: pipelines and experts are not imported")
    if not models or not optims:
        raise UnsupportedError(
            f"{folder}: it has no {'model' if not models else 'ZeRO optimizer'} states: an import takes ZeRO 1 to 3"
        )
    zero = []
    for rank in sorted(optims):
        zero.append(member(load(optims[rank], allowed=allowed), "optimizer_state_dict", dict, optims[rank]))
    stage, world_size = stage_of(zero[0], folder), len(zero)
    counts = zero[0].get("partition_count", world_size)
    if max(counts if isinstance(counts, list) else [counts]) != world_size or sorted(optims) != list(range(world_size)):
        raise UnsupportedError(
            f"{folder}: written by {counts} ranks, and there are optimizer states of ranks {sorted(optims)}: some are "
            "missing, or left from another job"
        )
    first = load(models[min(models)], allowed=allowed)
    found = Imported(folder, framework="deepspeed")
    shapes = [dict(each) for each in member(first, "param_shapes", list, models[min(models)])]
    take_model(found, first, models, stage, world_size, shapes, allowed, buffers)
    if stage == 3:
        parts, flat = _parts_of_three(zero, shapes, folder), [_flats(each, "fp32_flat_groups", folder) for each in zero]
        bases = [member(each, "optimizer_state_dict", dict, folder) for each in zero]
    else:
        parts = _parts_of_two(zero, shapes, folder)
        flat = [_flats(each, "single_partition_of_fp32_groups", folder) for each in zero]
        bases = [member(each, "base_optimizer_state", dict, folder) for each in zero]
    _masters(found, shapes, parts, flat)
    _optimizer(found, shapes, parts, bases, flat, optimizer)
    take_counters(found, first, zero[0])
    return found


def _flats(zero: Mapping[str, Any], name: str, folder: str) -> list[torch.Tensor]:
    found = zero.get(name)
    if not isinstance(found, list) or not all(isinstance(each, torch.Tensor) for each in found):
        raise UnsupportedError(f"{folder}: {name} are not tensors")
    return [each.detach().view(-1) for each in found]


def _parts_of_two(
    zero: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], folder: str
) -> dict[str, list[Part]]:
    """Of each parameter, in order: a rank's parts begin where the rank's before it end."""
    found: dict[str, list[Part]] = {name: [] for group in shapes for name in group}
    for rank, each in enumerate(zero):
        mappings = each.get("param_slice_mappings")
        if not isinstance(mappings, list) or len(mappings) != len(shapes):
            raise UnsupportedError(
                f"{folder}: rank {rank} does not say which parameters lie where (param_slice_mappings)"
            )
        for group, mapping in enumerate(mappings):
            for name, place in mapping.items():
                if name not in found or not isinstance(place, Inert):
                    raise UnsupportedError(
                        f"{folder}: rank {rank} has a part of {name}, which is not a parameter of group {group}"
                    )
                numel, start = _address(place, folder)
                begin = found[name][-1].end if found[name] else 0
                found[name].append(Part(rank, group, start, begin, begin + numel))
    return found


def _address(place: Inert, folder: str) -> tuple[int, int]:
    """`fragment_address(numel, start)`: a dataclass."""
    numel, start = place.get("numel"), place.get("start")
    if type(numel) is not int or type(start) is not int or numel < 0 or start < 0:
        raise UnsupportedError(f"{folder}: a {place.kind} without a place in it")
    return numel, start


def _parts_of_three(
    zero: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], folder: str
) -> dict[str, list[Part]]:
    """The flat groups of a rank, one after the other, have its part of each parameter."""
    world_size = len(zero)
    lengths = [[each.numel() for each in _flats(state, "fp32_flat_groups", folder)] for state in zero]
    if any(each != lengths[0] for each in lengths):
        raise UnsupportedError(f"{folder}: the ranks' flat groups are of different sizes")
    found: dict[str, list[Part]] = {}
    group = start = 0
    for name, shape in ((name, shape) for each in shapes for name, shape in each.items()):
        numel = math.prod(shape)
        each = -(-numel // world_size)
        while group < len(lengths[0]) and start == lengths[0][group]:
            group, start = group + 1, 0
        if group == len(lengths[0]) or start + each > lengths[0][group]:
            raise UnsupportedError(f"{folder}: {name} does not lie within one of the flat groups, as ZeRO-3 has it")
        found[name] = [
            Part(rank, group, start, min(rank * each, numel), min((rank + 1) * each, numel))
            for rank in range(world_size)
        ]
        start += each
    return found


def _masters(
    found: Imported, shapes: Sequence[Mapping[str, Any]], parts: Mapping[str, Sequence[Part]],
    flat: Sequence[Sequence[torch.Tensor]],
) -> None:  # fmt: skip
    for group in shapes:
        for name, shape in group.items():
            row = put_together(name, tuple(shape), parts[name], lambda rank, number: flat[rank][number], found.source)
            found.add("master", name, row)


def _states(base: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """Of each flat group, in order: the state that the optimizer keeps of it."""
    state, groups = base.get("state"), base.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise UnsupportedError(
            f"{where}: its optimizer's state is not by parameter: elastic checkpoints are not imported"
        )
    return [state.get(number, {}) for group in groups for number in group.get("params", ())]


def _optimizer(
    found: Imported, shapes: Sequence[Mapping[str, Any]], parts: Mapping[str, Sequence[Part]],
    bases: Sequence[Mapping[str, Any]], flat: Sequence[Sequence[torch.Tensor]], kind: str | None,
) -> None:  # fmt: skip
    source = found.source
    states = [_states(base, source) for base in bases]
    saved = bases[0]["param_groups"]
    for base in bases[1:]:
        for number, (mine, other) in enumerate(zip(saved, base["param_groups"], strict=True)):
            if any(not same(mine.get(key), other.get(key)) for key in mine):
                raise UnsupportedError(f"{source}: hyper-parameters of group {number} differ between ranks")
    owners = [number for number, group in enumerate(saved) for _ in group["params"]]  # of flat tensors
    if any(len(each) != len(owners) for each in flat):
        raise UnsupportedError(
            f"{source}: the optimizer has {len(owners)} flat tensors, and ranks wrote {len(flat[0])}"
        )
    names: list[list[str]] = [[] for _ in saved]
    for number, group in enumerate(shapes):
        for name, shape in group.items():
            at = parts[name][0].group if parts[name] else number
            names[owners[at]].append(name)
            _state_of(found, name, tuple(shape), parts[name], states, flat)
    found.groups = [hyper_parameters(found, group, number, names[number]) for number, group in enumerate(saved)]
    found.optimizer = kind or guess_optimizer(found.groups, found.order.values(), source)


def _state_of(
    found: Imported, name: str, shape: tuple[int, ...], parts: Sequence[Part],
    states: Sequence[Sequence[Mapping[str, Any]]], flat: Sequence[Sequence[torch.Tensor]],
) -> None:  # fmt: skip
    """What has an element for each of the flat tensor is cut as that; what has no dimension is each parameter's."""
    source = found.source
    held = [part for part in parts if part.end > part.begin]
    kept: dict[str, Any] = {}
    for kind, value in states[held[0].rank][held[0].group].items() if held else ():
        if isinstance(value, torch.Tensor) and value.dim():
            kept[kind] = put_together(f"{kind} of {name}", shape, held, _rows(states, flat, kind, source), source)
            continue
        for part in held:
            if not same(states[part.rank][part.group].get(kind), value):
                raise UnsupportedError(f"{source}: {kind} of {name} differs between ranks")
        kept[kind] = value
    found.add_state(name, kept)


def _rows(
    states: Sequence[Sequence[Mapping[str, Any]]], flat: Sequence[Sequence[torch.Tensor]], kind: str, source: str
) -> Callable[[int, int], torch.Tensor]:
    """State of one kind, by rank and flat tensor. Padding at a flat tensor's end is in the state, and not in that."""

    def row(rank: int, group: int) -> torch.Tensor:
        each = states[rank][group].get(kind)
        if not isinstance(each, torch.Tensor) or each.dim() != 1 or each.numel() < flat[rank][group].numel():
            raise UnsupportedError(f"{source}: {kind} of rank {rank} is not of its flat tensor {group}")
        return each.detach()

    return row
