# SPDX-License-Identifier: Apache-2.0
"""What `bench goodput` compares: ways to checkpoint a job that comes back after a kill."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import layerwise_dist as lwd
from layerwise_dist.bench.modes import DcpAsync, Mode, Peer, TorchSave, local_parts
from layerwise_dist.bench.trainings import Training


class Contender:
    """Belongs to the training thread; `resume` comes first."""

    title = ""

    def __init__(self, training: Training, folder: Path, every: int, mtbf_s: float, ranks: int) -> None:
        self.training, self.folder, self.every, self.mtbf_s, self.ranks = training, folder, every, mtbf_s, ranks

    def resume(self) -> int:
        """Loads the newest checkpoint; its step, or 0 if there is none."""
        raise NotImplementedError

    def update(self) -> None:
        self.training.optimizer.step()

    def end_iteration(self, step: int) -> None:
        """`step` counts from the beginning of the job."""
        raise NotImplementedError

    @property
    def interval(self) -> int:
        """Steps between checkpoints, as it is now."""
        return self.every


class Layerwise(Contender):
    title = "layerwise, every step"

    def resume(self) -> int:
        training = self.training
        place = str(self.folder / "layerwise")
        self._engine = lwd.attach(training.model, training.optimizer, dir=place, **self._settings())
        step = self._engine.restore()
        self._engine.explicit()
        return step

    def _settings(self) -> dict[str, Any]:
        return {"every_n_steps": 1}

    def end_iteration(self, step: int) -> None:
        self._engine.end_step()

    @property
    def interval(self) -> int:
        return int(self._engine.stats()["every_n_steps"])


class LayerwiseAuto(Layerwise):
    title = "layerwise, auto"

    def _settings(self) -> dict[str, Any]:
        return {"every_n_steps": "auto", "interval": {"mtbf_s": self.mtbf_s}}


class SavedByPeer(Contender):
    """Saves as a peer of `bench train` does, and loads what that saved."""

    mode: type[Peer]

    def resume(self) -> int:
        training = self.training
        self.folder.mkdir(exist_ok=True)
        self._mode = self.mode(training.model, training.optimizer, self.every, self.ranks)
        self._mode.start(self.folder)
        step = self._agree_on_newest()
        if step:
            _make_state(training)
            self.load(self._mode.target(step))
        return step

    def load(self, target: Path) -> None:
        raise NotImplementedError

    def complete(self, target: Path) -> bool:
        raise NotImplementedError

    def update(self) -> None:
        self._mode.update()

    def end_iteration(self, step: int) -> None:
        self._mode.end_iteration(step)
        self._mode.between(step)

    def _agree_on_newest(self) -> int:
        """Rank 0 looks, removes what is not complete, and tells all."""
        newest = 0
        if self._mode.rank == 0:
            for target in self.folder.iterdir():
                if self.complete(target):
                    newest = max(newest, int(target.name.rpartition("-")[2]))
                else:
                    shutil.rmtree(target)
        if self.ranks == 1:
            return newest
        told = torch.tensor(newest)
        dist.broadcast(told, src=0)
        return int(told)


class SavedByDcp(SavedByPeer):
    title = "DCP async"
    mode = DcpAsync

    def complete(self, target: Path) -> bool:
        return (target / ".metadata").is_file()  # written last, and renamed into place

    def load(self, target: Path) -> None:
        import torch.distributed.checkpoint as dcp

        state = self._mode.state()
        dcp.load(state, checkpoint_id=str(target), no_dist=self.ranks == 1)
        self.training.model.load_state_dict(state["model"])
        self.training.optimizer.load_state_dict(state["optimizer"])


class WholeTorchSave(TorchSave):
    """A rank's file is there only once it is whole and flushed."""

    def save(self, target: Path, began: float) -> None:
        target.mkdir(exist_ok=True)
        file = target / f"rank_{self.rank}.pt"
        part = file.with_suffix(".part")
        self.save_file(part)
        os.replace(part, file)


class SavedByTorch(SavedByPeer):
    title = "torch.save + fsync"
    mode = WholeTorchSave

    def complete(self, target: Path) -> bool:
        return all((target / f"rank_{rank}.pt").is_file() for rank in range(self.ranks))

    def load(self, target: Path) -> None:
        saved = torch.load(target / f"rank_{self._mode.rank}.pt", weights_only=True)
        with torch.no_grad():
            _put(local_parts(self._mode.state()), saved)


def _make_state(training: Training) -> None:
    """The optimizer's state, to be loaded into."""
    for param in training.model.parameters():
        param.grad = torch.zeros_like(param)
    training.optimizer.step()
    training.optimizer.zero_grad()


def _put(live: Any, saved: Any) -> None:
    if isinstance(live, dict):
        for key, value in live.items():
            _put(value, saved[key])
    elif isinstance(live, torch.Tensor):
        live.copy_(saved)


CONTENDERS: dict[str, type[Contender]] = {
    "layerwise": Layerwise,
    "layerwise-auto": LayerwiseAuto,
    "dcp-async": SavedByDcp,
    "torch-save": SavedByTorch,
}
# Those whose interval follows from what one checkpoint costs them.
BY_COST: dict[str, type[Mode]] = {"dcp-async": DcpAsync, "torch-save": WholeTorchSave}
