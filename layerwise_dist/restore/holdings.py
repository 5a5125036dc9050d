# SPDX-License-Identifier: Apache-2.0
"""Tells the ranks that read headers which parts of tensors each rank may need."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from layerwise_dist.frameworks.framework import Framework
from layerwise_dist.frameworks.optimizers import OptimizerAdapter
from layerwise_dist.restore.reslice import boxes, meet, run_of
from layerwise_dist.storage import strict_json
from layerwise_dist.tensors.slices import Slice

EVERYTHING, NOTHING = (-1, (1 << 63) - 1), ((1 << 63) - 1, -1)  # of `Holdings.reach`


class Holdings:
    """Of one rank: by each name that a parameter or buffer has, the slices of it; None for all that there is.

    State of a parameter's shape is cut as the parameter is. Of tensors of any other shape, all is needed.
    """

    def __init__(self, parts: Mapping[str, list[Slice] | None]) -> None:
        self._parts = parts
        self._runs = {
            fqn: None if held is None else [(part, part.global_shape, run_of(part)) for part in held]
            for fqn, held in parts.items()
        }

    @classmethod
    def of(cls, framework: Framework, optimizer: OptimizerAdapter) -> Holdings:
        parts: dict[str, list[Slice] | None] = {}
        views = {(view.fqn, id(view.param)): view for view in (*framework.params, *optimizer.state_views)}
        for view in views.values():
            found = framework.param_parts(view)
            for part, _ in found:
                if part.fqn != view.fqn or len(found) != 1:
                    parts[part.fqn] = None
                    continue
                for name in (view.fqn, *view.aliases):
                    held = parts.setdefault(name, [])
                    if held is not None and part not in held:
                        held.append(part)
            if len(found) != 1:
                parts.update(dict.fromkeys((view.fqn, *view.aliases)))
        parts.update((part.fqn, None) for part, _ in framework.buffer_slices())
        return cls(parts)

    def reach(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Elements of a tensor of this shape that the rank may need, in row-major order: the first, and the one after
        the last. None where they are not one run: `needs` then says it of each part. `name` as there.
        """
        held = self._runs.get(name, ())
        if held is None or any(its != shape or math.prod(its) <= 1 for _, its, _ in held):
            return EVERYTHING
        if not held:
            return NOTHING
        own = held[0][2] if len(held) == 1 else None
        return None if own is None else (own[0], own[0] + own[1])

    def needs(self, name: str, part: Slice, run: tuple[int, int] | None) -> bool:
        """Whether the rank may need what a shard has of a tensor; `name` is its fqn, or another one that it has.

        `run` is `run_of(part)`.
        """
        held = self._runs.get(name, ())
        if held is None:
            return True
        for mine, shape, own in held:
            if shape != part.global_shape or math.prod(shape) <= 1:
                return True
            if run is not None and own is not None:
                if run[0] < own[0] + own[1] and own[0] < run[0] + run[1]:
                    return True
            elif meet(mine, part):
                return True
        return False

    def encode(self) -> bytes:
        def told(part: Slice) -> list[Any]:
            if (run := run_of(part)) is not None:
                return [part.global_shape, *run]
            (box,) = boxes(part)
            return [part.global_shape, box.begin, box.shape]

        return json.dumps(
            {fqn: None if held is None else [told(part) for part in held] for fqn, held in self._parts.items()}
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> Holdings:
        """Raises ValueError, KeyError or TypeError for what is none."""

        def heard(fqn: str, told: list[Any]) -> Slice:
            shape, one, other = told
            if isinstance(one, int):
                return Slice("param", fqn, "U8", tuple(shape), start=one, length=other)
            return Slice("param", fqn, "U8", tuple(shape), offsets=tuple(one), lengths=tuple(other))

        tree = strict_json.loads(data)
        return cls({fqn: None if held is None else [heard(fqn, each) for each in held] for fqn, held in tree.items()})
