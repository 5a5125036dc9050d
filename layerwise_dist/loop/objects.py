# SPDX-License-Identifier: Apache-2.0
"""The `state={...}` objects: schedulers, scalers, loaders, generators, plain dicts; how each is saved and restored."""

from __future__ import annotations

import random
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from layerwise_dist.errors import LayerwiseError, MismatchError, StateError
from layerwise_dist.loop import rng
from layerwise_dist.loop.loaders import LoaderTap
from layerwise_dist.loop.placed import PlacedTap
from layerwise_dist.loop.sealed import SealedState
from layerwise_dist.storage import typed_json

_ALLOWED = (
    "an object with state_dict() and load_state_dict(), a dict, a torch.Generator, a numpy Generator or RandomState, "
    "a random.Random, or a torch DataLoader"
)


SCALER = "GradScaler"  # stands for any of its classes in `StateObjects.classes`


class StateObjects:
    """Everything that the user gave as `state`. Loaders are tapped; the boundary keeps their positions."""

    def __init__(self, objects: dict[str, Any] | None) -> None:
        """Raises StateError, with its path, for what cannot be saved: tried at once, not at the first checkpoint."""
        self._objects: dict[str, Any] = {}
        self.loaders: dict[str, DataLoader[Any]] = {}
        self.taps: dict[str, LoaderTap] = {}
        self._placed: dict[str, PlacedTap] = {}
        for name, item in (objects or {}).items():
            if not isinstance(name, str):
                raise StateError(f"state[{name!r}]", "names must be strings")
            if isinstance(item, PlacedTap):
                self.loaders[name], self._placed[name] = item.loader, item
            elif isinstance(item, DataLoader):
                self.loaders[name] = item
            else:
                self._objects[name] = item
        typed_json.dumps(self.take(), path="state")

    def tap(self) -> None:
        """From now on, until `detach`, loaders tell of what is drawn. Raises UnsupportedError."""
        for name, loader in self.loaders.items():
            self.taps[name] = self._placed.get(name) or LoaderTap(loader, name)

    @property
    def scalers(self) -> list[torch.amp.GradScaler]:
        return [item for item in self._objects.values() if isinstance(item, torch.amp.GradScaler)]

    def take(self) -> dict[str, Any]:
        """Live references, for typed JSON to copy."""
        return {name: _take(name, item) for name, item in self._objects.items()}

    def check(self, sealed: SealedState) -> None:
        """Of a sealed state, before any of it is put back. Raises MismatchError."""
        saved = sealed["objects"]
        missing, extra = sorted(self._objects.keys() - saved.keys()), sorted(saved.keys() - self._objects.keys())
        if missing or extra:
            raise MismatchError(
                f"state objects differ: the checkpoint lacks {missing}, and holds {extra}, which "
                f"attach(state=...) does not name"
            )
        for name, item in self._objects.items():
            if isinstance(item, torch.amp.GradScaler):
                _check_scaler(name, item, saved[name])
        problems = {name: _unfit(item, saved[name]) for name, item in self._objects.items()}
        if said := [f"state[{name!r}]: {problem}" for name, problem in problems.items() if problem]:
            raise MismatchError("; ".join(said))
        loaders = sealed["boundary"]["loaders"]
        if lacking := sorted(loaders.keys() - self.taps.keys()):
            raise MismatchError(
                f"the checkpoint holds the position of loaders {lacking}, this job has {sorted(self.taps)}"
            )
        for name, snapshot in loaders.items():
            self.taps[name].check(snapshot)

    def held(self) -> list[object]:
        """All that was given, loaders too."""
        return [*self._objects.values(), *self.loaders.values()]

    def names(self) -> list[str]:
        """All but loaders."""
        return [*self._objects]

    def schedules(self) -> list[str]:
        """Names of the LR schedulers."""
        return [name for name, item in self._objects.items() if _is_schedule(item)]

    def classes(self) -> dict[str, str]:
        """Of LR schedulers and GradScalers, by name: what a DeepSpeed engine has within itself."""
        return {
            name: SCALER if isinstance(item, torch.amp.GradScaler) else type(item).__qualname__
            for name, item in self._objects.items()
            if isinstance(item, torch.amp.GradScaler) or _is_schedule(item)
        }

    def is_on(self, name: str) -> bool:
        """Whether a GradScaler scales at all."""
        return self._objects[name].is_enabled()

    def generators(self) -> list[str]:
        """Names of the random number generators."""
        kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
        return [name for name, item in self._objects.items() if isinstance(item, kinds)]

    def derived(self, name: str, saved: Any, step: int, rank: int) -> Any:
        """The state of such a generator for a rank that a checkpoint has not, which that of one that it has decides."""
        return rng.derived_generator(self._objects[name], saved, step, rank)

    def put(self, saved: dict[str, Any]) -> None:
        """Raises StateError for an object that does not take back what was saved of one under its name."""
        for name, item in self._objects.items():
            try:
                _put(item, saved[name])
            except LayerwiseError:
                raise
            except Exception as error:  # of the object's own code
                raise StateError(
                    f"state[{name!r}]",
                    f"{type(item).__qualname__} does not accept what the checkpoint holds: {type(error).__name__}: "
                    f"{error}; what was loaded before it, parameters and optimizer state too, is undefined",
                ) from error

    def detach(self) -> None:
        for tap in self.taps.values():
            tap.detach()


def _is_schedule(item: object) -> bool:
    """Torch's, whoever wrote it, and DeepSpeed's, which are none of torch's."""
    if isinstance(item, torch.optim.lr_scheduler.LRScheduler):
        return True
    return any(base.__module__ == "deepspeed.runtime.lr_schedules" for base in type(item).__mro__)


def _check_scaler(name: str, scaler: torch.amp.GradScaler, saved: Any) -> None:
    """One that is off saves nothing, and takes nothing."""
    if scaler.is_enabled() != bool(saved):
        was, now = ("on", "off") if saved else ("off", "on")
        raise MismatchError(
            f"state[{name!r}]: the GradScaler was {was} when the checkpoint was made, and is {now} "
            f"(enabled={scaler.is_enabled()}): {'its scale would be lost' if saved else 'no scale was saved'}. Make it "
            f"with enabled={bool(saved)}; to change it for good, restore() with it as it was, close(), and continue "
            "with the other one by attach(fresh=True)"
        )


def _take(name: str, item: Any) -> Any:
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, np.random.Generator):
        return item.bit_generator.state
    if isinstance(item, np.random.RandomState):
        return item.get_state()
    if isinstance(item, random.Random):
        return item.getstate()
    if callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None)):
        try:
            return item.state_dict()
        except LayerwiseError:
            raise
        except Exception as error:
            raise StateError(
                f"state[{name!r}]", f"{type(item).__qualname__}.state_dict() fails: {type(error).__name__}: {error}"
            ) from error
    if isinstance(item, MutableMapping):
        return dict(item)
    raise StateError(f"state[{name!r}]", f"{type(item).__qualname__} cannot be saved; give {_ALLOWED}")


def _unfit(item: Any, saved: Any) -> str | None:
    """Why an object whose kind is known here does not take what was saved, if so; of others nobody can tell."""
    if isinstance(item, torch.Generator):
        if item.device.type == "cpu":
            return rng.refused(lambda: torch.Generator().set_state(saved))
        good = isinstance(saved, torch.Tensor) and saved.dtype == torch.uint8 and saved.shape == item.get_state().shape
        return None if good else "a generator of a device takes its own bytes only"
    if isinstance(item, np.random.Generator):
        return rng.numpy_refuses(saved, type(item.bit_generator).__name__)
    if isinstance(item, np.random.RandomState):
        return rng.numpy_refuses(saved)
    if isinstance(item, random.Random):
        return rng.refused(lambda: random.Random(0).setstate(saved))
    if not callable(getattr(item, "load_state_dict", None)) and not isinstance(saved, Mapping):
        return f"here it is a {type(item).__qualname__}, the checkpoint holds a {type(saved).__qualname__}"
    return None


def _put(item: Any, saved: Any) -> None:
    if isinstance(item, torch.Generator):
        item.set_state(saved)
    elif isinstance(item, np.random.Generator):
        item.bit_generator.state = saved
    elif isinstance(item, np.random.RandomState):
        item.set_state(saved)
    elif isinstance(item, random.Random):
        item.setstate(saved)
    elif callable(getattr(item, "load_state_dict", None)):
        item.load_state_dict(saved)
    else:
        item.clear()
        item.update(saved)
