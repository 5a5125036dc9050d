"""Fills the live tensors of one rank from a commit's shards, straight, without `load_state_dict`.

`load_state_dict` of an optimizer would cast fp32 moments of bf16 parameters to bf16; here bytes stay bytes.
Names, shapes, dtypes and the boundary's state are all checked before the first byte of a live tensor is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from layerwise_dist.errors import DamageError, MismatchError
from layerwise_dist.frameworks.base import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.pieces import DTYPES
from layerwise_dist.restore.contradictions import contradictions
from layerwise_dist.restore.planner import ShardSet, Span, plan
from layerwise_dist.slices import Slice
from layerwise_dist.storage import typed_json
from layerwise_dist.storage.reader import Entry, Shard, ShardIndex
from layerwise_dist.storage.reports import BaseReport

_LISTED = 8


@dataclass
class LoadPlan:
    """One rank's restore, checked and ready. `sealed` is what the boundary saved (see `engine.LayerwiseEngine`).

    `lacking` are the model's tensors (`<kind>/<fqn>`) that the checkpoint has not, and need not have. `base` is what is
    known of the frozen parameters that this rank's shard refers to.
    """

    sealed: dict[str, Any]
    reads: list[tuple[torch.Tensor, list[Span]]] = field(default_factory=list)
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    base: tuple[BaseReport, ShardIndex] | None = None


def prepare(
    framework: Framework, optimizer: OptimizerAdapter, shards: ShardSet, where: str, *, partly: bool = False
) -> LoadPlan:
    """With `partly`, the model may have tensors that the checkpoint has not; they stay as they are.

    Raises MismatchError listing every name that is missing, unexpected or of another shape; DamageError; OSError."""
    index = _index(shards, framework)
    own = shards.own[0]
    text, blob = own.state()
    sealed = typed_json.loads(text, blob, where=f"shard {own.index.path}")
    if not isinstance(sealed, dict):
        raise DamageError(f"shard {own.index.path}: its state is not an object")
    loading = LoadPlan(sealed)
    missing: list[str] = []
    shaped: list[str] = []
    wanted_names: set[str] = set()
    read_names: list[str] = []

    def want(wanted: Slice, tensor: torch.Tensor) -> None:
        wanted_names.add(wanted.name)
        found = index.get(wanted.name, [])
        try:
            loading.reads.append((framework.local(tensor), plan(wanted, found)))
            read_names.append(wanted.name)
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
        if kind not in ("param", "master", "buffer"):
            by_fqn.setdefault(fqn, []).append(name)
    for view in optimizer.state_views:
        for name in by_fqn.pop(view.fqn, []):
            _, entry = index[name][0]
            tensor = optimizer.place(view, entry.slice, entry.wrapped)
            loading.states.setdefault(view.fqn, {})[entry.slice.kind] = tensor
            want(framework.need(view, entry.slice.kind, tensor), tensor)
    if partly:
        loading.lacking, missing = missing, []
        sealed["optimizer"]["lacking"] = [name.split("/", 1)[1] for name in loading.lacking]
    unexpected = sorted(name for name in index if name not in wanted_names)
    problems = (
        shaped[:_LISTED]
        + _listing("missing from the checkpoint", missing)
        + _listing("unexpected in the checkpoint", unexpected)
    )
    problems += optimizer.check(sealed["optimizer"])
    problems += contradictions(read_names, loading.reads)[:_LISTED]
    if problems:
        raise MismatchError(
            f"{where} is not of this model and optimizer; nothing was loaded:\n  " + "\n  ".join(problems)
        )
    return loading


def load(loading: LoadPlan) -> None:
    """Reads everything, verified block by block. On DamageError or OSError live tensors may be partly overwritten."""
    by_shard: dict[int, tuple[Shard, list[tuple[int, int, int]]]] = {}
    staged: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tensor, spans in loading.reads:
        target = tensor
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            target = torch.empty(tensor.shape, dtype=tensor.dtype)
            staged.append((tensor, target))
        for span in spans:
            _, ranges = by_shard.setdefault(id(span.shard), (span.shard, []))
            ranges.append((span.begin, span.end, target.data_ptr() + span.offset))
    for shard, ranges in by_shard.values():
        shard.read_into(ranges)
    with torch.no_grad():
        for tensor, target in staged:
            tensor.copy_(target)


def _index(shards: ShardSet, framework: Framework) -> dict[str, list[tuple[Shard, Entry]]]:
    """Entries by name, this rank's first. Others' only of what ranks share: the rest is none of this rank's business.

    Raises DamageError for a tensor that is both in the shard and in its base.
    """
    index: dict[str, list[tuple[Shard, Entry]]] = {}
    for shard in shards.own:
        for name, entry in shard.index.entries.items():
            if name in index:
                raise DamageError(f"shard {shard.index.path}: {name} is also in {index[name][0][0].index.path}")
            index[name] = [(shard, entry)]
    for shard in shards.others() if framework.shared_params or framework.shared_buffers else ():
        for name, entry in shard.index.entries.items():
            if framework.shared(*name.split("/", 1)):
                index.setdefault(name, []).append((shard, entry))
    return index


def _listing(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{what}: {', '.join(names[:_LISTED])}{more}"]


def _code(tensor: torch.Tensor) -> str:
    return next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
