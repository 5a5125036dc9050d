# SPDX-License-Identifier: Apache-2.0
"""The ways to checkpoint a DeepSpeed engine that `bench train --deepspeed` compares."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

import layerwise_dist as lwd
from layerwise_dist.bench.modes import (
    Layerwise,
    LayerwiseMonitor,
    LayerwiseNoHash,
    LayerwiseOffStep,
    Mode,
    NotHere,
    Peer,
)


class _Attached:
    """A mode whose engine brings its optimizer."""

    def attach(self, folder: Path, settings: dict[str, Any]) -> Any:
        return lwd.attach(self.model, dir=str(folder / "layerwise"), **settings)  # type: ignore[attr-defined]


class DeepSpeedLayerwise(_Attached, Layerwise):
    pass


class DeepSpeedLayerwiseNoHash(_Attached, LayerwiseNoHash):
    pass


class DeepSpeedLayerwiseMonitor(_Attached, LayerwiseMonitor):
    pass


class DeepSpeedLayerwiseOffStep(_Attached, LayerwiseOffStep):
    pass


class SaveCheckpoint(Peer):
    """`engine.save_checkpoint()`, which returns when all ranks have written."""

    name = "save_checkpoint"
    flushes = "no"
    writer: dict[str, Any] | None = None  # of ds_config["checkpoint"]

    @property
    def _engine(self) -> Any:
        """The DeepSpeedEngine."""
        return self.model

    def start(self, folder: Path) -> None:
        super().start(folder)
        self._use(self.writer)

    def save(self, target: Path, began: float) -> None:
        self._save(target)
        self.to_committed.append(time.perf_counter() - began)

    def _save(self, target: Path) -> None:
        try:
            self._engine.save_checkpoint(str(target.parent), tag=target.name)
        except BaseException:
            self._let_go()
            raise

    def finish(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """The checkpoint engine is the usual one again."""
        self._use(None)

    def _use(self, writer: dict[str, Any] | None) -> None:
        """Another checkpoint engine, as it would be with that writer in ds_config."""
        from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config

        settings = {"checkpoint": {"writer": writer} if writer else {}}
        self._engine._config.checkpoint_config = get_checkpoint_config(settings)
        self._engine._configure_checkpointing()


class FastSaveCheckpoint(SaveCheckpoint):
    """DeepSpeed's fast writer: asynchronous I/O from locked memory, for ZeRO-3; below that its own Python writer."""

    name = "save_checkpoint, fast writer"

    def start(self, folder: Path) -> None:
        os.environ.update(CROSS_SIZE="1", CROSS_RANK="0", DS_PIN_MEMORY_BACKEND="native")
        os.environ.setdefault("LOCAL_RANK", str(self.rank))
        kind = "fast" if self._engine.zero_optimization_stage() == 3 else "python"
        if kind == "fast":
            _stand_in_for_operators()
        self.writer = {"type": kind, "data_parallel": "replica", **self.more}
        super().start(folder)

    more: dict[str, Any] = {}


class DecoupledSaveCheckpoint(FastSaveCheckpoint):
    """The same in a process of its own, which is waited for before the next update."""

    name = "save_checkpoint, decoupled"
    more = {"decoupled": True}
    _began: float | None = None

    def start(self, folder: Path) -> None:
        import torch.multiprocessing

        # Forked, since the stand-ins for operators are this process's.
        torch.multiprocessing.set_start_method("fork", force=True)
        super().start(folder)

    def update(self) -> None:
        self._wait()
        super().update()

    def save(self, target: Path, began: float) -> None:
        self._save(target)
        self._began = began

    def _wait(self) -> None:
        if self._began is not None:
            began = time.perf_counter()
            self._engine._commit_decoupled_checkpoint()
            ended = time.perf_counter()
            self._stall += ended - began
            self.to_committed.append(ended - self._began)
            self._began = None

    def finish(self) -> None:
        self._wait()
        super().finish()

    def _let_go(self) -> None:
        self._engine.checkpoint_engine.cleanup()
        super()._let_go()


def operator_is_built(root: str, name: str) -> bool:
    """Whether the installed DeepSpeed finds that operator built below `root`, and need not compile it for minutes.

    Another DeepSpeed's would be compiled again, and one whose compiler was killed is waited for without end.
    """
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        return False
    sources = str(Path(found.origin).parent)
    return any(
        sources in (library.parent / "build.ninja").read_text() and not (library.parent / "lock").exists()
        for library in Path(root).glob(f"**/{name}/{name}.so")
    )


def _stand_in_for_operators() -> None:
    """DeepSpeed's operators for the fast writer. Raises NotHere if the one for asynchronous I/O was not built before.

    The other one, a cast to bytes, is not built for CPU.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())
    if not operator_is_built(root, "async_io"):
        raise NotHere("DeepSpeed's async_io operator is not built (libaio's header, then AsyncIOBuilder().load())")
    # It looks for ninja all the same, which may be in the virtual environment only.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    from deepspeed.io import fast_file_writer

    def cast_to_byte_tensor(tensors: Any) -> Any:
        if isinstance(tensors, torch.Tensor):
            return tensors.reshape(-1).view(torch.uint8)
        return [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]

    operators = types.SimpleNamespace(cast_to_byte_tensor=cast_to_byte_tensor)
    fast_file_writer.UtilsBuilder = lambda: types.SimpleNamespace(load=lambda: operators)


DEEPSPEED_MODES: dict[str, type[Mode]] = {
    "layerwise": DeepSpeedLayerwise,
    "layerwise-nohash": DeepSpeedLayerwiseNoHash,
    "layerwise-monitor": DeepSpeedLayerwiseMonitor,
    "layerwise-off-step": DeepSpeedLayerwiseOffStep,
    "save-checkpoint": SaveCheckpoint,
    "fast": FastSaveCheckpoint,
    "decoupled": DecoupledSaveCheckpoint,
}
