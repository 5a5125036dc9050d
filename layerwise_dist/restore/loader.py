"""Fills the live tensors of one rank from a commit's shards, straight, without `load_state_dict`.

`load_state_dict` of an optimizer would cast fp32 moments of bf16 parameters to bf16; here bytes stay bytes.
Names, shapes, dtypes and the boundary's state are all checked before the first byte of a live tensor is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from layerwise_dist.errors import DamageError, MismatchError
from layerwise_dist.frameworks.base import Framework, ParamView
from layerwise_dist.pieces import DTYPES
from layerwise_dist.restore.planner import ShardSet, Span, plan
from layerwise_dist.slices import Slice
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.reader import Entry

# Which kernel a group uses is this run's choice, not the checkpoint's: kernels are never switched by a restore.
_KERNEL_KEYS = frozenset({"foreach", "fused", "capturable", "differentiable"})
_LISTED = 8


@dataclass
class LoadPlan:
    """One rank's restore, checked and ready. `sealed` is what the boundary saved (see `engine.LayerwiseEngine`)."""

    sealed: dict[str, Any]
    reads: list[tuple[torch.Tensor, list[Span]]] = field(default_factory=list)
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def prepare(framework: Framework, optimizer: torch.optim.Optimizer, shards: ShardSet, where: str) -> LoadPlan:
    """Raises MismatchError listing every name that is missing, unexpected or of another shape; DamageError; OSError."""
    alone = not framework.shared_params
    index = _index(shards, alone and not framework.shared_buffers)
    text, blob = shards.own.state()
    sealed = typed_json.loads(text, blob, where=f"shard {shards.own.index.path}")
    if not isinstance(sealed, dict):
        raise DamageError(f"shard {shards.own.index.path}: its state is not an object")
    loading = LoadPlan(sealed)
    missing: list[str] = []
    shaped: list[str] = []
    wanted_names: set[str] = set()

    def want(wanted: Slice, tensor: torch.Tensor) -> None:
        wanted_names.add(wanted.name)
        found = index.get(wanted.name, [])
        try:
            loading.reads.append((framework.local(tensor), plan(wanted, found)))
        except MismatchError as error:
            (shaped if found else missing).append(str(error) if found else wanted.name)

    for view in framework.params:
        want(framework.need(view, "param", view.param), view.param)
    for fqn, buffer in framework.buffers():
        local = framework.local(buffer)
        want(Slice.whole("buffer", fqn, _code(local), tuple(local.shape)), local)
    by_fqn: dict[str, list[str]] = {}
    for name in index:
        kind, fqn = name.split("/", 1)
        if kind not in ("param", "buffer"):
            by_fqn.setdefault(fqn, []).append(name)
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    for view in framework.params:
        group = groups.get(id(view.param))
        for name in by_fqn.pop(view.fqn, []) if group is not None else []:
            rank, entry = index[name][0]
            tensor = _state_tensor(framework, optimizer, view, entry, group or {})
            loading.states.setdefault(view.fqn, {})[entry.slice.kind] = tensor
            want(framework.need(view, entry.slice.kind, tensor), tensor)
    unexpected = sorted(name for name in index if name not in wanted_names)
    problems = (
        shaped[:_LISTED]
        + _listing("missing from the checkpoint", missing)
        + _listing("unexpected in the checkpoint", unexpected)
    )
    problems += _check_optimizer(framework, optimizer, sealed)
    if problems:
        raise MismatchError(
            f"{where} is not of this model and optimizer; nothing was loaded:\n  " + "\n  ".join(problems)
        )
    return loading


def load(loading: LoadPlan, shards: ShardSet) -> None:
    """Reads everything, verified block by block. On DamageError or OSError live tensors may be partly overwritten."""
    by_rank: dict[int, list[tuple[int, int, int]]] = {}
    staged: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tensor, spans in loading.reads:
        target = tensor
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            target = torch.empty(tensor.shape, dtype=tensor.dtype)
            staged.append((tensor, target))
        for span in spans:
            by_rank.setdefault(span.rank, []).append((span.begin, span.end, target.data_ptr() + span.offset))
    for rank, ranges in by_rank.items():
        shards.shard(rank).read_into(ranges)
    with torch.no_grad():
        for tensor, target in staged:
            tensor.copy_(target)


def adopt(loading: LoadPlan, framework: Framework, optimizer: torch.optim.Optimizer) -> None:
    """Hands the loaded state to the optimizer. REQUIRES: `load` succeeded on all ranks."""
    saved = loading.sealed["optimizer"]
    for view in framework.params:
        state: dict[str, Any] = dict(loading.states.get(view.fqn, {}))
        state.update(saved["scalars"].get(view.fqn, {}))
        order = saved["order"].get(view.fqn, [])
        if state:
            optimizer.state[view.param] = {
                name: state[name] for name in [*order, *(k for k in state if k not in order)]
            }
        else:
            optimizer.state.pop(view.param, None)
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in values.items():
            if key == "params" or key in _KERNEL_KEYS:
                continue
            if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                with torch.no_grad():
                    group[key].copy_(value)
            else:
                group[key] = value


def _index(shards: ShardSet, alone: bool) -> dict[str, list[tuple[int, Entry]]]:
    """Entries by name, this rank's first. `alone`: what other ranks hold is none of this rank's business."""
    index = {name: [(shards.own.index.rank, entry)] for name, entry in shards.own.index.entries.items()}
    for rank, shard in () if alone else shards.others():
        for name, entry in shard.index.entries.items():
            index.setdefault(name, []).append((rank, entry))
    return index


def _state_tensor(
    framework: Framework, optimizer: torch.optim.Optimizer, view: ParamView, entry: Entry, group: dict[str, Any]
) -> torch.Tensor:
    """Where an optimizer state tensor is loaded to: the live one if it is alike, else a new one."""
    dtype = DTYPES[entry.slice.dtype]
    live = optimizer.state.get(view.param, {}).get(entry.slice.kind)
    if (
        isinstance(live, torch.Tensor)
        and live.dtype == dtype
        and tuple(live.shape) == entry.slice.global_shape
        and framework.is_wrapped(live) == entry.wrapped
    ):
        return live
    tensor = framework.new_state(view, entry.slice, dtype, entry.wrapped)
    if not entry.slice.global_shape and (group.get("capturable") or group.get("fused")):
        tensor = tensor.to(framework.local(view.param).device)
    return tensor


def _check_optimizer(framework: Framework, optimizer: torch.optim.Optimizer, sealed: dict[str, Any]) -> list[str]:
    saved = sealed["optimizer"]
    problems = []
    if saved["class"] != type(optimizer).__qualname__:
        problems.append(f"the checkpoint's optimizer is {saved['class']}, this one is {type(optimizer).__qualname__}")
    names = {id(view.param): view.fqn for view in framework.params}
    live = [[names[id(param)] for param in group["params"]] for group in optimizer.param_groups]
    kept = [list(group["params"]) for group in saved["groups"]]
    if live != kept:
        lengths = [len(group) for group in live], [len(group) for group in kept]
        problems.append(
            f"the optimizer's groups hold other parameters: {lengths[0]} here, {lengths[1]} in the checkpoint"
        )
    return problems


def _listing(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{what}: {', '.join(names[:_LISTED])}{more}"]


def _code(tensor: torch.Tensor) -> str:
    return next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
