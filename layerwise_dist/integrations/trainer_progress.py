# SPDX-License-Identifier: Apache-2.0
"""The progress of a `transformers.Trainer`, as an object of `state=`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypedDict

import torch

from layerwise_dist.errors import MismatchError
from layerwise_dist.integrations import trainer_names

log = logging.getLogger("layerwise_dist")


class At(TypedDict):
    """Where the next iteration begins.

    `micro`: batches of epoch `epoch` that are consumed. `stopped`: a callback has ended the training there.
    `elapsed_s`: seconds of training up to there, of all launches.
    """

    epoch: int
    micro: int
    stopped: bool
    elapsed_s: float


class Best(TypedDict):
    """`saved`: the checkpoint of that step has its tag."""

    value: float
    step: int
    saved: bool


class Progress:
    """Belongs to one call of `train()`."""

    def __init__(self, trainer: Any, exportable: type, shape: dict[str, int | None]) -> None:
        """`exportable`: transformers' ExportableState. `shape`: what decides the batches of an epoch, by name."""
        self._trainer, self._exportable, self._shape = trainer, exportable, shape
        self.at: At = {"epoch": 0, "micro": 0, "stopped": False, "elapsed_s": 0.0}
        self.best: Best | None = None
        self.saved: dict[str, Any] | None = None  # what a restore has brought

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "at": self.at,
            "best": self.best,
            "shape": self._shape,
            "state": {name: getattr(trainer.state, name) for name in trainer_names.STATE},
            "kept": {name: getattr(trainer, name, None) for name in trainer_names.KEPT},
            "callbacks": {name: _take(callback) for name, callback in self._stateful()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Keeps it for `put` and `put_kept`. Raises MismatchError for another order of the data, within an epoch."""
        differ = [f"{name} {was}, here {self._shape[name]}" for name, was in saved["shape"].items()
                  if was != self._shape[name]]  # fmt: skip
        if saved["at"]["micro"] and differ:
            raise MismatchError(
                f"the checkpoint stands {saved['at']['micro']} batches into epoch {saved['at']['epoch']}, and the "
                f"batches of an epoch differ here: {', '.join(differ)}. Keep them until the end of the epoch; "
                "between epochs they may change"
            )
        self.saved = saved

    def put(self) -> None:
        """What callbacks may look at when a training begins."""
        assert self.saved is not None
        self.at, self.best = self.saved["at"], self.saved["best"]
        for name, value in self.saved["state"].items():
            setattr(self._trainer.state, name, value)
        here, there = dict(self._stateful()), self.saved["callbacks"]
        for name in here.keys() & there.keys():
            _put(here[name], there[name])
        for name in sorted(there.keys() - here.keys()):
            log.warning("the checkpoint holds the state of a callback %s, which this Trainer does not have", name)

    def put_kept(self) -> None:
        """What `_inner_training_loop` has begun anew by then."""
        if self.saved is None:
            return
        for name, value in self.saved["kept"].items():
            setattr(self._trainer, name, value.to(self._trainer.args.device) if torch.is_tensor(value) else value)

    def _stateful(self) -> Iterator[tuple[str, Any]]:
        """Callbacks that tell their state, by class and by how many of it came before."""
        seen: dict[str, int] = {}
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, self._exportable) or _has_state_dict(callback):
                name = type(callback).__name__
                number = seen[name] = seen.get(name, 0) + 1
                yield f"{name} {number}", callback


def _has_state_dict(callback: Any) -> bool:
    return all(callable(getattr(callback, name, None)) for name in ("state_dict", "load_state_dict"))


def _take(callback: Any) -> Any:
    return callback.state_dict() if _has_state_dict(callback) else callback.state().get("attributes", {})


def _put(callback: Any, saved: Any) -> None:
    """Constructor arguments are this run's choice; what the run has made of the callback is the checkpoint's."""
    if _has_state_dict(callback):
        callback.load_state_dict(saved)
        return
    for name, value in saved.items():
        setattr(callback, name, value)
