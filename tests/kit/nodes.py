# SPDX-License-Identifier: Apache-2.0
"""Ranks that are threads, on nodes that are pretended: a directory each, and what tells nodes apart is patched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kit.crash import RankThread, build, settings, tensors_of, train, try_ranks
from kit.shards import Tensors
from layerwise_dist._native import Env, PosixEnv
from layerwise_dist.commit import places
from layerwise_dist.commit.transports.local import LocalTransport
from layerwise_dist.engine import assembly
from layerwise_dist.frameworks.ddp import DDPFramework
from layerwise_dist.frameworks.framework import Framework

Body = Callable[[Any, Any, Any, int], Any]
"""Of a model, its optimizer, the engine, and the rank."""


class Nodes:
    """Directories of nodes below `root`, by the nodes' numbers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._node_of: Sequence[int] = ()
        monkeypatch.setattr(places, "place", self._place)

    def _place(self) -> str:
        return f"node {self._node_of[int(threading.current_thread().name.removeprefix('rank-'))]}"

    def disk(self, node: int) -> Path:
        return self.root / str(node)

    def files(self, node: int, name: str = "rank_*") -> list[str]:
        """Of all checkpoints, and of bases: ``<step>/<file>`` or ``base/<file>``, in order."""
        found = [*self.disk(node).glob(f"step_*/{name}"), *self.disk(node).glob(f"base/*/{name}")]
        return sorted(f"{_of(path)}/{path.stem}" for path in found)

    def job(
        self, node_of: Sequence[int], body: Body, *, alike: bool = True, frozen: bool = False, salt: int = 9,
        envs: Mapping[int, Env] | None = None, fresh: bool = False, **config: Any,
    ) -> list[RankThread]:  # fmt: skip
        """One start with a rank on each of these nodes. `alike`: as under DDP, where ranks hold the same and each
        writes its share; else each has a model of its own. `envs` by rank.
        """
        self._node_of = node_of

        def run(transport: LocalTransport) -> Any:
            rank = transport.rank
            model, optimizer = build(0 if alike else rank, salt, frozen)
            kind = DDPFramework if alike else Framework
            framework = kind(model, rank, len(node_of))
            options = settings(str(self.disk(node_of[rank])), **{"writer": {"queue_depth": 2, "block_kb": 4}, **config})
            env = (envs or {}).get(rank, PosixEnv())
            with assembly.assemble(
                model, optimizer, options, transport, env, framework=framework, fresh=fresh
            ) as engine:
                return body(model, optimizer, engine, rank)

        return try_ranks(run, world=len(node_of))


def _of(path: Path) -> str:
    folder = path.parent.name
    return str(int(folder[5:15])) if folder.startswith("step_") else "base"


def trains(steps: int, *, alike: bool = True, step: int | None = None) -> Body:
    """Restores, and goes on for so many steps. Gives what was held at the start and after each of them, by step."""

    def body(model: Any, optimizer: Any, engine: Any, rank: int) -> dict[int, Tensors]:
        start = engine.restore(step)
        held = {start: tensors_of(model, optimizer)}
        for number in engine.steps(start + steps):
            train(model, optimizer, 0 if alike else rank, step or 0, number)
            held[number + 1] = tensors_of(model, optimizer)
        return held

    return body


def values(threads: Sequence[RankThread]) -> list[Any]:
    """What the ranks returned. Raises the first one's error."""
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    return [thread.value for thread in threads]
