# SPDX-License-Identifier: Apache-2.0
"""Support for the crash and fault tests: two ranks as threads of one process, and jobs of theirs.

A `Story` is a list of sessions in one directory of one Env. It keeps what every rank held at every step, so that a
restored state can be compared bit for bit, and marks in the Env's log from when on which record was said to be durable.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kit.crash_truth import ROOT, Truth
from kit.shards import Tensors, beginning_of, content_hash, differing
from layerwise_dist.commit.metadata import CheckpointMetadataManager
from layerwise_dist.commit.transports.local import LocalHub, LocalTransport
from layerwise_dist.config import load_config
from layerwise_dist.engine import assembly
from layerwise_dist.engine.engine import LayerwiseEngine, workings_of

torch.set_num_threads(1)

WORLD = 2
POLICIES = ("none", "all", "names", "data")


class RankThread(threading.Thread):
    def __init__(self, body: Callable[[], Any], rank: int) -> None:
        super().__init__(name=f"rank-{rank}", daemon=True)
        self._body, self.value, self.error = body, None, None

    def run(self) -> None:
        try:
            # Each thread has a count of its own for the matrix library, which with another count rounds otherwise.
            torch.set_num_threads(1)
            self.value = self._body()
        except BaseException as error:
            self.error = error


def try_ranks(
    body: Callable[[LocalTransport], Any], *, world: int = WORLD, timeout_s: float = 60.0
) -> list[RankThread]:
    """Runs `body` once a rank, each on a thread; each one's `value` or `error` is in the result, by rank."""
    hub = LocalHub(world)
    transports = [LocalTransport(hub, rank) for rank in range(world)]
    threads = [RankThread(lambda transport=transport: body(transport), transport.rank) for transport in transports]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        frames = sys._current_frames()
        stacks = [
            "".join(traceback.format_stack(frames[t.ident])) for t in threads if t.is_alive() and t.ident in frames
        ]
        raise AssertionError(f"ranks did not end within {timeout_s:g} s:\n" + "\n".join(stacks))
    return threads


def in_ranks(body: Callable[[LocalTransport], Any], *, world: int = WORLD, timeout_s: float = 60.0) -> list[Any]:
    """As `try_ranks`, but raises the first rank's error."""
    threads = try_ranks(body, world=world, timeout_s=timeout_s)
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    return [thread.value for thread in threads]


def settings(root: str = ROOT, **overrides: Any) -> Any:
    base: dict[str, Any] = {
        "dir": root, "writer": {"queue_depth": 2, "block_kb": 32},
        "commit": {"timeout_s": 20.0}, "fence_timeout_s": 20.0,
    }  # fmt: skip
    return load_config({**base, **overrides})


def build(rank: int, salt: int = 0, frozen: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Three layers, of which the middle one's weight is large enough (66 KiB) to be written in place; or it is
    `frozen`.
    """
    model = nn.Sequential(nn.Linear(6, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 3))
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    model[2].requires_grad_(not frozen)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, phase: int, step: int) -> None:
    """One update; what it is fed depends on rank, phase and step, so that no two states are alike."""
    generator = torch.Generator().manual_seed(1 + step + 1000 * phase + 100_000 * rank)
    optimizer.zero_grad()
    model(torch.randn(5, 6, generator=generator)).square().mean().backward()
    optimizer.step()


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Copies of everything that a shard of this rank holds, under the names in the file."""
    found: Tensors = {}
    for name, param in model.named_parameters():
        found[f"param/{name}"] = param.detach().clone()
        for kind, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{kind}/{name}"] = value.detach().clone()
    return found


@dataclass
class Story(Truth):
    """What happens in a directory: one session of a job after the other.

    With `frozen`, a layer is, of `frozen_ranks`; `survey.LEAST_BASE_BYTES` must let it have a base. Jobs write through
    `faulty`, if that is given, which passes on to `env`.
    """

    faulty: Any = None
    frozen: bool = False
    frozen_ranks: tuple[int, ...] = tuple(range(WORLD))
    lock: Any = field(default_factory=threading.Lock)

    def mark(self, phase: int, step: int) -> None:
        if hasattr(self.env, "mark"):
            self.env.mark(f"committed {phase} {step}")

    def session(
        self,
        phase: int,
        total: int,
        *,
        restore: int | str | None = "newest",
        fresh: bool = False,
        waiting: bool = True,
        spares_from: int | None = None,
        at_step: Callable[[LayerwiseEngine, int], None] = lambda engine, step: None,
        **config: Any,
    ) -> list[LayerwiseEngine]:
        """One run of the job by all ranks, up to step `total`. With `waiting`, each is committed before the next.

        From the commit of step `spares_from` on, a retired file must wait to be reused before the next step begins.
        `at_step` runs on every rank before an update, with the number of steps completed.
        """

        def run(transport: LocalTransport) -> LayerwiseEngine:
            return self._run(transport, phase, total, restore, fresh, waiting, spares_from, at_step, config)

        return in_ranks(run)

    def _run(
        self,
        transport: LocalTransport,
        phase: int,
        total: int,
        restore: int | str | None,
        fresh: bool,
        waiting: bool,
        spares_from: int | None,
        at_step: Callable[[LayerwiseEngine, int], None],
        config: dict[str, Any],
    ) -> LayerwiseEngine:
        rank = transport.rank
        model, optimizer = build(rank, phase, self.frozen and rank in self.frozen_ranks)
        place = {"phase": 0, "step": 0}
        engine = assembly.assemble(
            model, optimizer, settings(self.root, **config), transport, self.faulty or self.env,
            state={"place": place}, fresh=fresh,
        )  # fmt: skip
        if rank == 0 and hasattr(self.env, "mark"):
            info = workings_of(engine).info
            self.env.mark(f"attached {info.epoch} {info.identity}")
        with engine:
            if not fresh:
                engine.restore(None if restore == "newest" else restore)
            if fresh or isinstance(restore, int):
                self._branched(phase, rank)
            elif rank == 0 and engine.committed_step is not None:
                self.mark(place["phase"], engine.committed_step)
            stop = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(engine, phase, stop), daemon=True)
            if rank == 0 and not waiting:
                watcher.start()
            for step in engine.steps(total):
                if waiting:
                    self._committed(engine, phase, step, rank)
                if spares_from is not None and step >= spares_from:
                    await_spare(engine)
                at_step(engine, step)
                train(model, optimizer, rank, phase, step)
                place["phase"], place["step"] = phase, step + 1
                with self.lock:
                    self.states.setdefault((phase, step + 1), {})[rank] = tensors_of(model, optimizer)
            engine.wait(total)
            self._committed(engine, phase, total, rank)
            stop.set()
            if watcher.ident is not None:
                watcher.join(10)
        return engine

    def _committed(self, engine: LayerwiseEngine, phase: int, step: int, rank: int) -> None:
        if (phase, step) in self.states:
            engine.wait(step)
            if rank == 0:
                self._remember(phase, step)
                self.mark(phase, step)

    def _remember(self, phase: int, step: int) -> None:
        """What the files of the newest commit hold; it is not retired before the next."""
        manager = CheckpointMetadataManager(self.env, self.root)
        for newest in manager.inventory().lineage()[:1]:
            for rank in range(newest.world_size):
                try:
                    data = self.env.read_file(manager.shard_path(newest, rank), 1 << 30)
                except FileNotFoundError:
                    continue  # a rename was left out: the sweep's to find
                self.published[beginning_of(data)] = ((phase, step), content_hash(data))

    def _watch(self, engine: LayerwiseEngine, phase: int, stop: threading.Event) -> None:
        seen = engine.committed_step
        while not stop.wait(0.0005):
            step = engine.committed_step
            if step is not None and step != seen:
                seen = step
                self.mark(phase, step)

    def _branched(self, phase: int, rank: int) -> None:
        if rank == 0:
            self.branches[max(CheckpointMetadataManager(self.env, self.root).inventory().branches, default=0)] = phase
            self.mark(phase, 0)

    def restart(self, env: Any, *, root: str | None = None, go_on: bool = False, **config: Any) -> int:
        """A whole job started on what a crash left: restores, compares every bit, with `go_on` saves again."""

        def run(transport: LocalTransport) -> tuple[int, dict[str, int], Tensors]:
            model, optimizer = build(transport.rank, 77, self.frozen and transport.rank in self.frozen_ranks)
            place = {"phase": 0, "step": 0}
            with assembly.assemble(
                model, optimizer, settings(root or self.root, **config), transport, env, state={"place": place}
            ) as engine:
                step = engine.restore()
                found = (step, dict(place), tensors_of(model, optimizer))
                for number in engine.steps(step + 1 if go_on else step):
                    train(model, optimizer, transport.rank, 99, number)
                    place["phase"], place["step"] = 99, number + 1
                    with self.lock:
                        self.states.setdefault((99, number + 1), {})[transport.rank] = tensors_of(model, optimizer)
                if go_on:
                    engine.wait(step + 1)
            return found

        results = in_ranks(run)
        steps, places = {result[0] for result in results}, [result[1] for result in results]
        assert len(steps) == 1 and places[0] == places[1], f"ranks restored different steps: {steps}, {places}"
        step = steps.pop()
        assert step == places[0]["step"]
        for rank, (_, place, tensors) in enumerate(results if step else []):
            wrong = differing(tensors, self.states[place["phase"], step][rank])
            assert not wrong, f"rank {rank} restored step {step} with other contents: {wrong}"
        if go_on:
            try:
                assert self.check(env, (99, step + 1)) == (99, step + 1)
            finally:
                del self.states[99, step + 1]
        return step


def await_spare(engine: LayerwiseEngine, timeout_s: float = 30.0) -> None:
    """Until a file of a retired checkpoint waits on this rank: retirement follows a commit in the background."""
    deadline = time.monotonic() + timeout_s
    while not workings_of(engine).adapter.recycler.waiting():
        assert time.monotonic() < deadline, f"no file of a retired checkpoint waits after {timeout_s:g} s"
        time.sleep(0.001)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def thread_names() -> list[str]:
    return [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
