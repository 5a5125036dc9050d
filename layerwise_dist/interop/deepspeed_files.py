# SPDX-License-Identifier: Apache-2.0
"""What all kinds of DeepSpeed checkpoints share: files, the model's states, and the engine's counters."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError
from layerwise_dist.interop.gathered_state import Found, Imported, is_buffer, unwritable
from layerwise_dist.interop.pickles import Inert, load

OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{2,6})_optim_states\.pt\Z")
MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{2,6})_model_states\.pt\Z")
_COUNTED = ("global_steps", "global_samples", "skipped_steps")
_SCALED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_KNOWN = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config",
    "checkpoint_parallel_dimensions", "ds_version",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """Elements `begin` to `end` of one parameter's row, which lie from `start` on in group `group` of a rank."""

    rank: int
    group: int
    start: int
    begin: int
    end: int


def folder_of(source: str, tag: str | None) -> str | None:
    """The folder of the files, of a checkpoint directory of DeepSpeed's or of one tag in it; None if it is neither."""
    if files_of(source, OPTIM) or is_universal(source):
        return source
    for name in ("latest", "latest_universal"):
        latest = os.path.join(source, name)
        if tag is None and os.path.isfile(latest):
            with open(latest, encoding="utf-8", errors="replace") as file:
                tag = file.read(4096).strip()
    if tag is None or os.path.basename(tag) != tag or tag in ("", ".", ".."):
        return None
    folder = os.path.join(source, tag)
    return folder if os.path.isdir(folder) else None


def is_universal(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "zero", "optimizer_state.pt"))


def files_of(folder: str, pattern: re.Pattern[str]) -> dict[int, str]:
    """By rank. Raises UnsupportedError where a model is cut into several by tensor parallelism."""
    found: dict[int, str] = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = pattern.match(name)
        if match is None:
            continue
        if int(match[2]):
            raise UnsupportedError(
                f"{os.path.join(folder, name)}: its model is cut by tensor or pipeline parallelism, which an import "
                "does not reassemble"
            )
        rank = int(match[1] or 0)
        if rank in found:
            raise UnsupportedError(f"{folder}: {name} and {os.path.basename(found[rank])} are of one rank")
        found[rank] = os.path.join(folder, name)
    return found


def member(value: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(value, Mapping) or not isinstance(value.get(name), kind):
        raise UnsupportedError(f"{where}: has no {name} as ZeRO 1 to 3 write it")
    return value[name]


def stage_of(zero: Mapping[str, Any], folder: str) -> int:
    said = zero.get("zero_stage")
    stage = said.args[0] if isinstance(said, Inert) and said.args else said
    if stage in (1, 2, 3):
        return int(stage)
    if "fp32_flat_groups" in zero:
        return 3
    if "single_partition_of_fp32_groups" in zero:
        return 1  # a bf16 optimizer that does not say: cut as stage 1
    raise UnsupportedError(f"{folder}: its stage is {stage!r}: an import takes ZeRO 1 to 3")


def put_together(
    name: str, shape: Sequence[int], parts: Sequence[Part], flat: Callable[[int, int], torch.Tensor], source: str
) -> Found:
    """`flat(rank, group)`. Raises UnsupportedError where the parts are not all of it, or not in what they are of."""
    numel, at = math.prod(shape), 0
    dtype = torch.float32
    for part in parts:
        row = flat(part.rank, part.group)
        dtype = row.dtype
        if part.begin != at or part.start + part.end - part.begin > row.numel():
            raise UnsupportedError(f"{source}: rank {part.rank} does not have the part of {name} that it says")
        at = part.end
    if at != numel:
        raise UnsupportedError(f"{source}: {name} has {numel} elements, and the ranks together {at} of them")

    def made() -> torch.Tensor:
        whole = torch.empty(numel, dtype=dtype, device="cpu")
        for part in parts:
            row = flat(part.rank, part.group)
            whole[part.begin : part.end] = row[part.start : part.start + part.end - part.begin]
        return whole.view(tuple(shape))

    return Found(dtype, tuple(shape), made)


def take_model(
    found: Imported, first: Mapping[str, Any], models: Mapping[int, str], stage: int, world_size: int,
    shapes: Sequence[Mapping[str, Any]], allowed: bool, buffers: Sequence[str],
) -> None:  # fmt: skip
    """Frozen parameters, buffers, and names of tied ones. Trained parameters are in their masters."""
    where = models[min(models)]
    module = member(first, "module", Mapping, where)
    names, shared = set(first.get("buffer_names") or ()), dict(first.get("shared_params") or {})
    for alias, name in shared.items():
        found.aliases.setdefault(name, []).append(alias)
    trained = {name for group in shapes for name in group}
    frozen = dict(first.get("frozen_param_shapes") or {})
    every = [first]
    if stage == 3 and frozen:
        if len(models) != world_size:
            raise UnsupportedError(
                f"{found.source}: model states of {len(models)} ranks, optimizer states of {world_size}"
            )
        every = [first, *(load(models[rank], allowed=allowed) for rank in sorted(models)[1:])]
    for name, shape in frozen.items():
        rows = []
        for state in every:
            fragment = (state.get("frozen_param_fragments") or {}).get(name)
            if not isinstance(fragment, torch.Tensor):
                raise UnsupportedError(f"{found.source}: a rank has no part of the frozen {name}")
            rows.append(fragment.detach().view(-1))
        numel, ranks = math.prod(shape), len(rows)
        each_part = -(-numel // ranks)
        parts = [
            Part(rank, 0, 0, min(rank * each_part, numel), min((rank + 1) * each_part, numel)) for rank in range(ranks)
        ]
        found.add("param", name, put_together(name, tuple(shape), parts, of_rank(rows), found.source))
    for name, value in module.items():
        if name in trained or name in frozen or name in shared:
            continue
        if name in names and isinstance(value, torch.Tensor):
            found.add("buffer", name, Found.of(value.detach()))
        elif name.rpartition(".")[2] == "_extra_state" or (
            isinstance(value, torch.Tensor) and is_buffer(name, value.dtype, buffers)
        ):
            found.add_model(name, value, buffers)
        elif stage < 3 and isinstance(value, torch.Tensor):  # frozen: stage 1 lists those nowhere else
            found.add("param", name, Found.of(value.detach()))
        else:
            found.notes.append(f"{name} of the model: its values are not in the files, unless it is tied to another")
    if len(models) > 1 and names:
        found.notes.append("buffers were taken from rank 0; those of other ranks may differ")


def of_rank(rows: Sequence[torch.Tensor]) -> Callable[[int, int], torch.Tensor]:
    return lambda rank, group: rows[rank]


def take_counters(found: Imported, first: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    """The engine's counts, loss scale and LR scheduler, and what the script gave."""
    counted = {name: first.get(name) for name in _COUNTED}
    if not all(type(value) is int and value >= 0 for value in counted.values()):
        raise UnsupportedError(f"{found.source}: it does not say how many steps were made: {counted}")
    config = first.get("ds_config")
    window = config.get("gradient_accumulation_steps", 1) if isinstance(config, Mapping) else 1
    window = window if type(window) is int and window >= 1 else 1
    scaler, scale = zero.get("loss_scaler"), None
    if isinstance(scaler, Inert):
        scale = {name: scaler.get(name) for name in _SCALED if scaler.get(name) is not None}
        scale["external"] = None
    schedule = first.get("lr_scheduler")
    if schedule is not None and (problem := unwritable(schedule, "lr_scheduler")) is not None:
        raise UnsupportedError(f"{found.source}: {problem}")
    found.step = int(counted["global_steps"] or 0)
    found.wrapper = {
        "counters": {**counted, "micro_steps": found.step * window}, "window": window, "loss_scale": scale,
        "lr_scheduler": schedule,
    }  # fmt: skip
    client: dict[Any, Any] = {}
    for name, value in first.items():
        if name in _KNOWN:
            continue
        if (problem := unwritable(value, str(name))) is None:
            client[name] = value
        else:
            found.notes.append(problem)
    found.client_state = client or None
    for name in ("data_sampler", "random_ltd"):
        if first.get(name):
            found.notes.append(f"{name}: DeepSpeed's own")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Inert) or isinstance(other, Inert):
        return type(one) is type(other)
    return bool(one == other)


def hyper_parameters(found: Imported, group: Mapping[str, Any], number: int, names: list[str]) -> dict[str, Any]:
    """A param group, with names in place of parameters. What no file can hold of it is noted."""
    kept = {str(key): value for key, value in group.items() if key not in ("params", "param_names")}
    for key in [key for key, value in kept.items() if unwritable(value, key) is not None]:
        found.notes.append(f"{key} of group {number} of the optimizer")
        del kept[key]
    return {**kept, "params": names}
