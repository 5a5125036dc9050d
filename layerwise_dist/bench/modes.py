# SPDX-License-Identifier: Apache-2.0
"""The ways to checkpoint that `bench train` compares, each used as its own documentation shows.

A mode is started before a block of steps and ended after it. In between, the training loop calls `update` in place of
`optimizer.step()` and `end_iteration` at the end of each iteration; what those take belongs to the step.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import layerwise_dist as lwd


class NotHere(Exception):
    """The mode cannot run in this job; says why."""


class Mode:
    """Trains without checkpoints, and is what the others are made from. Belongs to the training thread."""

    name = "none"
    audits = False
    flushes = "-"  # whether a saved checkpoint was flushed to the disk when the mode calls it done

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, every: int, ranks: int) -> None:
        self.model, self.optimizer, self.every, self.ranks = model, optimizer, every, ranks
        self.rank = dist.get_rank() if ranks > 1 else 0
        self.to_committed: list[float] = []  # seconds from a boundary until that checkpoint was done

    def warm_steps(self) -> int:
        """Steps at the beginning of a block that are not measured; a multiple of `every` where the mode saves."""
        return 1

    def start(self, folder: Path) -> None:
        """Checkpoints go below `folder`, which is new, and removed after `finish`."""

    def update(self) -> None:
        self.optimizer.step()

    def end_iteration(self, step: int) -> None:
        """`step` counts from 1 at `start`; a checkpoint is due at each multiple of `every`."""

    def stalled(self) -> float:
        """Seconds, since `start`, that the training thread spent in calls of the mode."""
        return 0.0

    def audited(self) -> float:
        """What of `stalled` audits took, in seconds."""
        return 0.0

    def between(self, step: int) -> None:
        """After each iteration, outside the measured time."""

    def finish(self) -> None:
        """Waits until all is done."""

    def bytes_copied(self) -> float | None:
        """Share of a checkpoint's bytes that was copied in memory; None where it is not counted."""
        return None


class Layerwise(Mode):
    name = "layerwise"
    audits = True
    flushes = "yes"
    settings: dict[str, Any] = {}

    def warm_steps(self) -> int:
        """Three checkpoints with a full audit, and where that is soon done, as many as it takes to reuse files."""
        return 6 if self.every == 1 else 4 * self.every

    def start(self, folder: Path) -> None:
        self._closed = False
        settings = {"every_n_steps": self.every, **self.settings}
        self._engine = self.attach(folder, settings)
        self._engine.explicit()
        self._watch = _Watch(self.to_committed)

    def attach(self, folder: Path, settings: dict[str, Any]) -> Any:
        return lwd.attach(self.model, self.optimizer, dir=str(folder / "layerwise"), **settings)

    def end_iteration(self, step: int) -> None:
        self._engine.end_step()
        if step % self._engine.config.every_n_steps == 0:
            engine = self._engine
            # Steps that a newer commit overtook are done with it; those aborted at the end, when the mode is.
            self._watch.expect(lambda: self._closed or (engine.committed_step or 0) >= step, time.perf_counter())

    def stalled(self) -> float:
        return float(self._engine.stats()["stall_s"])

    def audited(self) -> float:
        return float(self._engine.stats()["stall_audit_s"])

    def finish(self) -> None:
        self._engine.close()
        self._closed = True
        self._watch.end()
        self._last = self._engine.stats()

    def bytes_copied(self) -> float | None:
        written = self._last["bytes_written"]
        return self._last["bytes_copied"] / written if written else None


class LayerwiseNoHash(Layerwise):
    name = "layerwise-nohash"
    settings = {"hash": False}


class LayerwiseNoDrift(Layerwise):
    """Replicas are compared at the first checkpoint only."""

    name = "layerwise-no-drift"
    settings = {"replica_drift": "off"}


class LayerwiseMonitor(Layerwise):
    """Written by a process of its own."""

    name = "layerwise-monitor"
    settings = {"mode": "monitor"}


class LayerwisePipelined(Layerwise):
    name = "layerwise-pipelined"
    settings = {"update": "pipelined_step"}


class LayerwiseInBackward(Layerwise):
    name = "layerwise-in-backward"
    settings = {"update": "in_backward"}


class LayerwiseOffStep(Layerwise):
    """Attached, but no step is due: what a step costs that checkpoints nothing."""

    name = "layerwise-off-step"
    flushes = "-"
    settings = {"every_n_steps": 1_000_000_000}

    def warm_steps(self) -> int:
        return 1


class Peer(Mode):
    """Saves model and optimizer, each time into a new folder; the last but one is removed outside the measured time."""

    def warm_steps(self) -> int:
        return 2 if self.every == 1 else self.every

    def start(self, folder: Path) -> None:
        self._folder, self._stall = folder, 0.0

    def end_iteration(self, step: int) -> None:
        if step % self.every == 0:
            began = time.perf_counter()
            self.save(self.target(step), began)
            self._stall += time.perf_counter() - began

    def between(self, step: int) -> None:
        if step % self.every == 0 and self.rank == 0:
            old = self.target(step - 2 * self.every)  # complete: each save waits for the one before it
            if old.exists():
                shutil.rmtree(old)

    def target(self, step: int) -> Path:
        return self._folder / f"{self.name.replace(' ', '-')}-{step}"

    def stalled(self) -> float:
        return self._stall

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, target: Path, began: float) -> None:
        raise NotImplementedError


class TorchSave(Peer):
    """Each rank saves its own part into a file of its own."""

    name = "torch.save + fsync"
    flushes = "files, not folders"

    def save(self, target: Path, began: float) -> None:
        target.mkdir(exist_ok=True)
        self.save_file(target / f"rank_{self.rank}.pt")
        self.to_committed.append(time.perf_counter() - began)

    def save_file(self, path: Path) -> None:
        with open(path, "wb") as file:
            torch.save(local_parts(self.state()), file)
            file.flush()
            os.fsync(file.fileno())


class Dcp(Peer):
    name = "DCP"
    flushes = "files, not folders"

    def save(self, target: Path, began: float) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=str(target), no_dist=self.ranks == 1)
        self.to_committed.append(time.perf_counter() - began)


class FuturePeer(Peer):
    """Gives a future for each save, which is awaited before the next."""

    _pending: Future[Any] | None = None

    def expect(self, pending: Future[Any] | None, began: float) -> None:
        self._pending = pending
        if pending is not None:
            pending.add_done_callback(lambda _: self.to_committed.append(time.perf_counter() - began))

    def finish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


class DcpAsync(FuturePeer):
    name = "DCP async"
    flushes = "files, not folders"
    _group: Any = None

    def start(self, folder: Path) -> None:
        super().start(folder)
        if self.ranks > 1 and DcpAsync._group is None:
            DcpAsync._group = dist.new_group(backend="gloo")  # its thread may not share the training's group

    def save(self, target: Path, began: float) -> None:
        import torch.distributed.checkpoint as dcp

        super().finish()
        extra: dict[str, Any] = {"no_dist": True} if self.ranks == 1 else {"process_group": DcpAsync._group}
        pending = dcp.async_save(self.state(), checkpoint_id=str(target), **extra)
        assert isinstance(pending, Future), "without a stager of its own it gives one"
        self.expect(pending, began)


class TorchSnapshot(Peer):
    name = "torchsnapshot async"
    flushes = "no"
    _pending: Any = None

    def start(self, folder: Path) -> None:
        super().start(folder)
        if self.ranks > 1:
            raise NotHere("it knows no DTensor, which FSDP2's parameters are")
        try:
            import torchsnapshot
        except ImportError as error:
            raise NotHere(f"not installed ({error})") from None
        self._take = torchsnapshot.Snapshot.async_take
        self._watch = _Watch(self.to_committed)

    def save(self, target: Path, began: float) -> None:
        self._wait()
        self._pending = self._take(str(target), {"model": self.model, "optimizer": self.optimizer})
        self._watch.expect(self._pending.done, began)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def finish(self) -> None:
        self._wait()
        self._watch.end()


class TorchCheckpointing(FuturePeer):
    """Staged into shared memory, written by a process of its own."""

    name = "torch_checkpointing async"
    flushes = "no"

    def start(self, folder: Path) -> None:
        super().start(folder)
        try:
            from torch_checkpointing import CheckpointManager
            from torch_checkpointing.config import AsyncCheckpointSaverConfig
            from torch_checkpointing.staging import CheckpointStagerConfig
            from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
        except ImportError as error:
            raise NotHere(f"not installed ({error})") from None
        on_device = any(param.is_cuda for param in self.model.parameters())
        staging = CheckpointStagerConfig(use_pinned_memory=on_device, use_non_blocking_copy=on_device)
        saving = AsyncCheckpointSaverConfig(staging_config=staging)
        # Its direct writes end in EINVAL where a file's length is not a multiple of the sector (0.1.1).
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(save=saving, storage_config=storage))

    def update(self) -> None:
        began = time.perf_counter()
        with self._manager.lock():
            self._stall += time.perf_counter() - began
            self.optimizer.step()

    def save(self, target: Path, began: float) -> None:
        super().finish()
        self.expect(self._manager.save(str(target), self.state()), began)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self._manager.close()


MODES: dict[str, type[Mode]] = {
    "layerwise": Layerwise,
    "layerwise-nohash": LayerwiseNoHash,
    "layerwise-no-drift": LayerwiseNoDrift,
    "layerwise-monitor": LayerwiseMonitor,
    "layerwise-pipelined": LayerwisePipelined,
    "layerwise-in-backward": LayerwiseInBackward,
    "layerwise-off-step": LayerwiseOffStep,
    "torch-save": TorchSave,
    "dcp": Dcp,
    "dcp-async": DcpAsync,
    "torchsnapshot": TorchSnapshot,
    "torch-checkpointing": TorchCheckpointing,
}


class _Watch:
    """Notes when something has come true. Looks every few milliseconds, and only while there is something to come."""

    _EVERY_S = 0.005

    def __init__(self, into: list[float]) -> None:
        self._into = into
        self._work: queue.SimpleQueue[tuple[Callable[[], bool], float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="bench-watch", daemon=True)
        self._thread.start()

    def expect(self, done: Callable[[], bool], since: float) -> None:
        """`done` is asked on another thread, and must come true before `end` is called."""
        self._work.put((done, since))

    def end(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            done, since = item
            while not done():
                time.sleep(self._EVERY_S)
            self._into.append(time.perf_counter() - since)


def local_parts(value: Any) -> Any:
    """The same tree with each DTensor replaced by this rank's part."""
    if isinstance(value, dict):
        return {key: local_parts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [local_parts(item) for item in value]
    return value.to_local() if hasattr(value, "to_local") else value
