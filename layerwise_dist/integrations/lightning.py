# SPDX-License-Identifier: Apache-2.0
"""Lightning: one callback, and a restarted `trainer.fit()` resumes exactly.

    from layerwise_dist.integrations.lightning import LayerwiseCheckpoint

    trainer = Trainer(callbacks=[LayerwiseCheckpoint(dir="checkpoints")], max_epochs=3)
    trainer.fit(module, loader)

No hook of a callback comes at the end of an iteration: `on_train_batch_end` comes for each micro-batch, before it
counts as completed and before its validation. So the callback follows the loops themselves, by the names in
`_relied_on`. An iteration ends where the epoch loop is done with a batch in which an optimizer has stepped.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops import fetchers
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from layerwise_dist.config import LayerwiseConfig
from layerwise_dist.engine.assembly import attach
from layerwise_dist.engine.disabled import DisabledEngine
from layerwise_dist.engine.engine import workings_of
from layerwise_dist.errors import BoundaryError, ConfigError, StateError, UnsupportedError
from layerwise_dist.integrations.host_names import require
from layerwise_dist.integrations.hosted import HostedEngine
from layerwise_dist.integrations.lightning_state import FitState, relied_on_by_state
from layerwise_dist.loop.placed import PlacedTap

log = logging.getLogger("layerwise_dist")

TESTED = ("2.6.6",)
BEST = "best"
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
_LOADER = "loader"


def _relied_on(trainer: Any) -> list[tuple[object, str]]:
    """All that is used of Lightning beside what it documents."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    return [
        (fit, "setup_data"), (fit, "_load_combined_loader_states"), (fit, "_combined_loader"), (fit, "_data_fetcher"),
        (fit, "_restarting"), (epoch, "reset"), (epoch, "on_run_start"), (epoch, "on_advance_end"),
        (trainer, "_val_check_time_interval"), (fetchers, "_DataLoaderIterDataFetcher"), *relied_on_by_state(trainer),
    ]  # fmt: skip


class LayerwiseCheckpoint(Checkpoint):
    """Checkpoints what `trainer.fit()` trains, and restores the newest checkpoint when it is called again.

    Args:
        dir: directory of the checkpoints.
        config, overrides: as `layerwise_dist.attach` takes them.
        monitor: a metric that validation logs. Where it is better than ever, that step is saved under the tag "best".
        mode: whether less ("min") or more ("max") of it is better.
        state: what else belongs to a step, by name.
        fresh: start a new lineage in a directory that holds checkpoints, instead of restoring one.

    Attributes:
        engine: while `fit()` runs and after it: what `layerwise_dist.attach` returned; None before.
        best_score: of `monitor`; None before the first validation.

    Its errors are raised by `trainer.fit()`: as `attach()` and `restore()`; UnsupportedError for strategies and loops
    that can't be followed; BoundaryError where it was put among the callbacks after `fit()` had begun.
    """

    def __init__(
        self, dir: str | os.PathLike[str] | None = None, *,
        config: LayerwiseConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        monitor: str | None = None, mode: Literal["min", "max"] = "min", state: dict[str, Any] | None = None,
        fresh: bool = False, **overrides: Any,
    ) -> None:  # fmt: skip
        if mode not in ("min", "max"):
            raise ConfigError(f"mode = {mode!r}: for the metric that monitor= names it must be 'min' or 'max'")
        if dir is not None:
            overrides["dir"] = os.fspath(dir)
        self._config, self._overrides, self._state, self._fresh = config, overrides, dict(state or {}), fresh
        self._monitor, self._sign = monitor, 1.0 if mode == "min" else -1.0
        self._following: _Following | None = None
        self.engine: HostedEngine | DisabledEngine | None = None

    @property
    def best_score(self) -> float | None:
        return None if self._following is None else self._following.fit.best

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(each, LayerwiseCheckpoint) for each in trainer.callbacks) > 1:
            raise ConfigError("two LayerwiseCheckpoints among the callbacks: one is enough")
        self._check(trainer)
        self.engine = None
        self._following = _Following(trainer, self._attach)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._check_in_time()
        if isinstance(trainer.fit_loop._data_fetcher, fetchers._DataLoaderIterDataFetcher):
            raise UnsupportedError(
                "training_step(dataloader_iter) draws from the loader itself, so its position is unknown: take "
                "batch and batch_idx"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._check_in_time()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        following = self._following
        if self._monitor is None or following is None or trainer.sanity_checking or not trainer.state.fn == "fit":
            return
        found = trainer.callback_metrics.get(self._monitor)
        if found is None:
            raise ConfigError(
                f"monitor = {self._monitor!r} is not among the metrics that were logged by the end of the validation: "
                f"{sorted(trainer.callback_metrics)}"
            )
        score = torch.as_tensor(found, dtype=torch.float64).detach().clone().to(trainer.strategy.root_device)
        if dist.is_initialized():
            dist.broadcast(score, 0)  # ranks must save alike, whatever each of them has measured
        following.judge(float(score), self._sign)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._following is not None:
            self._following.end()
        if self.engine is not None:
            self.engine.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._let_go(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._let_go(None)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_in_time(self) -> None:
        if self.engine is None:
            raise BoundaryError(
                "LayerwiseCheckpoint was put among the callbacks when fit() had begun: too late to place the data. "
                "Give it in Trainer(callbacks=[...])"
            )

    def _let_go(self, exception: BaseException | None) -> None:
        if self._following is not None:
            self._following.detach()
        if self.engine is not None:
            self.engine.__exit__(None if exception is None else type(exception), exception, None)

    def _check(self, trainer: Any) -> None:
        strategy = trainer.strategy
        if type(strategy) not in _STRATEGIES:
            raise UnsupportedError(
                f"Lightning's {type(strategy).__name__} can't be followed; what works: one device, DDPStrategy, "
                "FSDPStrategy, and ModelParallelStrategy (FSDP2) with fully_shard() in configure_model()"
            )
        require("lightning", lightning.__version__, TESTED, _relied_on(trainer))
        if trainer.reload_dataloaders_every_n_epochs:
            raise UnsupportedError(
                "Trainer(reload_dataloaders_every_n_epochs=...): loaders that are rebuilt within fit() can't be "
                "followed"
            )
        if trainer._val_check_time_interval is not None:
            log.warning("Trainer(val_check_interval=...) follows the clock: a resume validates after other batches")

    def _attach(self, following: _Following, loader: Any) -> HostedEngine | DisabledEngine:
        """Between the making of the training loader and its first `iter()`."""
        trainer = following.trainer
        endless = math.isinf(trainer.fit_loop._combined_loader.limits[0])
        tap = following.tap = PlacedTap(loader, _LOADER, one_ahead=endless)
        objects: dict[str, Any] = {_LOADER: tap, "lightning": following.fit}
        objects |= {f"scheduler{number}": each.scheduler for number, each in enumerate(trainer.lr_scheduler_configs)}
        if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
            objects["scaler"] = scaler
        if taken := sorted(objects.keys() & self._state.keys()):
            raise StateError(f"state[{taken[0]!r}]", "the name is taken by what LayerwiseCheckpoint saves itself")
        optimizers = {f"optimizer{number}": each for number, each in enumerate(trainer.optimizers)}
        one = trainer.optimizers[0] if len(optimizers) == 1 else None
        overrides = dict(self._overrides)
        if isinstance(trainer.strategy, DDPStrategy) and not trainer.lightning_module.automatic_optimization:
            overrides.setdefault("replicas", "apart")  # with manual optimization Lightning's DDP broadcasts no buffers
        try:
            engine = attach(
                trainer.strategy.model, one, self._config, optimizers=optimizers if one is None else None,
                state=objects | self._state, fresh=self._fresh, **overrides,
            )  # fmt: skip
        except BaseException:
            tap.detach()
            raise
        if isinstance(engine, DisabledEngine):
            tap.detach()
            self.engine = engine
            return engine
        self.engine = hosted = HostedEngine(workings_of(engine), "Lightning", lambda: following.within, tap)
        if not self._fresh and hosted.restore() and trainer.ckpt_path is not None:
            raise ConfigError(
                f"fit(ckpt_path={str(trainer.ckpt_path)!r}), and {hosted.config.path} holds step {hosted.completed}: "
                "leave ckpt_path out to continue from there, or give LayerwiseCheckpoint(fresh=True)"
            )
        return hosted


class _Following:
    """The loops of one `fit()`, followed from its setup until `detach`.

    Attributes:
        fit: what of the loops is saved.
        tap: of the training loader, once there is one.
        within: the loops are anywhere but right after an iteration's end.
    """

    def __init__(self, trainer: Any, attach: Callable[[_Following, Any], HostedEngine | DisabledEngine]) -> None:
        self.trainer, self._attach = trainer, attach
        self.fit = FitState(trainer)
        self.tap: PlacedTap | None = None
        self.within = False
        self._engine: HostedEngine | None = None
        self._attached = self._resumes_within = False
        self._replaced: list[tuple[Any, str]] = []
        loop = trainer.fit_loop
        self._replace(loop, "_load_combined_loader_states", self._loader_made)
        self._replace(loop, "setup_data", self._set_up)
        self._replace(loop.epoch_loop, "on_run_start", self._epoch_begins)
        self._replace(loop.epoch_loop, "reset", self._epoch_resets)
        self._replace(loop.epoch_loop, "on_advance_end", self._batch_over)

    def _replace(self, owner: Any, name: str, by: Callable[..., None]) -> None:
        plain = getattr(owner, name)

        def replaced(*args: Any) -> None:
            by(plain, *args)

        setattr(owner, name, replaced)
        self._replaced.append((owner, name))

    def detach(self) -> None:
        """Puts back what was replaced; the class has it."""
        for owner, name in self._replaced:
            vars(owner).pop(name, None)
        self._replaced.clear()

    # -- what the loops do --------------------------------------------------------------------------------------------

    def _set_up(self, plain: Callable[[], None]) -> None:
        first = not self._attached
        plain()
        restored = self._engine is not None and self._engine.restored_from is not None
        if first and restored and self.tap is not None and not self._resumes_within:
            self.tap.restored()  # the first iter() of an epoch belongs to what follows the boundary

    def _loader_made(self, plain: Callable[[], None]) -> None:
        plain()
        if self._attached:
            raise UnsupportedError("the training loader was rebuilt within fit(), which can't be followed")
        loaders = self.trainer.fit_loop._combined_loader.flattened
        if len(loaders) != 1 or not isinstance(loaders[0], DataLoader):
            kinds = ", ".join(type(each).__name__ for each in loaders)
            raise UnsupportedError(f"training loaders {kinds}: what can be followed is one torch DataLoader")
        self._attached = True
        self._reshard()
        engine = self._attach(self, loaders[0])
        if isinstance(engine, HostedEngine):
            self._engine, self.within = engine, True
        self._resumes_within = self.tap is not None and self.fit.mid_epoch

    def _epoch_resets(self, plain: Callable[[], None]) -> None:
        """Lightning's restart counts a validation or a scheduler's step twice where it was saved right after them: the
        counters of the boundary are those to go on with.
        """
        if self._resumes_within:
            self._resumes_within = False
            self.trainer.fit_loop._restarting = False
        else:
            plain()

    def _epoch_begins(self, plain: Callable[[Any], None], fetcher: Any) -> None:
        plain(fetcher)
        if self._engine is not None and self.tap is not None:
            self.tap.go_on()
            self.fit.go_on()
            if self.fit.improved:  # saved with the boundary, and the kill came before the tag
                self._save_best()

    def _batch_over(self, plain: Callable[[Any], None], fetcher: Any) -> None:
        plain(fetcher)
        engine = self._engine
        if engine is None or not workings_of(engine).boundary.progress:
            return
        self._reshard()
        engine.end_iteration()
        if self.fit.improved:
            self._save_best()

    def _reshard(self) -> None:
        """A validation, whose forward no backward follows, leaves an FSDP2 root with whole parameters in place of those
        that the optimizer has.
        """
        for module in self.trainer.strategy.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _save_best(self) -> None:
        assert self._engine is not None
        self.fit.improved = self.within = False
        try:
            self._engine.save(BEST)
        finally:
            self.within = True

    def judge(self, score: float, sign: float) -> None:
        """A validation is over."""
        best = self.fit.best
        if not math.isnan(score) and (best is None or sign * score < sign * best):
            self.fit.best, self.fit.improved = score, True

    def end(self) -> None:
        """The training is over: what is saved from now on is at no place within an epoch."""
        if self.tap is not None:
            self.tap.left()
        self.within = False
