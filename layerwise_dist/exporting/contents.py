# SPDX-License-Identifier: Apache-2.0
"""Selects what goes into another format, by its names there. Reads no data yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from layerwise_dist.errors import UnsupportedError, named
from layerwise_dist.frameworks.described import DescribedOptimizer
from layerwise_dist.frameworks.subclasses import MARK
from layerwise_dist.reading.checkpoint import Checkpoint
from layerwise_dist.reading.renaming import Rename
from layerwise_dist.reading.tensor import LazyTensor
from layerwise_dist.restore.sealed_state import optimizers_of
from layerwise_dist.tensors.slices import ITEM_BYTES

CHUNK_BYTES = 64 << 20  # of a tensor, in memory at once
_LISTED = 3


@dataclass(frozen=True)
class Weight:
    """One entry of a model's state_dict. `tied` are its other keys."""

    key: str
    tensor: LazyTensor
    dtype: torch.dtype
    tied: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.tensor.numel * self.dtype.itemsize

    def chunks(self) -> Iterator[torch.Tensor]:
        """All of it in row-major order, as rows of at most `CHUNK_BYTES`. Raises as `LazyTensor`."""
        step = max(1, CHUNK_BYTES // max(ITEM_BYTES[self.tensor.get_dtype()], self.dtype.itemsize))
        for start in range(0, self.tensor.numel, step):
            yield self.tensor.read_range(start, min(step, self.tensor.numel - start)).to(self.dtype)

    def whole(self) -> torch.Tensor:
        return self.tensor[...].to(self.dtype)


@dataclass(frozen=True)
class OptimizerContents:
    """One optimizer: `groups` have hyper-parameters, and under `params` the keys of parameters; `state` by key and kind
    what is a tensor in the checkpoint (lazy) or any other value.
    """

    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Contents:
    """Attributes:
    weights: of the model, sorted; a tied one once.
    optimizers: by name among several, "" of the only one.
    """

    step: int
    weights: list[Weight]
    optimizers: dict[str, OptimizerContents] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        state = (
            value for each in self.optimizers.values() for kinds in each.state.values() for value in kinds.values()
        )
        return sum(weight.nbytes for weight in self.weights) + sum(
            value.nbytes for value in state if isinstance(value, LazyTensor)
        )


def contents(
    ckpt: Checkpoint, *, model: str | None = None, rename: Rename | None = None, dtype: torch.dtype | None = None,
    optimizer: bool = True,
) -> Contents:  # fmt: skip
    """Of one model. `dtype` is for its floating-point tensors, as `model.to(dtype)`; what it updates by stays as it is.

    Raises MismatchError (which of several models is not said, or two names become one), UnsupportedError for what other
    formats have no place for.
    """
    seen = ckpt.view(rename, model)
    if seen.standing:
        raise UnsupportedError(
            f"{named(sorted(seen.standing), _LISTED)}: parameters that stand for other tensors (quantized ones), which "
            "only restore() can reassemble"
        )
    by_name: dict[str, list[str]] = {}
    for key, name in seen.weights().items():
        by_name.setdefault(name, []).append(key)
    weights = []
    for name, keys in by_name.items():
        first = next((key for key in keys if name.endswith(f"/{key}")), keys[0])
        tensor = seen[name]
        made = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        weights.append(Weight(first, tensor, made, tuple(key for key in keys if key != first)))
    weights.sort(key=lambda weight: weight.key)
    return Contents(ckpt.step, weights, _optimizers(ckpt, seen) if optimizer else {})


def _optimizers(ckpt: Checkpoint, seen: Checkpoint) -> dict[str, OptimizerContents]:
    before, found = ckpt.hyperparameters, dict[str, OptimizerContents]()
    described = _described(seen)
    for name, groups in seen.hyperparameters.items():
        held = [fqn for group in groups for fqn in group["params"]]
        all_held = [fqn for group in before[name] for fqn in group["params"]]
        if not held and all_held:
            continue  # of other models
        if len(held) < len(all_held):
            raise UnsupportedError(
                f"optimizer {name or described[name]['class']} updates parameters of other models too: --weights-only "
                "exports none of it"
            )
        _check(name, described[name])
        found[name] = OptimizerContents(groups, {fqn: each for fqn in held if (each := _state(seen, fqn))})
    return found


def _described(seen: Checkpoint) -> dict[str, DescribedOptimizer]:
    optimizer = seen.sealed()["optimizer"]
    names = list(optimizer["optimizers"]) if "optimizers" in optimizer else [""]
    return dict(zip(names, optimizers_of(seen.sealed()), strict=True))


def _check(name: str, described: DescribedOptimizer) -> None:
    """Raises UnsupportedError for what no format but this project's has a place for."""
    more = [what for what in ("inside", "around", "told", "state") if described.get(what)]
    if more:
        raise UnsupportedError(
            f"optimizer {name or described['class']} keeps more than state by parameter ({', '.join(more)}), which "
            "only restore() can restore: --weights-only exports none of it"
        )


def _state(seen: Checkpoint, fqn: str) -> dict[str, Any]:
    """By kind, in the optimizer's own order."""
    scalars: dict[str, Any] = {}
    order: dict[str, None] = {}
    for rank in range(seen.world_size):
        state: Mapping[str, Any] = seen.sealed(rank)["optimizer"]
        scalars = {**state["scalars"].get(fqn, {}), **scalars}
        order |= dict.fromkeys(state["order"].get(fqn, ()))
    tensors = seen.state_kinds(fqn)
    if odd := [kind for kind in (*tensors, *scalars) if MARK in kind or "." in kind]:
        raise UnsupportedError(
            f"{odd[0]} of {fqn}: state that stands for other tensors, or is of an optimizer inside another, which "
            "only restore() can reassemble: --weights-only exports none of it"
        )
    kinds = dict.fromkeys([*order, *tensors, *scalars])
    return {
        kind: seen[f"{kind}/{fqn}"] if kind in tensors else scalars[kind]
        for kind in kinds
        if kind in tensors or kind in scalars
    }
