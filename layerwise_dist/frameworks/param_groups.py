# SPDX-License-Identifier: Apache-2.0
"""Compares an optimizer's groups with a checkpoint's, and restores the saved hyper-parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from layerwise_dist.tensors.values import alike

# Which kernel a group uses is this run's choice, not the checkpoint's: kernels are never switched by a restore.
KERNEL_KEYS = frozenset({"foreach", "fused", "capturable", "differentiable"})


def check_groups(
    kind: str, live: Sequence[Sequence[str]], saved: Mapping[str, Any], lacking: Collection[str] = ()
) -> list[str]:
    """Whether class and groups (the names of their parameters) fit those of the checkpoint; what does not, in words."""
    if "optimizers" in saved:
        return [f"the checkpoint holds optimizers {sorted(saved['optimizers'])} by name, this one has no name"]
    problems = []
    if saved["class"] != kind:
        problems.append(f"the checkpoint's optimizer is {saved['class']}, this one is {kind}")
    try:
        group_origins(live, saved, lacking)
    except ValueError as error:
        problems.append(str(error))
    return problems


def group_origins(
    live: Sequence[Sequence[str]], saved_state: Mapping[str, Any], lacking: Collection[str] = ()
) -> list[int | None]:
    """Of each live group (names of its parameters), the number of the saved group that its hyper-parameters are of.

    Groups may have been split since, or merged where their hyper-parameters were equal. Where the
    checkpoint has nothing of a group, and need not (all of it is `lacking`), it is None. Raises ValueError in words.
    """
    saved: Sequence[Mapping[str, Any]] = saved_state["groups"]
    kept = [list(group["params"]) for group in saved]
    lacking = set(lacking)
    whole = [list(group) for group in live]
    live = [[name for name in group if name not in lacking] for group in live]
    if kept in (whole, live):
        return list(range(len(kept)))
    group_of = {name: number for number, names in enumerate(kept) for name in names}
    here = {name for group in live for name in group}
    if here != group_of.keys():
        lengths = [len(group) for group in live], [len(names) for names in kept]
        raise ValueError(
            f"the optimizer's groups hold other parameters: {lengths[0]} here, {lengths[1]} in the checkpoint"
        )
    origins: list[int | None] = []
    for number, names in enumerate(live):
        sources = sorted({group_of[name] for name in names})
        if not sources and lacking:
            origins.append(None)
            continue
        if not sources:
            raise ValueError(
                f"group {number} of the optimizer is empty, and its groups are not those of the checkpoint"
            )
        for other in sources[1:]:
            if found := differing(saved[sources[0]], saved[other]):
                raise ValueError(
                    f"group {number} of the optimizer has parameters of groups {sources[0]} and {other} of the "
                    f"checkpoint, which differ in {', '.join(found)}"
                )
        origins.append(sources[0])
    return origins


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the hyper-parameters in which two groups differ."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, int | float) and isinstance(b, int | float):
            return a == b or (a != a and b != b)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return alike(a, b)

    skipped = {"params", "name", *KERNEL_KEYS}
    keys = sorted((one.keys() | other.keys()) - skipped)
    return [key for key in keys if not (key in one and key in other and equal(one[key], other[key]))]


def in_order(state: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """The state in the order in which the optimizer had made it; names that are not in `order` come last."""
    return {name: state[name] for name in dict.fromkeys([*order, *state])}


def adopt_groups(
    groups: Sequence[dict[str, Any]], names: Sequence[Sequence[str]], saved: Mapping[str, Any],
    lacking: Collection[str] = (),
) -> None:  # fmt: skip
    """Puts the saved hyper-parameters into the live groups, whose parameters are `names`."""
    origins = group_origins(names, saved, lacking)
    alike = origins == list(range(len(saved["groups"])))
    for group, origin in zip(groups, origins, strict=True):
        if origin is None:
            continue
        for key, value in saved["groups"][origin].items():
            if key == "params" or key in KERNEL_KEYS or (key == "name" and not alike):
                continue
            if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                with torch.no_grad():
                    group[key].copy_(value)
            else:  # several groups may come from one
                group[key] = value.clone() if isinstance(value, torch.Tensor) else value
