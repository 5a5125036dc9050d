# SPDX-License-Identifier: Apache-2.0
"""Fills the live tensors of one rank from a commit's shards, straight, without `load_state_dict`.

`load_state_dict` of an optimizer would cast fp32 moments of bf16 parameters to bf16; here bytes stay bytes.
Names, shapes, dtypes and the boundary's state are all checked before the first byte of a live tensor is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from layerwise_dist.errors import DamageError, MismatchError, named
from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.frameworks.parts import WHOLE, Parts
from layerwise_dist.frameworks.subclasses import unlike, unmakable
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.restore import contents, filling
from layerwise_dist.restore.contents import RankPart
from layerwise_dist.restore.contradictions import contradictions
from layerwise_dist.restore.filling import Read
from layerwise_dist.restore.planner import Found, ShardSet, plan
from layerwise_dist.storage.reader import Entry, Shard, ShardIndex
from layerwise_dist.storage.reports import BaseReport
from layerwise_dist.tensors.slices import Slice, ranks_of

LISTED = 64  # of each kind: all that a changed model differs in; of another model, enough to see that


@dataclass
class LoadPlan:
    """One rank's restore, checked and ready. `sealed` is what the boundary saved (`capture.sealed.Sealer`).

    `given` are values that no shard has as they are, and the tensors that take them.
    `lacking` are the model's tensors (`<kind>/<fqn>`) that the checkpoint has not, and need not have. `base` is what is
    known of the frozen parameters that this rank's shard refers to.
    """

    sealed: SealedState
    reads: list[Read] = field(default_factory=list)
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    given: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    base: tuple[BaseReport, ShardIndex] | None = None

    @property
    def lacking_fqns(self) -> list[str]:
        return [name.split("/", 1)[1] for name in self.lacking]


def prepare(
    framework: Framework, optimizer: OptimizerAdapter, shards: ShardSet, where: str, *, partly: bool = False,
    parts: Parts = WHOLE,
) -> LoadPlan:  # fmt: skip
    """With `partly`, the model may have tensors that the checkpoint has not; they stay as they are. Of what `parts`
    leaves out nothing is read or checked.

    Raises MismatchError listing every name that is missing, unexpected or of another shape; UnsupportedError for a
    model that has become what cannot be saved; DamageError; OSError.
    """
    framework.follow()
    buffers = framework.buffer_slices()
    sharers = {view.fqn: framework.sharers(view) for view in framework.params}
    sharing = {part.name: ranks_of(part.among, framework.world_size) for part, _ in buffers}
    own = contents.read(shards.own, framework.name)
    partners = framework.partners()
    index = index_of(own, shards, partners, lambda name, fqn: sharing.get(name) or sharers.get(fqn, ()))
    sealed = own.sealed
    loading = LoadPlan(sealed)
    missing: list[str] = []
    shaped: list[str] = []
    wanted_names: set[str] = set()
    read_names: list[str] = []

    @cache
    def entries_of(rank: int) -> contents.Entries:
        return contents.entries(shards.of(rank))

    def elsewhere(wanted: Slice) -> Found:
        """What other ranks wrote; this one reads nothing of it where all are cut as they were."""
        ranks = set(ranks_of(wanted.among, framework.world_size)) if shards.shared else set()
        others = [entries_of(rank).get(wanted.name) for rank in sorted(ranks - partners - {framework.rank})]
        return [each for each in others if each is not None and each[1].slice.among == wanted.among]

    def want(wanted: Slice, tensor: torch.Tensor) -> None:
        wanted_names.add(wanted.name)
        found = index.get(wanted.name, [])
        if wanted.among and found and not found[0][1].slice.among:
            # This rank wrote it for itself alone, so that is what it gets.
            wanted = replace(wanted, among="")
        try:
            local = framework.local(tensor)
            loading.reads.append(Read(local, plan(wanted, found, lambda: elsewhere(wanted)), local.dtype))
            read_names.append(wanted.name)
        except MismatchError as error:
            (shaped if found else missing).append(str(error) if found else wanted.name)

    for view in framework.params:
        for part, tensor in framework.param_parts(view):
            want(part, tensor)
    for part, local in buffers:
        want(part, local)
    by_fqn: dict[str, list[str]] = {}
    for name in index:
        kind, fqn = name.split("/", 1)
        if kind not in contents.OF_MODEL:
            by_fqn.setdefault(fqn, []).append(name)
    for view in optimizer.state_views if parts.takes_optimizer else ():
        for name in by_fqn.pop(view.fqn, []):
            _, entry = index[name][0]
            tensor = optimizer.place(view, entry.slice, entry.wrapped)
            loading.states.setdefault(view.fqn, {})[entry.slice.kind] = tensor
            want(framework.need(view, entry.slice.kind, tensor), tensor)
    if partly or not parts.strict:
        loading.lacking, missing = missing, []
    unexpected = sorted(name for name in index if name not in wanted_names) if parts.strict else []
    if not parts.takes_optimizer:
        unexpected = [name for name in unexpected if name.split("/", 1)[0] in contents.OF_MODEL]
    problems = (
        at_most(shaped)
        + listing("missing from the checkpoint", missing)
        + listing("unexpected in the checkpoint", unexpected)
    )
    if parts.takes_optimizer:
        problems += optimizer.check(sealed["optimizer"], loading.lacking_fqns)
        problems += at_most(unmakable(sealed["optimizer"]["scalars"], sealed["optimizer"]["order"]))
    problems += at_most(unlike(framework.standing, sealed.get("standing", {})))
    problems += at_most(contradictions(read_names, loading.reads))
    if problems:
        raise another_model(where, problems)
    if gone := list(contents.absent(sealed, lambda kind, fqn: f"{kind}/{fqn}" in index)):
        raise DamageError(
            f"{where}: rank {framework.rank} had {', '.join(gone[:LISTED])} at the boundary, but no shard has it"
        )
    return loading


def load(loading: LoadPlan, fill: Callable[[Iterable[Read]], None] = filling.load) -> None:
    """Reads everything, verified block by block. On DamageError or OSError live tensors may be partly overwritten."""
    fill(loading.reads)
    with torch.no_grad():
        for tensor, value in loading.given:
            tensor.copy_(value)


def index_of(
    own: RankPart, shards: ShardSet, partners: Iterable[int], sharers: Callable[[str, str], Collection[int]]
) -> dict[str, list[tuple[Shard, Entry]]]:
    """Entries by name, this rank's first. Of the shards of `partners` only what they share with this rank: the rest is
    none of its business, though it may have the same name. `sharers(name, fqn)` are the ranks that share it here.

    Raises DamageError for a tensor that is both in another rank's shard and in its base.
    """
    index = {name: [found] for name, found in own.entries.items()}
    for other in shards.others(partners):
        for name, (shard, entry) in contents.entries(other).items():
            if entry.slice.among and shard.index.rank in sharers(name, entry.slice.fqn):
                index.setdefault(name, []).append((shard, entry))
    return index


def another_model(where: str, problems: list[str]) -> MismatchError:
    """`where` is the checkpoint, `problems` what differs, a line each."""
    text = "\n  ".join(problems)
    return MismatchError(f"{where} is not of this model and optimizer; nothing was loaded:\n  {text}")


def at_most(problems: list[str]) -> list[str]:
    """Of many only the first, and how many more."""
    more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return problems[:LISTED] + more


def listing(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {named(names, LISTED)}"] if names else []
