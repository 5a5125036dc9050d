# SPDX-License-Identifier: Apache-2.0
"""Accelerate: one call after `accelerator.prepare()`, and a script's own loop resumes exactly.

    from layerwise_dist.integrations.accelerate import attach

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    ckpt = attach(accelerator, model, optimizer, scheduler, loader, dir="checkpoints")
    for epoch in ckpt.epochs(3):
        for batch in loader:
            with accelerator.accumulate(model):
                ...  # unchanged
    ckpt.close()

Accelerate's loader draws the next batch before its loop's body uses one. An iteration ends where that body ends, if the
optimizer has stepped in it: a window of `accelerator.accumulate` is one iteration.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import accelerate
import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SkipBatchSampler
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine.assembly import attach as attach_engine
from layerwise_dist.engine.disabled import DisabledEngine
from layerwise_dist.engine.engine import LayerwiseEngine, workings_of
from layerwise_dist.errors import BoundaryError, MismatchError, StateError, UnsupportedError
from layerwise_dist.frameworks import is_engine
from layerwise_dist.integrations.host_names import require
from layerwise_dist.integrations.hosted import HostedEngine
from layerwise_dist.integrations.prepared_loaders import base_of, seedable_sampler
from layerwise_dist.loop.generators import Generators
from layerwise_dist.loop.placed import PlacedTap

TESTED = ("1.15.0",)
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
_LOADER = "loader"


def _relied_on(accelerator: Any, loader: Any) -> list[tuple[object, str]]:
    """All that is used of Accelerate beside what it documents."""
    return [
        (accelerator, "_models"), (accelerator, "_dataloaders"), (accelerator, "_custom_objects"),
        (accelerator, "step"), (accelerator.gradient_state, "dataloader_references"), (loader, "base_dataloader"),
        (loader, "iteration"), (loader, "skip_batches"), (DataLoaderShard, "__iter__"),
    ]  # fmt: skip


def attach(
    accelerator: accelerate.Accelerator, model: torch.nn.Module, optimizer: Any, scheduler: Any, loader: Any,
    config: LayerwiseConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None, *,
    state: dict[str, Any] | None = None, fresh: bool = False, **overrides: Any,
) -> AcceleratedEngine | DisabledAcceleratedEngine:  # fmt: skip
    """Turns checkpointing on for what `accelerator.prepare()` returned, and restores the newest checkpoint if there is
    one. Call it on every rank, after `prepare()` and before the loop.

    Args:
        scheduler: the prepared LR scheduler, or None.
        loader: the prepared loader that the training iterates. Others (an evaluation's) are to be prepared before this
            call, in the same order in each run, and need no mention.
        config, overrides: as `layerwise_dist.attach` takes them.
        state: what else belongs to a step, by name. What was given to `accelerator.register_for_checkpointing()` is in
            it already.
        fresh: start a new lineage in a directory that holds checkpoints, instead of restoring one.

    Raises UnsupportedError for what was not prepared, or by a plugin that can't be followed; BoundaryError where the
    loop over the loader has begun; otherwise as `layerwise_dist.attach` and `restore()`.
    """
    _check(accelerator, model, loader)
    tap = _Tap(accelerator, loader)
    objects = _objects(accelerator, model, scheduler, tap, state or {})
    real = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if is_engine(model):  # of DeepSpeed's, which brings its own
        real = None
    try:
        tap.follow()
        engine = attach_engine(model, real, config, state=objects, fresh=fresh, **overrides)
    except BaseException:
        tap.detach()
        raise
    if isinstance(engine, DisabledEngine):
        tap.detach()
        return DisabledAcceleratedEngine(engine.config)
    hosted = AcceleratedEngine(engine, tap)
    if not fresh:
        try:
            hosted.restore()
        except BaseException:
            hosted.close()
            raise
    return hosted


class AcceleratedEngine(HostedEngine):
    """The engine of a loop over an Accelerate loader: `LayerwiseEngine`'s calls, and `epochs()`."""

    def __init__(self, engine: LayerwiseEngine, tap: _Tap) -> None:
        super().__init__(workings_of(engine), "Accelerate", lambda: tap.within, tap)
        self._epochs = tap
        tap.engine = weakref.ref(self)

    def epochs(self, total: int) -> Iterator[int]:
        """Yields the epochs from the one that the restored checkpoint stands in to `total` - 1.

        Within that epoch the loader yields the batches that were still to come, none if it stands at the epoch's end.
        """
        return self._epochs.epochs(total)


class DisabledAcceleratedEngine(DisabledEngine):
    """What `attach()` returns with ``enabled: false``."""

    def epochs(self, total: int) -> Iterator[int]:
        yield from range(total)


class _Tap(PlacedTap):
    """Follows the loop over a prepared loader: where it stands, and where its iterations end.

    Attributes:
        counters: what Accelerate and `epochs()` count; saved and put back with a checkpoint.
        inside: the loop's body is under way.
        engine: whose iterations these are; set by that engine.
    """

    def __init__(self, accelerator: Any, loader: Any) -> None:
        super().__init__(base_of(loader, _LOADER), _LOADER, one_ahead=True)
        self.shard, self._accelerator = loader, accelerator
        self.counters = _Counters(accelerator, loader)
        self.engine: weakref.ref[AcceleratedEngine] | None = None
        self.inside = self._in_epochs = self._looked = self._window = False
        self._plain = type(loader)

    def follow(self) -> None:
        """From now on, until `detach`, `iter()` of the prepared loader goes to `_iterate`."""
        plain, weak = self._plain, weakref.ref(self)

        def __iter__(shard: Any) -> Iterator[Any]:
            tap = weak()
            return plain.__iter__(shard) if tap is None or shard is not tap.shard else tap._iterate()

        body = {"__iter__": __iter__, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _become(self.shard, type(plain.__name__, (plain,), body))

    @property
    def within(self) -> bool:
        """Has the loop used batches since its last boundary?"""
        return self.inside or (self._window and not self._progress)

    @property
    def _progress(self) -> bool:
        engine = None if self.engine is None else self.engine()
        return engine is not None and workings_of(engine).boundary.progress

    def detach(self) -> None:
        super().detach()
        _become(self.shard, self._plain)

    def epochs(self, total: int) -> Iterator[int]:
        while self.counters.epoch < total:
            self._in_epochs = True
            try:
                yield self.counters.epoch
            finally:
                self._in_epochs = False
            self.counters.epoch += 1

    def _iterate(self) -> Iterator[Any]:
        engine = None if self.engine is None else self.engine()
        if engine is None:
            yield from self._plain.__iter__(self.shard)
            return
        if not self._in_epochs:
            raise BoundaryError(
                "the prepared loader is iterated outside of `for epoch in ckpt.epochs(total)`: a resume would count "
                "its epochs from 0 again. Let ckpt.epochs() be the loop around it"
            )
        if self.inside:
            raise BoundaryError("the loader that feeds the training is iterated within its own loop: give each its own")
        self.left()
        if self._progress:  # of a loop that was left by break
            engine.end_iteration()
            self._window = False
        began, resuming = self.shard.iteration, self.resuming
        if not resuming:
            self.go_on()
        try:
            for batch in self._plain.__iter__(self.shard):
                self.inside = self._window = True
                yield batch
                self.inside = False
                self._body_over(engine)
        finally:
            self.inside = False
        self.left()
        self.go_on()
        if resuming and self.shard.iteration == began:  # nothing was left of the epoch, so that Accelerate counts none
            self.shard.iteration = began + 1

    def _body_over(self, engine: AcceleratedEngine) -> None:
        if not self._progress:
            return
        if not self._looked:
            self._looked = True
            self._check_gradients()
        engine.end_iteration()
        self._window = False

    def _check_gradients(self) -> None:
        """Raises BoundaryError for gradients that go from one window into the next: they are not saved."""
        if self._accelerator.gradient_state.num_steps == 1:
            return
        for model in self._accelerator._models:
            for name, param in model.named_parameters():
                grad = getattr(param.grad, "_local_tensor", param.grad)
                if grad is not None and bool(grad.any()):
                    raise BoundaryError(
                        f"the gradient of {name} is there at the end of an accumulation window, and the next one "
                        "would add to it: a resume, which lacks it, would continue with other gradients. Call "
                        "optimizer.zero_grad() after optimizer.step(), within accelerator.accumulate()"
                    )


class _Counters:
    """`epoch`: of `AcceleratedEngine.epochs`. Accelerate's own: micro-batches of the window; of each prepared loader
    the passes over it, and what decides the order of the next one: own generators, and the seed of a seedable sampler.
    """

    def __init__(self, accelerator: Any, loader: Any) -> None:
        self._accelerator, self.epoch = accelerator, 0
        others = [each for each in accelerator._dataloaders if each is not loader]
        self._loaders = [each for each in (loader, *others) if issubclass(type(each), DataLoaderShard)]
        bases = [base_of(each, "prepared") for each in self._loaders]
        self._samplers = [seedable_sampler(each) for each in bases]
        self._generators = [Generators(each, "prepared") for each in bases]

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "window": self._accelerator.step,
            "passes": [each.iteration for each in self._loaders],
            "seeds": [getattr(each, "initial_seed", None) for each in self._samplers],
            "own": [each.take_own() for each in self._generators[1:]],  # the first one's are the tap's
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if len(saved["passes"]) != len(self._loaders):
            raise MismatchError(
                f"{len(self._loaders)} loaders are prepared, the checkpoint's job had {len(saved['passes'])}: prepare "
                "as many before attach(), in the same order"
            )
        self.epoch, self._accelerator.step = saved["epoch"], saved["window"]
        for loader, sampler, passes, seed in zip(
            self._loaders, self._samplers, saved["passes"], saved["seeds"], strict=True
        ):
            loader.iteration = passes
            if seed is not None:
                sampler.initial_seed = seed
        for generators, own in zip(self._generators[1:], saved["own"], strict=True):
            generators.put_own(own)


def _become(loader: Any, kind: type) -> None:
    """The loader says that it is of the class of the DataLoader inside, by a property that takes no other."""
    vars(object)["__class__"].__set__(loader, kind)


def _check(accelerator: Any, model: Any, loader: Any) -> None:
    kind = accelerator.distributed_type.value
    if kind not in _KINDS:
        raise UnsupportedError(
            f"Accelerate's distributed_type {kind} can't be followed; what works: one process, DDP, the FSDP plugin "
            "(fsdp_version=2), the DeepSpeed plugin"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    asked = plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and kind != "FSDP":
        raise UnsupportedError(
            f"an FSDP plugin is asked for, but Accelerate has not turned it on: it does so only for accelerators "
            f"with several processes, and this job is {kind} on {accelerator.device}. Leave the plugin out, or apply "
            "fully_shard() and use layerwise_dist.attach() without Accelerate"
        )
    if isinstance(loader, DataLoaderDispatcher) or type(loader) is DataLoaderDispatcher:
        raise UnsupportedError(
            "the loader's batches are made on the main process and sent to the others (an IterableDataset, or "
            "dispatch_batches=True), so the position of the others is unknown: set "
            "DataLoaderConfiguration(dispatch_batches=False), with a dataset that has a length"
        )
    if not issubclass(type(loader), DataLoaderShard):
        raise UnsupportedError(
            f"the loader is a {type(loader).__name__}, not what accelerator.prepare() returns: attach() comes after "
            "prepare(), with what that returned, and without skip_first_batches()"
        )
    require("accelerate", accelerate.__version__, TESTED, _relied_on(accelerator, loader))
    if loader.skip_batches or isinstance(loader.batch_sampler, SkipBatchSampler):
        raise UnsupportedError("the loader is one of skip_first_batches(): attach() skips consumed batches on its own")
    known = {id(each) for each in accelerator._models}  # of DDP the module inside
    modules = [*model.modules()]
    replicated = any(isinstance(each, torch.nn.parallel.DistributedDataParallel) for each in modules)
    if (kind.startswith("MULTI_") and not replicated) or not any(id(each) in known for each in modules):
        raise UnsupportedError(
            f"the model is a {type(model).__name__} that accelerator.prepare() has not returned: attach() comes after "
            "prepare(), with what that returned"
        )
    if any(each is loader for each in accelerator.gradient_state.dataloader_references):
        raise BoundaryError(
            "attach() within the loop over the loader: too late to place the data. Call it after "
            "accelerator.prepare() and before the loop over epochs"
        )


def _objects(accelerator: Any, model: Any, scheduler: Any, tap: _Tap, state: dict[str, Any]) -> dict[str, Any]:
    """What `layerwise_dist.attach` is given as state. Raises StateError for a name that is taken."""
    objects: dict[str, Any] = {_LOADER: tap, "accelerate": tap.counters}
    inner = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
    if inner is not None and inner is not getattr(model, "lr_scheduler", None):  # DeepSpeed's engine saves its own
        objects["scheduler"] = inner
    if accelerator.scaler is not None:
        objects["scaler"] = accelerator.scaler
    objects |= {f"registered{number}": each for number, each in enumerate(accelerator._custom_objects)}
    if taken := sorted(objects.keys() & state.keys()):
        raise StateError(f"state[{taken[0]!r}]", "the name is taken by what attach() saves itself: use another one")
    return objects | state
